"""The networks that TADSR's weights are added to, from the weights file itself or from a checkpoint."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import Tensor, nn

from ...tadsr import sources
from ...tadsr.architecture import shapes_of
from ...tadsr.encoder import EncoderConfig
from ...tadsr.errors import WeightsError, reading
from ...tadsr.foreign import describe_model
from ...tadsr.methods import license_notice
from ...tadsr.pickles import CHECKPOINT_NAMES, check_pickle, is_pickle
from ...tadsr.weights import BASE_UNET_PREFIX, BASE_VAE_PREFIX, TadsrWeights, is_finite
from .precision import usable_flags
from .self_contained import build_unet, build_vae
from .student import make_student

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

WANTED_BASE = "Stable Diffusion 2.1-base, one file with UNet, VAE and text encoder"
TEXT_LAYER = re.compile(r"cond_stage_model\.model\.transformer\.resblocks\.(\d{1,3})\.(.+)")


class Networks(NamedTuple):
    """The student, and what else its base gives."""

    student: ModelPatcher
    clip: comfy.sd.CLIP | None
    vae: comfy.sd.VAE
    vae_state: Mapping[str, Tensor]  # the VAE's tensors in the file's own precision
    prompt: Tensor | None  # (1, tokens, width): the default prompt's embedding


def read_weights(path: str) -> TadsrWeights:
    """Returns the weights in our format, or as their authors release them; see `tadsr.sources.read_weights`."""
    weights = sources.read_weights(Path(path))
    if weights.metadata.license:
        logging.info(license_notice(weights.metadata.name, weights.metadata.license))
    return weights


def load_networks(path: str, file: TadsrWeights, checkpoint: str | None, dtype: torch.dtype | None) -> Networks:
    """Returns the networks of the weights `file`, which was read from `path`. Raises WeightsError.

    checkpoint: the base's path, for a file that has none in itself. dtype: None for ComfyUI's choice.
    """
    if checkpoint is None:
        vae_state = file.base_vae
        vae = build_vae(vae_state, file.metadata.vae_norm_groups, dtype, file.metadata.norm_eps)
        _own_tensors(vae.patcher)
        model, clip = _load_base(file, checkpoint, dtype)
    else:
        with reading(checkpoint, WANTED_BASE):
            tensors = _read_checkpoint(checkpoint)
            vae_state = _without_prefix(tensors, BASE_VAE_PREFIX)
            vae = comfy.sd.VAE(sd=dict(vae_state), dtype=dtype)
            model, clip = _load_base(file, checkpoint, dtype)
            _check_whole(tensors, BASE_VAE_PREFIX, vae.first_stage_model.state_dict())
            _check_whole(tensors, BASE_UNET_PREFIX, model.model.diffusion_model.state_dict())
    prompt = file.prompt
    if prompt is None and file.metadata.empty_prompt and clip is not None:
        prompt = clip.encode_from_tokens(clip.tokenize("")).float().cpu()
    student = make_student(model, file, os.path.basename(path), prompt)
    # How ComfyUI makes a second one, for TorchCompileModel under dynamic VRAM and for several GPUs.
    student.cached_patcher_init = (load_student, (path, checkpoint, dtype, prompt))
    return Networks(student, clip, vae, vae_state, prompt)


def load_student(
    path: str,
    checkpoint: str | None,
    dtype: torch.dtype | None,
    prompt: Tensor | None = None,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """Returns the MODEL alone, read anew; arguments as of `load_networks`.

    prompt: the default prompt's embedding. disable_dynamic: without ComfyUI's dynamic VRAM.
    """
    file = read_weights(path)
    model, _ = _load_base(file, checkpoint, dtype, model_only=True, disable_dynamic=disable_dynamic)
    return make_student(model, file, os.path.basename(path), prompt)


def _load_base(
    file: TadsrWeights,
    checkpoint: str | None,
    dtype: torch.dtype | None,
    *,
    model_only: bool = False,
    disable_dynamic: bool = False,
) -> tuple[ModelPatcher, comfy.sd.CLIP | None]:
    """Returns the base's UNet and text encoder."""
    with usable_flags():
        return _load_whole(file, checkpoint, dtype, model_only=model_only, disable_dynamic=disable_dynamic)


