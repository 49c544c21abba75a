from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_weights import random_student

from benchmarks.quality import held_out_samples, measure, pillow_upscaler, student_upscaler, table, to_tensor
from benchmarks.testset import Sample
from tadsr.schedule import DEFAULT_TIMESTEP
from training.lpips import LPIPS
from training.train_mini import MiniConfig


def sample(seed: int = 0) -> Sample:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    hq = np.asarray(Image.fromarray(coarse).resize((72, 64), Image.Resampling.BICUBIC))
    return Sample(name=f"picture{seed}", hq=hq, lq=np.asarray(Image.fromarray(hq).resize((18, 16))))


def test_better_results_score_better_and_are_shown(tmp_path: Path, lpips_network: Callable[[str], LPIPS]) -> None:
    for net in ("alex", "vgg"):
        lpips_network(net)  # the benchmark loads its own
    samples = [sample(0), sample(1)]
    truths = {s.lq.tobytes(): to_tensor(s.hq) for s in samples}
    methods = {
        "truth": lambda lq: truths[lq.tobytes()],
        "bicubic": pillow_upscaler(Image.Resampling.BICUBIC),
        "nearest": pillow_upscaler(Image.Resampling.NEAREST),
    }
    results = measure(methods, samples, tmp_path)
    for column, sign in enumerate((1, 1, -1, -1)):  # PSNR, SSIM, LPIPS, LPIPS
        truth, bicubic, nearest = (sign * results[name][column] for name in methods)
        assert truth > bicubic > nearest
    assert results["truth"][2:4] == pytest.approx([0, 0], abs=1e-6)
    assert "| bicubic | " in table(results)
    assert {path.name for path in tmp_path.iterdir()} == {"picture0.png", "picture1.png"}


def test_the_student_gives_eight_bit_pictures_of_the_right_size() -> None:
    lq = sample().lq[:, :15]  # padded to a multiple of the VAE's downscale, and cut again
    student = random_student()
    results = [student_upscaler(student, t)(lq) for t in (DEFAULT_TIMESTEP, DEFAULT_TIMESTEP, 900)]
    assert all(result.shape == (1, 3, 64, 60) for result in results)
    assert torch.equal((results[0] * 255).round() / 255, results[0]) and 0 <= results[0].min() < results[0].max() <= 1
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_held_out_samples_are_those_that_training_never_sees(tmp_path: Path) -> None:
    kept = MiniConfig().validation_crops
    crops = np.zeros((kept + 10, 16, 16, 3), dtype=np.uint8)
    crops[10:] = 1 + np.arange(kept, dtype=np.uint8)[:, None, None, None]
    np.save(tmp_path / "crops.npy", crops)
    samples = held_out_samples(tmp_path / "crops.npy", "bicubic", 4)
    assert [s.name for s in samples] == ["held-out01", "held-out02", "held-out03", "held-out04"]
    assert all(s.hq.min() > 0 for s in samples) and len({int(s.hq[0, 0, 0]) for s in samples}) == 4
    assert samples[0].lq.shape == (4, 4, 3)
