from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.testset import (
    COUNT,
    DIGESTS,
    Sample,
    digest,
    load_photographs,
    make_test_set,
    write_test_set,
)
from scripts import fetch_photos

# Standard deviation of each low-quality image of `realesrgan`. They tell another degradation or seed from another
# rounding of single pixels, which versions and processors may have.
REALESRGAN_DEVIATIONS = (
    *(36.19, 51.68, 47.44, 39.34, 46.14, 52.56, 35.75, 54.64, 42.14, 45.86, 41.90, 53.96),
    *(45.35, 47.63, 64.18, 40.91, 49.35, 40.87, 47.84, 83.98, 43.63, 51.35, 54.72, 39.38),
)


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    try:
        return load_photographs()
    except FileNotFoundError:
        if fetch_photos.main(["--test"]) != 0:
            pytest.skip("needs the 24 Kodak photographs, which could not be fetched (see the captured output)")
        return load_photographs()


@pytest.fixture(scope="module", params=["bicubic", "realesrgan"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def samples(kind: str, photographs: list[np.ndarray]) -> list[Sample]:
    return make_test_set(kind, photographs)


def test_samples_are_in_order_and_of_the_right_size(samples: list[Sample], photographs: list[np.ndarray]) -> None:
    assert [sample.name for sample in samples] == [f"kodim{number:02d}" for number in range(1, COUNT + 1)]
    for sample, photograph in zip(samples, photographs, strict=True):
        assert sample.hq is photograph
        assert (sample.hq.shape, sample.lq.shape) == ((384, 512, 3), (96, 128, 3))
        assert sample.hq.dtype == sample.lq.dtype == np.uint8


def test_test_set_is_the_same_each_time(kind: str, samples: list[Sample], photographs: list[np.ndarray]) -> None:
    assert digest(make_test_set(kind, photographs)) == digest(samples)


def test_bicubic_images_are_those_of_the_published_figures(photographs: list[np.ndarray]) -> None:
    found = digest(make_test_set("bicubic", photographs))
    assert found == DIGESTS["bicubic"], "the photographs or Pillow's bicubic changed: published figures do not compare"


def test_realesrgan_images_are_those_of_the_published_figures(photographs: list[np.ndarray]) -> None:
    deviations = [sample.lq.std() for sample in make_test_set("realesrgan", photographs)]
    message = "the degradation or its seeds changed: measure all published figures again, then update these"
    np.testing.assert_allclose(deviations, REALESRGAN_DEVIATIONS, atol=0.05, err_msg=message)


def test_written_images_are_the_samples(samples: list[Sample], tmp_path: Path) -> None:
    write_test_set(samples[:3], tmp_path / "new" / "folder")
    for sample in samples[:3]:
        with Image.open(tmp_path / "new" / "folder" / f"{sample.name}.png") as written:
            np.testing.assert_array_equal(np.asarray(written), sample.lq)


def test_larger_photographs_are_cut_at_the_centre(tmp_path: Path) -> None:
    larger = np.zeros((768, 512, 3), dtype=np.uint8)
    larger[192:576] = 200
    for number in range(1, COUNT + 1):
        Image.fromarray(larger).save(tmp_path / f"kodim{number:02d}.png", compress_level=1)
    assert all((photograph == 200).all() for photograph in load_photographs(tmp_path))


def test_missing_and_small_photographs_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"24 of 24 .*kodim01\.png.*fetch_photos"):
        load_photographs(tmp_path)
    for number in range(1, COUNT + 1):
        Image.new("RGB", (511, 384)).save(tmp_path / f"kodim{number:02d}.png")
    with pytest.raises(ValueError, match=r"kodim01\.png is 511x384"):
        load_photographs(tmp_path)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'lanczos'.*bicubic, realesrgan"):
        make_test_set("lanczos", [])