def _load_whole(
    file: TadsrWeights, checkpoint: str | None, dtype: torch.dtype | None, *, model_only: bool, disable_dynamic: bool
) -> tuple[ModelPatcher, comfy.sd.CLIP | None]:
    if checkpoint is None:
        downscale = EncoderConfig.from_state_dict(file.base_vae).downscale
        model = build_unet(
            file.base_unet, downscale, dtype, norm_eps=file.metadata.norm_eps, disable_dynamic=disable_dynamic
        )
        _own_tensors(model)
        return model, None
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(
        checkpoint,
        output_vae=False,
        output_clip=not model_only,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={} if dtype is None else {"dtype": dtype},
        disable_dynamic=disable_dynamic,
    )
    if dtype is not None:
        model.model.manual_cast_dtype = None  # the chosen precision is that of the computation too
    return model, clip


def _own_tensors(patcher: ModelPatcher) -> None:
    """Copies tensors that ComfyUI took over as they were, views of our mapped file: the file may change."""
    if patcher.is_dynamic():
        parameters: Iterable[nn.Parameter] = patcher.model.parameters()
        for parameter in parameters:
            parameter.data = parameter.data.clone()


def _read_checkpoint(path: str) -> Mapping[str, Tensor]:
    """Returns the tensors of a single-file checkpoint of the base's kind; raises WeightsError for another file."""
    if is_pickle(Path(path)):
        check_pickle(Path(path), CHECKPOINT_NAMES, sums=False)  # 5 GB
    tensors = comfy.utils.load_torch_file(path)
    seems = describe_model(shapes_of(tensors))
    if seems:
        raise WeightsError(f"{path} seems to be {seems}; accepted is {WANTED_BASE}")
    for prefix, what in ((BASE_UNET_PREFIX, "UNet"), (BASE_VAE_PREFIX, "VAE")):
        if not any(key.startswith(prefix) for key in tensors):
            raise WeightsError(f"{path} has no {what} ({prefix}*); accepted is {WANTED_BASE}")
    _check_text_encoder(path, tensors)
    for key, tensor in tensors.items():
        if key.startswith((BASE_UNET_PREFIX, BASE_VAE_PREFIX)):
            _check_numbers(path, key, tensor)
    return tensors


def _check_numbers(path: str, key: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise WeightsError(f"{path}: {key} is of the type {tensor.dtype}; accepted are floating-point numbers")
    if tensor.itemsize > 1 and not is_finite(tensor):
        raise WeightsError(f"{path}: {key} holds NaN or infinity; get the file again")


def _check_text_encoder(path: str, tensors: Collection[str]) -> None:
    """Raises WeightsError if a layer of the text encoder lacks a tensor that others have; without any it is fine."""
    layers: dict[int, set[str]] = {}
    for match in filter(None, map(TEXT_LAYER.fullmatch, tensors)):
        layers.setdefault(int(match[1]), set()).add(match[2])
    whole = set().union(*layers.values())
    for layer in range(max(layers, default=-1) + 1):
        lost = sorted(whole - layers.get(layer, set()))
        if lost:
            raise WeightsError(
                f"{path}: layer {layer} of its text encoder lacks {len(lost)} tensors ({', '.join(lost[:3])}); get the "
                "whole checkpoint"
            )


def _check_whole(tensors: Collection[str], prefix: str, expected: Iterable[str]) -> None:
    """Raises WeightsError, naming the first tensors that the network needs and the file lacks."""
    lost = sorted(key for key in expected if prefix + key not in tensors)
    if lost:
        raise WeightsError(
            f"it lacks {len(lost)} tensors of its network ({', '.join(prefix + key for key in lost[:3])}); get the "
            f"whole checkpoint: {WANTED_BASE}"
        )


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
