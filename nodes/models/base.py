"""The networks that TADSR's weights are added to, from the weights file itself or from a checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ...tadsr.convert import LICENSE_NOTICE, convert_official
from ...tadsr.encoder import EncoderConfig
from ...tadsr.weights import BASE_UNET_PREFIX, BASE_VAE_PREFIX, TadsrWeights, WeightsError, load
from .folders import OFFICIAL_EXTENSION
from .self_contained import build_unet, build_vae
from .student import make_student

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

WANTED_BASE = "Stable Diffusion 2.1-base, one file with UNet, VAE and text encoder"


class Networks(NamedTuple):
    """The student, and what else its base gives."""

    student: ModelPatcher
    clip: comfy.sd.CLIP | None
    vae: comfy.sd.VAE
    vae_state: Mapping[str, Tensor]  # the VAE's tensors in the file's own precision


def read_weights(path: str) -> TadsrWeights:
    """Returns the weights in our format, or in the official release's, which is read without executing it."""
    if not path.endswith(OFFICIAL_EXTENSION):
        return load(path)
    logging.info(LICENSE_NOTICE)
    return convert_official(path)


def load_networks(path: str, file: TadsrWeights, checkpoint: str | None, dtype: torch.dtype | None) -> Networks:
    """Returns the networks of the weights `file`, which was read from `path`. Raises WeightsError.

    checkpoint: the base's path, for a file that has none in itself. dtype: None for ComfyUI's choice.
    """
    if checkpoint is None:
        vae_state = file.base_vae
        vae = build_vae(vae_state, file.metadata.vae_norm_groups, dtype)
    else:
        vae_state = _checkpoint_vae(checkpoint)
        vae = comfy.sd.VAE(sd=dict(vae_state), dtype=dtype)
    model, clip = _load_base(file, checkpoint, dtype)
    student = make_student(model, file, os.path.basename(path))
    # How ComfyUI makes a second one, for TorchCompileModel under dynamic VRAM and for several GPUs.
    student.cached_patcher_init = (load_student, (path, checkpoint, dtype))
    return Networks(student, clip, vae, vae_state)


def load_student(
    path: str, checkpoint: str | None, dtype: torch.dtype | None, disable_dynamic: bool = False
) -> ModelPatcher:
    """Returns the MODEL alone, read anew; arguments as of `load_networks`.

    disable_dynamic: without ComfyUI's dynamic VRAM.
    """
    file = read_weights(path)
    model, _ = _load_base(file, checkpoint, dtype, model_only=True, disable_dynamic=disable_dynamic)
    return make_student(model, file, os.path.basename(path))


def _load_base(
    file: TadsrWeights,
    checkpoint: str | None,
    dtype: torch.dtype | None,
    *,
    model_only: bool = False,
    disable_dynamic: bool = False,
) -> tuple[ModelPatcher, comfy.sd.CLIP | None]:
    """Returns the base's UNet and text encoder."""
    if checkpoint is None:
        downscale = EncoderConfig.from_state_dict(file.base_vae).downscale
        return build_unet(file.base_unet, downscale, dtype, disable_dynamic=disable_dynamic), None
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


def _checkpoint_vae(path: str) -> dict[str, Tensor]:
    """Returns the VAE's tensors in a single-file checkpoint. Raises WeightsError if it lacks UNet or VAE."""
    tensors = comfy.utils.load_torch_file(path)
    for prefix, what in ((BASE_UNET_PREFIX, "UNet"), (BASE_VAE_PREFIX, "VAE")):
        if not any(key.startswith(prefix) for key in tensors):
            raise WeightsError(f"{path} holds no {what} ({prefix}*); accepted is {WANTED_BASE}")
    return {
        key.removeprefix(BASE_VAE_PREFIX): tensor for key, tensor in tensors.items() if key.startswith(BASE_VAE_PREFIX)
    }
