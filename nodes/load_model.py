"""The node Load TADSR Model."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io
from server import PromptServer

from ..tadsr.errors import WeightsError, reading
from ..tadsr.methods import describe, license_notice
from ..tadsr.weights import TadsrWeights, encoder_state_dict
from .inputs import CATEGORY, Encoder, precision_input
from .models.base import WANTED_BASE, load_networks, read_weights
from .models.encoder import TimeAwareEncoderModel
from .models.folders import BUNDLED_WEIGHTS, WEIGHTS_FOLDER, file_identity
from .models.precision import AUTO, parse_precision
from .models.student import default_conditioning
from .models.text_encoder import NoTextEncoder

CHECKPOINTS = "checkpoints"
NO_BASE = "none (the weights file holds its base)"


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
            description="Loads weights of TADSR, or of OSEDiff, PiSA-SR, OMGSR-S or HYPIR, and the Stable Diffusion "
            "2.1-base checkpoint that they were made for. The bundled tadsr-mini needs no checkpoint. Shows what the "
            "file is, and its licence.",
            search_aliases=["tadsr", "super resolution loader", "upscaler loader", "one step diffusion"],
            inputs=[
                io.Combo.Input(
                    "weights",
                    options=names,
                    default=default,
                    tooltip="A weights file from models/tadsr, or the bundled one. Of OMGSR's folder either file.",
                ),
                io.Combo.Input(
                    "base",
                    options=[NO_BASE, *folder_paths.get_filename_list(CHECKPOINTS)],
                    default=NO_BASE,
                    tooltip=f"The checkpoint that the weights are added to: {WANTED_BASE}, in "
                    "models/checkpoints. Leave it at none for a self-contained file such as tadsr-mini.",
                ),
                precision_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The student UNet, for One-Step SR, Upscale with TADSR or a core sampler."),
                Encoder.Output(display_name="ENCODER", tooltip="The Time-Aware Encoder."),
                io.Vae.Output(tooltip="The VAE, for decoding."),
                io.Clip.Output(tooltip="The text encoder of the base checkpoint; tadsr-mini has none."),
                io.Conditioning.Output(
                    display_name="PROMPT",
                    tooltip="The default prompt of the weights, for core samplers; the nodes of this pack "
                    "use it by themselves. Empty if the weights have none.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, weights: str, base: str, precision: str = AUTO) -> str:
        """Returns what changes when a file is replaced under its name, so that it is loaded again."""
        paths = [folder_paths.get_full_path(WEIGHTS_FOLDER, weights)]
        paths += [folder_paths.get_full_path(CHECKPOINTS, base)] if base != NO_BASE else []
        return str([file_identity(path) for path in paths])

    @classmethod
    def execute(cls, weights: str, base: str, precision: str = AUTO) -> io.NodeOutput:
        dtype = parse_precision(precision)
        path = folder_paths.get_full_path_or_raise(WEIGHTS_FOLDER, weights)
        with reading(path, "weights of TADSR, OSEDiff, PiSA-SR, OMGSR-S or HYPIR, and the base that they need"):
            file = read_weights(path)
            networks = load_networks(path, file, _base_path(file, weights, base), dtype)
            encoder = TimeAwareEncoderModel(
                encoder_state_dict(file, networks.vae_state),
                file.metadata.vae_norm_groups,
                dtype,
                weights_name=weights,
                timesteps=file.metadata.timesteps,
            )
        prompt = None if networks.prompt is None else default_conditioning(networks.prompt)
        clip = NoTextEncoder(weights) if networks.clip is None else networks.clip
        meta = file.metadata
        about = f"{describe(meta.name, meta.formula, meta.timesteps)}\n{license_notice(meta.name, meta.license)}"
        if cls.hidden is not None:  # it is None where a program calls the node without ComfyUI's executor
            PromptServer.instance.send_progress_text(about, cls.hidden.unique_id)
        return io.NodeOutput(networks.student, encoder, networks.vae, clip, prompt)


def _base_path(file: TadsrWeights, weights_name: str, base_name: str) -> str | None:
    """Returns the checkpoint's path, None where the weights hold their base. Raises WeightsError."""
    if file.is_self_contained:
        if base_name != NO_BASE:
            raise WeightsError(f"{weights_name} holds its own base; the base is {base_name}, accepted is {NO_BASE!r}")
        return None
    if base_name == NO_BASE:
        raise WeightsError(
            f"{weights_name} has no base model; choose as base a checkpoint in models/checkpoints: {WANTED_BASE}"
        )
    return folder_paths.get_full_path_or_raise(CHECKPOINTS, base_name)
