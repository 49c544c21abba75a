"""Reads the tensors of a base model from a checkpoint, a diffusers folder or a self-contained TADSR weights file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tadsr import weights as tadsr_weights
from tadsr.errors import WeightsError
from tadsr.foreign import describe_bytes
from tadsr.pickles import is_pickle
from tadsr.sources import VAE_FOLDERS, read_base
from tadsr.weights import BASE_UNET_PREFIX, BASE_VAE_PREFIX, is_tadsr

NORM_GROUPS = 32  # SD VAE config
NORM_GROUPS_FIELD = "tadsr.vae_norm_groups"  # safetensors metadata of a single file: no tensor's shape tells it
LATENT_CHANNELS = 4  # SD VAE config
OTHER_INPUTS = {5: "a depth-to-image model", 7: "an upscaler", 8: "an editing model", 9: "an inpainting model"}
ACCEPTED = "accepted is Stable Diffusion 2.1-base, or another UNet and VAE of its kind"


@dataclass(frozen=True)
class BaseTensors:
    """What a file or folder holds of a base, before any network is built; tensors as stored."""

    state: dict[str, Tensor]  # model.diffusion_model.*, first_stage_model.*
    norm_groups: int
    name: str
    encoder_time: dict[str, Tensor]
    prompt: Tensor | None

    @property
    def unet(self) -> dict[str, Tensor]:
        """The UNet's tensors, under names of a single file, without prefix."""
        return _without_prefix(self.state, BASE_UNET_PREFIX)

    @property
    def vae(self) -> dict[str, Tensor]:
        """The VAE's tensors, likewise."""
        return _without_prefix(self.state, BASE_VAE_PREFIX)


def read_tensors(path: Path) -> BaseTensors:
    """Returns the base's tensors in a checkpoint, a diffusers folder or a self-contained weights file.

    Raises WeightsError for anything that is not of the Stable Diffusion 2.x kind, saying what it seems to be.
    """
    source = _read_folder(path) if path.is_dir() else _read_file(path)
    try:
        _check_kind(source.unet, source.vae)
    except WeightsError as error:
        raise WeightsError(f"{path} cannot be the base model: {error}") from error
    return source


def _read_file(path: Path) -> BaseTensors:
    keys, header = _read_header(path) if path.is_file() and not is_pickle(path) else ([], {})
    if is_tadsr(keys):
        return _read_tadsr(path)
    groups = header.get(NORM_GROUPS_FIELD, str(NORM_GROUPS))
    if not groups.isdecimal():
        raise WeightsError(f"{path}: metadata {NORM_GROUPS_FIELD} is {groups!r}; accepted is a number")
    return BaseTensors(read_base(path), int(groups), path.stem, {}, None)


def _read_header(path: Path) -> tuple[list[str], dict[str, str]]:
    """Returns the keys and the metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys()), file.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(f"{path} is {describe_bytes(path)} ({error})") from error


def _read_folder(path: Path) -> BaseTensors:
    """Returns a diffusers folder's model; its configs tell what no tensor does."""
    if _config(path / "unet").get("addition_embed_type") == "text_time":
        raise WeightsError(f"{path} cannot be the base model: it seems to be Stable Diffusion XL; {ACCEPTED}")
    prediction = _config(path / "scheduler", "scheduler_config.json").get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise WeightsError(
            f"{path} cannot be the base model: its scheduler says {prediction}, as of Stable Diffusion 2.1 for 768 "
            f"pixels; accepted is epsilon, as of Stable Diffusion 2.1-base"
        )
    vae = next((_config(path / name) for name in VAE_FOLDERS if (path / name).is_dir()), {})
    return BaseTensors(read_base(path), int(vae.get("norm_num_groups", NORM_GROUPS)), path.name, {}, None)


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Returns a network's config in a diffusers folder, or nothing if there is none."""
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _read_tadsr(path: Path) -> BaseTensors:
    weights = tadsr_weights.load(path)
    if not weights.is_self_contained:
        raise WeightsError(
            f"{path} cannot be the base model: it is a TADSR weights file without its base model "
            f"({weights.metadata.base_model or 'unnamed'}); give that model, and this file as init_weights"
        )
    adapted = bool(weights.unet_lora or weights.unet_full or weights.encoder_lora)
    return BaseTensors(
        state=weights.base,
        norm_groups=weights.metadata.vae_norm_groups,
        name=(adapted and weights.metadata.base_model) or weights.metadata.name,
        encoder_time={} if adapted else {key: t.float() for key, t in weights.encoder_time.items()},
        prompt=None if weights.prompt is None else weights.prompt.float(),
    )


def _check_kind(unet: Mapping[str, Tensor], vae: Mapping[str, Tensor]) -> None:
    """Raises WeightsError, saying what the model seems to be, unless it is of the Stable Diffusion 2.x kind."""
    if any(key.startswith("label_emb.") for key in unet):
        raise WeightsError(f"it seems to be Stable Diffusion XL, or another model with a label embedding; {ACCEPTED}")
    if "input_blocks.0.0.weight" not in unet:
        raise WeightsError(f"it has no UNet of the Stable Diffusion kind ({len(unet)} tensors of another one)")
    inputs, first = unet["input_blocks.0.0.weight"].shape[1], vae.get("decoder.conv_in.weight")
    latents = LATENT_CHANNELS if first is None else first.shape[1]
    if inputs != latents:
        seems = OTHER_INPUTS.get(inputs, "another kind of model")
        raise WeightsError(
            f"its UNet takes {inputs} channels, so it seems to be {seems}; accepted are its VAE's {latents}"
        )
    if any(key.endswith(".proj_in.weight") and t.ndim == 4 for key, t in unet.items()):
        raise WeightsError(
            f"its transformers have convolutions as projections, so it seems to be Stable Diffusion 1.x; {ACCEPTED}"
        )
    for half in ("encoder", "decoder"):
        if f"{half}.conv_in.weight" not in vae:
            raise WeightsError(f"it has no VAE {half}; get the whole checkpoint, with UNet and VAE")


def _without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
