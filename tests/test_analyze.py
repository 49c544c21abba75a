from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nearly import assert_nearly, differ
from PIL import Image
from safetensors.torch import save_file

from training.analyze import (
    distillation,
    gradients,
    latents,
    load_scores,
    main,
    mean_and_deviation,
    predictions,
    principal_components,
)
from training.config.train_config import TrainConfig, as_saved
from training.evaluate import Sample, read_sample
from training.evaluation.figures import Point, draw_curve, draw_scatter, draw_sheet, draw_statistics
from training.evaluation.test_set import find_pictures
from training.networks.base import load_base
from training.networks.inference import Restorer
from training.networks.teacher import Teacher
from training.run.checkpoint import CheckpointError, Checkpoints

SIDE = 16  # of the low-quality crops


@pytest.fixture(scope="module")
def base(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as a base, with embeddings of both prompts beside it."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copy(repository / "weights" / "tadsr-mini.safetensors", folder / "mini.safetensors")
    prompt = load_base(folder / "mini.safetensors").prompt
    assert prompt is not None
    save_file({"good": prompt[0], "bad": prompt[0].flip(0).contiguous()}, folder / "prompts.safetensors")
    return folder / "mini.safetensors"


@pytest.fixture(scope="module")
def config(base: Path) -> TrainConfig:
    return TrainConfig(
        data=base.parent, base=base, output=base.parent / "run", prompt="good", negative_prompt="bad", rank=2
    )


@pytest.fixture(scope="module")
def teacher(base: Path, config: TrainConfig) -> Teacher:
    """A teacher whose fake score has learned something."""
    teacher = Teacher(load_base(base).unet, rank=config.rank, alpha=config.alpha)
    generator = torch.Generator().manual_seed(0)
    for parameter in teacher.trainable().values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return teacher.eval()


@pytest.fixture(scope="module")
def checkpoint(config: TrainConfig, teacher: Teacher) -> Path:
    tensors = {f"fake_score.{name}": parameter.detach() for name, parameter in teacher.trainable().items()}
    return Checkpoints(config.output / "checkpoints", keep=1).save(7, tensors, {"config": as_saved(config)})


@pytest.fixture(scope="module")
def data(photo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for index in range(3):
        left = 30 + 60 * index
        Image.open(photo).crop((left, 50, left + SIDE + 1, 51 + SIDE)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def samples(data: Path) -> list[Sample]:
    return [read_sample(picture, crop=SIDE) for picture in find_pictures(data)]


@pytest.fixture(scope="module")
def restorer(base: Path) -> Restorer:
    return Restorer.load(base)


def is_drawn(path: Path) -> bool:
    """Returns whether the picture is more than a blank sheet."""
    return np.asarray(Image.open(path).convert("L")).std() > 5


def test_latents_come_from_the_encoder_at_their_timestep(restorer: Restorer, samples: list[Sample]) -> None:
    z = latents(restorer, samples, [100, 900])
    side = 4 * SIDE // restorer.encoder.downscale
    assert z.shape == (2, 3, restorer.unet.config["in_channels"], side, side)
    assert_nearly(z[1, 2], restorer.latent(samples[2].lq, 900)[0])
    assert differ(z[0], z[1])


def test_mean_and_deviation_of_known_numbers() -> None:
    values = torch.tensor([[[1.0, 3.0], [2.0, 2.0]], [[0.0, 8.0], [-1.0, 1.0]], [[5.0, 5.0], [0.0, 1.0]]])
    mean, deviation = mean_and_deviation(values)
    assert mean.tolist() == [[2, 2], [4, 0], [5, 0.5]]
    assert deviation.tolist() == [[1, 0], [4, 1], [0, 0.5]]


def test_principal_components_find_the_directions_of_a_known_cloud() -> None:
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((30, 2)))[0].T
    amounts = rng.standard_normal((200, 2)) * (5, 1)
    coordinates, shares = principal_components(torch.from_numpy(amounts @ directions + 3))
    centred = amounts - amounts.mean(axis=0)
    variances, axes = np.linalg.eigh(np.cov(centred.T))
    assert shares == pytest.approx((variances[::-1] / variances.sum()).tolist())
    assert np.abs(coordinates) == pytest.approx(np.abs(centred @ axes[:, ::-1]))
    assert all(column[np.abs(column).argmax()] > 0 for column in coordinates.T)


def test_scores_of_a_checkpoint_are_those_of_the_training(checkpoint: Path, base: Path, teacher: Teacher) -> None:
    scores = load_scores(checkpoint)
    channels = load_base(base).unet.config["in_channels"]
    z, timestep = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([300])
    with torch.no_grad():
        fake = scores.teacher(z, timestep, scores.context)
        assert_nearly(fake, teacher(z, timestep, scores.context))
        assert_nearly(scores.teacher.teach(z, timestep, scores.context), teacher.teach(z, timestep, scores.context))
    assert not torch.allclose(fake, teacher.teach(z, timestep, scores.context), atol=1e-3)
    prompt = load_base(base).prompt
    assert prompt is not None and torch.equal(scores.context, prompt)
    assert torch.equal(scores.negative, prompt.flip(1)), "the negative prompt is not the unconditional branch's"


def test_checkpoints_that_have_no_fake_score(checkpoint: Path, config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"accepted: a folder RUN/checkpoints/step-"):
        load_scores(checkpoint.parent)
    state = {"config": as_saved(config) | {"distillation": "none"}}
    plain = Checkpoints(tmp_path, keep=1).save(3, {"student.x": torch.zeros(1)}, state)
    with pytest.raises(CheckpointError, match="trained without distillation"):
        load_scores(plain)


def test_gradients_by_timestep_share_their_noise(restorer: Restorer, checkpoint: Path, samples: list[Sample]) -> None:
    scores = load_scores(checkpoint)
    clean = [restorer.clean_latent(restorer.latent(s.lq, 500), 500) for s in samples[:2]]
    found = gradients(scores, clean, [200, 800])
    assert found.shape == (2, 2, *clean[0].shape[1:])
    assert_nearly(found, gradients(scores, clean, [800, 200]).flip(0), within=1e-4)  # divided by a small weight
    one = distillation(scores, clean[1], 800, 1)
    expected = (one.x0_fake - one.x0_real) / (clean[1] - one.x0_real).abs().mean()
    assert found[1, 1].numpy() == pytest.approx(expected[0].numpy(), abs=1e-5)
    shown = predictions(restorer, scores, clean[0], [200, 800])
    side = 4 * SIDE
    assert list(shown) == ["teacher", "fake score"] and all(p.shape == (2, side, side, 3) for p in shown.values())
    decoded = restorer.decode(distillation(scores, clean[0], 800, 0).x0_fake)[0].permute(1, 2, 0).numpy()
    assert shown["fake score"][1] == pytest.approx(decoded, abs=1e-4)


def test_the_command_draws_both_figures(
    base: Path, data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--weights", str(base), "--data", str(data), "--crop", str(SIDE), "--timesteps", "900,100,500"]
    common += ["--device", "cpu", "--limit", "2", "--output"]
    assert main([*common, str(tmp_path / "both"), "--checkpoint", str(checkpoint)]) == 0
    assert "left out" not in capsys.readouterr().out
    names = {"latent.png", "latent-pca.png", "gradient.png", "predictions.png"}
    assert {path.name for path in (tmp_path / "both").iterdir()} == names
    assert all(is_drawn(path) for path in (tmp_path / "both").iterdir())
    assert main([*common, str(tmp_path / "one")]) == 0
    assert "left out: figure 4" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"latent.png", "latent-pca.png"}
    assert main([*common, str(tmp_path / "none"), "--crop", "99"]) == 1
    assert "accepted with --crop: sides from 99" in capsys.readouterr().err
    assert main([*common, str(tmp_path / "none"), "--timesteps", "500"]) == 1
    assert "two or more" in capsys.readouterr().err


def test_figures_from_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points = [Point("w t=1", 1, 25.0, 0.4), Point("w t=9", 9, 24.0, 0.3), Point("other", None, 24.5, 0.35)]
    for higher in (True, False):
        draw_curve(tmp_path / f"curve-{higher}.png", points, "PSNR", "metric", higher)
    up, down = (np.asarray(Image.open(tmp_path / f"curve-{higher}.png")) for higher in (True, False))
    assert up.shape == down.shape and not np.array_equal(up, down), "lower-is-better does not turn the axis"
    draw_statistics(tmp_path / "s.png", [1, 5, 9], rng.random((3, 4)), rng.random((3, 4)), what="z", axis="t")
    draw_scatter(tmp_path / "p.png", [1, 5, 9], rng.random((3, 4, 2)), [0.7, 0.2], "z")
    assert all(is_drawn(tmp_path / name) for name in ("curve-True.png", "s.png", "p.png"))


def test_sheets_show_pictures_and_labels(tmp_path: Path) -> None:
    rows = [("a", np.zeros((2, 8, 8, 3))), ("b", np.full((2, 8, 8, 3), (1.0, 0, 0)))]

    def drawn(*labels: str) -> np.ndarray:
        named = [(label, pictures) for label, (_, pictures) in zip(labels[:2], rows, strict=True)]
        draw_sheet(tmp_path / "sheet.png", named, labels[2:])
        return np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))

    sheet = drawn("a", "b", "t = 1", "t = 5")
    assert (sheet == (255, 0, 0)).all(axis=2).mean() == pytest.approx((sheet == 0).all(axis=2).mean(), rel=0.05)
    for labels in (("x", "b", "t = 1", "t = 5"), ("a", "x", "t = 1", "t = 5"), ("a", "b", "x", "t = 5")):
        assert not np.array_equal(drawn(*labels), sheet), f"a label of {labels} does not show"
