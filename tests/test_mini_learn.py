"""The training of the bundled model in latent space and in pixels, and what sees a lattice."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.lattice import MOST_LATTICE, comb, lattice
from training.images import to_tensor
from training.mini.batches import Batches
from training.mini.learn import lattice_shares, parser, teacher_share, train, weave
from training.mini.patches import fit_patches
from training.mini.samples import PATCHES, open_arrays, write_samples

COUNT = 8


@pytest.fixture(scope="module")
def photograph(repository: Path) -> np.ndarray:
    """A photograph, uint8 (H, W, 3), sides of 256 or more."""
    return np.array(Image.open(repository / "assets" / "sample_hq.webp").convert("RGB"))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, photograph: np.ndarray) -> Path:
    """A folder of samples, half of them with a teacher's picture: the photograph, upside down to be told apart."""
    folder = tmp_path_factory.mktemp("samples")
    crops = np.stack([photograph[y : y + 256, x : x + 256] for y in (0, 64) for x in (0, 64)])
    arrays = open_arrays(folder, COUNT, writable=True)
    write_samples(arrays, crops, range(COUNT))
    arrays["teacher"][: COUNT // 2] = arrays["hq"][: COUNT // 2, ::-1]
    arrays["done"][: COUNT // 2] = 1
    fit_patches(crops).save(folder / PATCHES)
    return folder


def options(samples: Path, output: Path, *more: str) -> Namespace:
    sizes = ("--steps", "3", "--batch", "2", "--crop", "64")
    return parser().parse_args(["--samples", str(samples), "--output", str(output), *sizes, *more])


def test_a_stopped_run_goes_on_to_the_same_weights(samples: Path, tmp_path: Path) -> None:
    whole = train(options(samples, tmp_path / "whole"))
    train(options(samples, tmp_path / "stopped"), stop=lambda step: step == 2)
    resumed = train(options(samples, tmp_path / "stopped"))
    assert resumed.step == 3
    for a, b in zip(whole.average.parameters(), resumed.average.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_pixels_add_lpips_and_the_lattice(samples: Path, tmp_path: Path) -> None:
    first = train(options(samples, tmp_path / "first"))
    more = ("--start", str(tmp_path / "first"), "--lpips", "1", "--lattice", "0.1")
    second = train(options(samples, tmp_path / "second", *more), stop=lambda step: step == 1)
    assert (second.step, first.step) == (1, 3)
    start = dict(first.average.named_parameters())
    moved = [(p - start[name]).abs().max().item() for name, p in second.network.named_parameters()]
    assert 0 < max(moved) < 0.01, "it begins with the averaged weights of the first run"


def test_a_batch_pairs_what_belongs_together(samples: Path) -> None:
    batch = Batches(samples, side=128, other_scale=0.0, shifted=1.0, untaught=0.5, device=torch.device("cpu")).draw(
        16, np.random.default_rng(0)
    )
    assert batch.lq.shape == batch.photograph.shape == batch.teacher.shape == (16, 3, 128, 128)
    blurred = torch.nn.functional.avg_pool2d
    near = (blurred(batch.lq, 16) - blurred(batch.photograph, 16)).abs().mean()
    far = (blurred(batch.lq, 16) - blurred(batch.photograph.roll(1, 0), 16)).abs().mean()
    assert near < 0.5 * far, "an enlarged input shows its own photograph"
    same = (batch.teacher == batch.photograph).flatten(1).all(dim=1)
    assert 0 < same.sum() < 16, "without a teacher's picture the photograph stands for it"


def test_low_timesteps_learn_the_photograph_and_high_ones_the_teacher() -> None:
    assert teacher_share(torch.tensor([1, 100, 500, 900, 999])).tolist() == pytest.approx([0, 0, 0.5, 1, 1])


def test_a_weave_is_what_repeats_from_patch_to_patch() -> None:
    torch.manual_seed(0)
    one = torch.randn(1, 3, 4, 4)
    repeated = one.repeat(1, 1, 16, 16)
    expected = (one - one.mean(dim=(2, 3), keepdim=True)).abs().mean()
    assert weave(repeated) == pytest.approx(expected.item(), rel=1e-4)
    assert weave(torch.randn(1, 3, 64, 64)) < 0.2 * expected
    assert weave(torch.full((1, 3, 64, 64), 0.5)) == pytest.approx(0, abs=1e-6)


def test_a_lattice_is_seen_where_the_eye_sees_one(photograph: np.ndarray) -> None:
    small = Image.fromarray(photograph[:256, :256]).resize((64, 64), Image.Resampling.BICUBIC)
    squares = np.array(small.resize((256, 256), Image.Resampling.NEAREST))
    lanczos = np.array(small.resize((256, 256), Image.Resampling.LANCZOS))
    assert lattice(photograph) < MOST_LATTICE < lattice(lanczos) < lattice(squares)
    assert comb(photograph) < comb(lanczos)
    assert lattice(np.full((64, 64, 3), 90, np.uint8)) == 1, "a flat picture has none"
    assert np.isnan(comb(photograph[:40, :40]))
    shares = lattice_shares(torch.cat([to_tensor(p[:256, :256]) * 2 - 1 for p in (photograph, squares)]))
    assert shares.shape == (2, 2, 4)
    assert shares[0].max() < 1.2 and shares[1].max() > 1.5


def test_a_discriminator_learns_beside_the_network(samples: Path, tmp_path: Path) -> None:
    more = ("--lpips", "1", "--lattice", "0.1", "--adversarial", "0.5")
    plain = train(options(samples, tmp_path / "plain", *more[:4]))
    run = train(options(samples, tmp_path / "run", *more))
    moved = [
        (a - b).abs().max().item() for a, b in zip(plain.network.parameters(), run.network.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 0.01, "the discriminator pulls at the network"


def test_a_run_of_minutes_ends_by_time(samples: Path, tmp_path: Path) -> None:
    run = train(options(samples, tmp_path, "--minutes", "0.01"))
    assert run.seconds >= 0.6 and run.progress >= 1
    assert train(options(samples, tmp_path, "--minutes", "0.01")).step == run.step, "it is at its end"
