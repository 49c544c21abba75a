"""The node Load TADSR Model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ..tadsr.convert import LICENSE_NOTICE, convert_official
from ..tadsr.weights import BASE_UNET_PREFIX, BASE_VAE_PREFIX, TadsrWeights, WeightsError, encoder_state_dict, load
from .encoder_patcher import EncoderPatcher
from .folders import BUNDLED_WEIGHTS, OFFICIAL_EXTENSION, WEIGHTS_FOLDER
from .self_contained import build_unet, build_vae
from .sockets import CATEGORY, Encoder
from .student import default_conditioning, make_student

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

CHECKPOINTS = "checkpoints"
NO_BASE = "none (the weights file holds its base)"
WANTED_BASE = "Stable Diffusion 2.1-base, one file with UNet, VAE and text encoder"


class Base(NamedTuple):
    """The networks that TADSR's weights are added to."""

    model: ModelPatcher
    clip: comfy.sd.CLIP | None
    vae: comfy.sd.VAE
    vae_state: Mapping[str, Tensor]  # its tensors in the file's own precision


class TADSRModelLoader(io.ComfyNode):
    """Weights file, and its base -> MODEL, TADSR_ENCODER, VAE, CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = folder_paths.get_filename_list(WEIGHTS_FOLDER)
        default = BUNDLED_WEIGHTS if BUNDLED_WEIGHTS in names else None
        return io.Schema(
            node_id="TADSRModelLoader",
            display_name="Load TADSR Model",
            category=CATEGORY,
            description="Loads TADSR weights and the Stable Diffusion 2.1-base checkpoint that they were "
            "made for. The bundled tadsr-mini needs no checkpoint.",
            search_aliases=["tadsr", "super resolution loader", "upscaler loader", "one step diffusion"],
            inputs=[
                io.Combo.Input(
                    "weights",
                    options=names,
                    default=default,
                    tooltip="A TADSR weights file from models/tadsr, or the bundled one.",
                ),
                io.Combo.Input(
                    "base",
                    options=[NO_BASE, *folder_paths.get_filename_list(CHECKPOINTS)],
                    default=NO_BASE,
                    tooltip=f"The checkpoint that the weights are added to: {WANTED_BASE}, in "
                    "models/checkpoints. Leave it at none for a self-contained file such as tadsr-mini.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The student UNet, for One-Step SR, Upscale with TADSR or a core sampler."),
                Encoder.Output(display_name="ENCODER", tooltip="The Time-Aware Encoder."),
                io.Vae.Output(tooltip="The VAE, for decoding."),
                io.Clip.Output(tooltip="The text encoder; empty without a base checkpoint."),
                io.Conditioning.Output(
                    display_name="PROMPT",
                    tooltip="The default prompt of the weights, for core samplers; the nodes of this pack "
                    "use it by themselves. Empty if the weights have none.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, weights: str, base: str) -> str:
        """Returns what changes when a file is replaced under its name, so that it is loaded again."""
        paths = [folder_paths.get_full_path(WEIGHTS_FOLDER, weights)]
        paths += [folder_paths.get_full_path(CHECKPOINTS, base)] if base != NO_BASE else []
        return str([(path, os.stat(path).st_mtime_ns) for path in paths if path and os.path.exists(path)])

    @classmethod
    def execute(cls, weights: str, base: str) -> io.NodeOutput:
        file = _read_weights(folder_paths.get_full_path_or_raise(WEIGHTS_FOLDER, weights))
        networks = _load_base(file, weights, base)
        student = make_student(networks.model, file, weights)
        encoder = EncoderPatcher(encoder_state_dict(file, networks.vae_state), file.metadata.vae_norm_groups)
        prompt = None if file.prompt is None else default_conditioning(file.prompt)
        return io.NodeOutput(student, encoder, networks.vae, networks.clip, prompt)


def _read_weights(path: str) -> TadsrWeights:
    """Returns the weights in our format, or in the official release's, which is read without executing it."""
    if not path.endswith(OFFICIAL_EXTENSION):
        return load(path)
    logging.info(LICENSE_NOTICE)
    return convert_official(path)


def _load_base(file: TadsrWeights, weights_name: str, base_name: str) -> Base:
    """Returns the base from the weights file or from a checkpoint, whichever has it. Raises WeightsError."""
    if file.is_self_contained:
        if base_name != NO_BASE:
            raise WeightsError(f"{weights_name} holds its own base; the base is {base_name}, accepted is {NO_BASE!r}")
        vae = build_vae(file.base_vae, file.metadata.vae_norm_groups)
        return Base(build_unet(file.base_unet, vae.downscale_ratio), None, vae, file.base_vae)
    if base_name == NO_BASE:
        raise WeightsError(
            f"{weights_name} holds no base model; choose as base a checkpoint in models/checkpoints: {WANTED_BASE}"
        )
    return _load_checkpoint(folder_paths.get_full_path_or_raise(CHECKPOINTS, base_name))


def _load_checkpoint(path: str) -> Base:
    """Returns the networks of a single-file checkpoint. Raises WeightsError if it lacks one of them."""
    tensors = comfy.utils.load_torch_file(path)
    for prefix, what in ((BASE_UNET_PREFIX, "UNet"), (BASE_VAE_PREFIX, "VAE")):
        if not any(key.startswith(prefix) for key in tensors):
            raise WeightsError(f"{path} holds no {what} ({prefix}*); accepted is {WANTED_BASE}")
    vae_state = {
        key.removeprefix(BASE_VAE_PREFIX): tensor for key, tensor in tensors.items() if key.startswith(BASE_VAE_PREFIX)
    }
    del tensors
    model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(
        path, embedding_directory=folder_paths.get_folder_paths("embeddings")
    )
    return Base(model, clip, vae, vae_state)
