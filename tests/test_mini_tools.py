"""Around the small model's training: shards of crops, the ablations' settings, and the look at a teacher."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import ablations, teacher
from scripts.crop_shards import write_shards
from training.config.train_config import PRESETS, load_config
from training.data import open_training_set
from training.data.prompts import PromptBook
from training.mini.base import write_base
from training.mini.networks import CONTEXT_TOKENS, CONTEXT_WIDTH, MiniStudent
from training.mini.start import follow_timestep
from training.mini.teacher import DEGRADED, PHOTOGRAPH
from training.networks.inference import Restorer


def smooth(count: int, side: int) -> np.ndarray:
    ramp = np.linspace(0, 200, side)
    picture = np.stack([np.add.outer(ramp, ramp) / 2, np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side))], -1)
    return np.stack([picture + 10 * number for number in range(count)]).astype(np.uint8)


def test_shards_of_crops_can_be_trained_on(tmp_path: Path) -> None:
    crops = smooth(5, 64)
    paths = write_shards(crops, tmp_path / "shards", per_shard=2, quality=95)
    assert [path.name for path in paths] == ["shard-0000.tar", "shard-0001.tar", "shard-0002.tar"]
    data = open_training_set(
        tmp_path / "shards",
        **{"data_format": "auto", "crop": 64, "scale": 4, "flip": 0.0, "seed": 0, "prompts": "fixed", "prompt": "p"},
        **{"plain_bicubic_share": 1.0, "light_share": 0.0, "held_out": 1, "cache": tmp_path / "cache"},
    )
    assert data.epoch_length == 4, "the last picture is held out"
    held = (data.validation[0].hq.permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(held - crops[-1]).mean() < 3, "WebP of quality 95 is near the crop"


@pytest.mark.parametrize("row", ablations.ROWS)
def test_the_ablations_differ_as_the_paper_s_do(row: str) -> None:
    config = load_config(PRESETS / "mini.yaml", ablations.ROWS[row], data=Path("d"), base=Path("b"), output=Path("o"))
    expected = {
        "full": (True, "tavsd"),
        "without-tae": (False, "tavsd"),
        "without-tavsd": (True, "vsd"),
        "baseline": (False, "vsd"),
        "no-distillation": (True, "none"),
    }
    assert (config.time_aware, config.distillation) == expected[row]


def test_an_unknown_row_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    paths = ["--data", "d", "--base", "b", "--output", "o"]
    monkeypatch.setattr(sys, "argv", ["ablations", *paths, "--rows", "full,nothing"])
    assert ablations.main() == 1
    assert "'full,nothing'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained base that knows the teacher's prompts."""
    torch.manual_seed(0)
    networks = MiniStudent()
    follow_timestep(networks.encoder)
    torch.nn.init.normal_(networks.unet.conv_out.weight, std=0.01)
    prompts = {text: torch.randn(CONTEXT_TOKENS, CONTEXT_WIDTH) for text in (PHOTOGRAPH, DEGRADED)}
    return write_base(tmp_path_factory.mktemp("base"), networks, prompts)


def test_a_teacher_is_looked_at(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "SAMPLE_STEPS", 2)
    monkeypatch.setattr(teacher, "SAMPLE_SIDE", 16)
    networks = Restorer.load(base)
    prompts = PromptBook.build([PHOTOGRAPH, DEGRADED], base, None, tmp_path)
    picture = torch.from_numpy(smooth(1, 64)[0]).permute(2, 0, 1)[None].float() / 255
    again = teacher.reconstruct(networks, picture)
    error = (again - picture)[..., 8:-8, 8:-8]  # the networks pad with zeros
    assert -10 * torch.log10(error.square().mean()) > 30, "the start is an autoencoder"
    generator = torch.Generator().manual_seed(0)
    shown = teacher.predictions(networks, prompts, picture, 1.5, generator)
    assert len(shown) == 3 * len(teacher.PREDICTED)
    noise = [(noisy - again).abs().mean().item() for noisy in shown[::3]]
    assert noise == sorted(noise), "later timesteps are noisier"
    drawn = [
        teacher.draw(networks, prompts, PHOTOGRAPH, guidance, torch.Generator().manual_seed(1))
        for guidance in (1.0, 5.0)
    ]
    assert drawn[0].shape == (1, 3, 64, 64) and not torch.equal(*drawn), "guidance matters"
    teacher.write_sheet(tmp_path / "sheet.png", [shown[:3], shown[3:6]])
    assert (tmp_path / "sheet.png").stat().st_size > 1000
