"""Fixtures: a real ComfyUI with this pack, as a server and in this process; pictures; reference data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from host import comfy_in_process, torch_import_shim
from host.batch import BatchOptions
from host.comfy_in_process import InProcessComfy
from host.comfyui import DEFAULT_VERSION, existing_comfyui, fetch_comfyui
from host.server import PACK, PACK_NAME, ComfyServer
from training.metrics.lpips import LPIPS
from training.metrics.pretrained import LpipsWeightsError

torch_import_shim.install()  # before any test imports torchvision, which diffusers does too

VERSION_VARIABLE = "TADSR_TEST_COMFYUI"  # another version that host.comfyui knows, or a ComfyUI folder
SHARED_REFERENCE = PACK.parent / "shared" / "reference"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Equality to the bit is asked for on one thread, where no scheduling can change the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def inference_mode() -> Iterator[None]:
    """As ComfyUI runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this repository."""
    return PACK


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """A real ComfyUI source tree: version 0.30.0, or what $TADSR_TEST_COMFYUI names."""
    wanted = os.environ.get(VERSION_VARIABLE, DEFAULT_VERSION)
    return existing_comfyui(Path(wanted)) if Path(wanted).is_dir() else fetch_comfyui(wanted)


@pytest.fixture(scope="session")
def comfy_server(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running ComfyUI (CPU, free loopback port, temporary folders) with this pack in custom_nodes."""
    with ComfyServer(comfyui_path, base=tmp_path_factory.mktemp("comfyui")) as server:
        # Some core nodes of old versions fail to import for want of a display; only this pack matters here.
        failed = [line for line in server.log().splitlines() if "IMPORT FAILED" in line and PACK_NAME in line]
        assert not failed, f"ComfyUI could not import this pack:\n{server.log()[-4000:]}"
        yield server


@pytest.fixture(scope="session")
def comfy_inprocess(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> InProcessComfy:
    """ComfyUI in this process: `import comfy...` works, and the pack is loaded as ComfyUI loads it."""
    return comfy_in_process.load(comfyui_path, tmp_path_factory.mktemp("comfy-in-process"))


@pytest.fixture(scope="session")
def lpips_network() -> Callable[[str], LPIPS]:
    """Gives the LPIPS network of a name, alex or vgg; the test is skipped where its weights cannot be fetched."""

    def load(net: str) -> LPIPS:
        try:
            return LPIPS(net)
        except LpipsWeightsError as error:
            pytest.skip(f"needs the weights of LPIPS, which could not be fetched: {error}")

    return load


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, lpips_network: Callable[[str], LPIPS]) -> dict[str, Path]:
    """Pictures and a base model for small training runs, by the names of their config."""
    from training_runs import make_inputs

    lpips_network("vgg")  # runs load their own
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Gives a file system of so many bytes; the test is skipped where none can be mounted. A second call resizes it."""
    folder = tmp_path / "disk"
    if shutil.which("mount") is None:
        pytest.skip("needs mount")

    def give(size: int) -> Path:
        options = f"size={size}" if not folder.exists() else f"remount,size={size}"
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            folder.rmdir()
            pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.strip()}")
        return folder

    yield give
    if folder.exists():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def inverting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's own workflow, which takes no time."""
    workflow = {
        "7": {"class_type": "LoadImage", "inputs": {"image": "x.png"}},
        "8": {"class_type": "ImageInvert", "inputs": {"image": ["7", 0]}, "_meta": {"title": "Turn round"}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "x"}},
    }
    file = tmp_path_factory.mktemp("workflow") / "own.json"
    file.write_text(json.dumps(workflow))
    return file


@pytest.fixture
def invert(inverting: Path, comfy_server: ComfyServer) -> Callable[..., BatchOptions]:
    """Gives the options of a batch that inverts, by default on the tests' server."""

    def options(**changes: Any) -> BatchOptions:
        return BatchOptions(**{"workflow": inverting, "servers": [comfy_server.url], **changes})

    return options


@pytest.fixture(scope="session")
def shared_reference() -> Path:
    """The recorded outputs of the official implementation, which are not in this repository."""
    if not SHARED_REFERENCE.is_dir():
        pytest.skip("needs the recorded reference data (../shared/reference beside the repository)")
    return SHARED_REFERENCE


@pytest.fixture(scope="session")
def photo(repository: Path) -> Path:
    """The bundled sample photograph: low quality, to be upscaled four times."""
    return repository / "assets" / "sample.jpg"


@pytest.fixture(scope="session")
def photo_truth(repository: Path) -> Path:
    """The same photograph before it was degraded, four times larger."""
    return repository / "assets" / "sample_hq.webp"
