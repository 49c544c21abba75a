"""Reads the files that TADSR weights are made from: official checkpoints, base models, prompt embeddings.

Pickles are read with `weights_only=True`: nothing in them is executed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .architecture import is_time_layer
from .errors import WeightsError, reading
from .foreign import describe_bytes
from .keys import diffusers_unet_to_ldm, diffusers_vae_to_ldm
from .pickles import is_pickle, read_pickle, tensors_of
from .releases import peft_folder, read_release
from .weights import BASE_UNET_PREFIX, BASE_VAE_PREFIX, TadsrWeights, load, validate

VAE_FOLDERS = ("vae", "time_vae")  # in a diffusers folder; the official release calls it time_vae
DIFFUSERS_FILE = "diffusion_pytorch_model"
SAFETENSORS_SUFFIX = ".safetensors"
ACCEPTED_BASE = "a Stable Diffusion 2.1-base checkpoint or diffusers folder"
ACCEPTED_PROMPT = "a file with one tensor, (tokens, width) or (1, tokens, width)"


def read_weights(path: Path) -> TadsrWeights:
    """Returns the weights in our format, or as their authors release them; nothing in a file is executed.

    path: of a file, of a folder of peft adapters, or of a file in one. Raises WeightsError for any other, saying what
    it seems to be: a file is known by its content.
    """
    if not peft_folder(path) and not (path.is_file() and is_pickle(path)):
        return load(path)
    weights = read_release(path)
    with reading(path, "weights that are whole"):
        validate(weights)
    return weights


def read_base(path: Path) -> dict[str, Tensor]:
    """Returns a base's UNet and VAE in the single-file layout, from a checkpoint or diffusers folder."""
    with reading(path, ACCEPTED_BASE):
        return _read_base(path)


def _read_base(path: Path) -> dict[str, Tensor]:
    if not path.is_dir():
        state = _read_tensors(path)
        base = {key: t for key, t in state.items() if key.startswith((BASE_UNET_PREFIX, BASE_VAE_PREFIX))}
        if not base:
            raise WeightsError(
                f"{path} is no Stable Diffusion checkpoint: none of its {len(state)} keys begins with "
                f"{BASE_UNET_PREFIX} or {BASE_VAE_PREFIX}"
            )
        return base
    folder = next((path / name for name in VAE_FOLDERS if (path / name).is_dir()), None)
    if folder is None or not (path / "unet").is_dir():
        raise WeightsError(f"{path} is no diffusers folder: it needs unet/ and one of {', '.join(VAE_FOLDERS)}")
    # time_vae has untrained time layers too; the trained ones come from the checkpoint
    vae = {key: t for key, t in _read_folder(folder).items() if not is_time_layer(key)}
    return _prefixed(BASE_UNET_PREFIX, diffusers_unet_to_ldm(_read_folder(path / "unet"))) | _prefixed(
        BASE_VAE_PREFIX, diffusers_vae_to_ldm(vae)
    )


def read_prompt(path: Path) -> Tensor:
    """Returns the prompt embedding, (1, tokens, width): the only tensor of a safetensors or PyTorch file."""
    with reading(path, ACCEPTED_PROMPT):
        tensors = list(_read_tensors(path).values())
    if len(tensors) != 1 or tensors[0].ndim not in (2, 3):
        raise WeightsError(
            f"{path} holds {len(tensors)} tensors, of shapes {[tuple(t.shape) for t in tensors[:3]]}; "
            f"a prompt embedding is one tensor (tokens, width) or (1, tokens, width)"
        )
    return tensors[0].reshape(1, *tensors[0].shape[-2:])


def read_mapped(path: Path) -> dict[str, Any]:
    """Returns the tensors of a safetensors file, or the dict of a PyTorch pickle, left in the file until used."""
    return read_pickle(path) if path.is_file() and is_pickle(path) else _read_tensors(path)


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of one network of a diffusers folder, whole or in shards."""
    for suffix in (SAFETENSORS_SUFFIX, ".bin"):
        files = sorted(folder.glob(f"{DIFFUSERS_FILE}*{suffix}"))
        whole = [file for file in files if file.name == DIFFUSERS_FILE + suffix]
        shards = [file for file in files if "-of-" in file.name]
        half = [file for file in files if file.name == f"{DIFFUSERS_FILE}.fp16{suffix}"]
        for choice in (whole, shards, half):
            if choice:
                return {key: t for file in choice for key, t in _read_tensors(file).items()}
    raise WeightsError(f"{folder} has no {DIFFUSERS_FILE}{SAFETENSORS_SUFFIX}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, or of a PyTorch pickle, of which nothing is executed."""
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    if is_pickle(path):
        return tensors_of(read_pickle(path))
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is {describe_bytes(path)} ({error})") from error
