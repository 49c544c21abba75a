"""The contact sheet and the histograms of the degradation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_photograph import synthetic_photograph

from scripts import degradation_sheet
from training.degradation.apply import to_bytes


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photographs that a crop fits into, one of them of one colour, and one that is too small."""
    folder = tmp_path_factory.mktemp("photographs")
    small = Image.fromarray(to_bytes(synthetic_photograph(64, 64)))
    for number, size in enumerate([(600, 512), (512, 530), (700, 300)]):
        small.resize(size).save(folder / f"{number}.png")
    Image.new("RGB", (512, 512), "gray").save(folder / "gray.png")
    return folder


def test_command_writes_both_pictures_and_prints_the_percentiles(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    degradation_sheet.main(["--data", str(photographs), "-o", str(tmp_path / "new"), "--count", "6"])
    with Image.open(tmp_path / "new" / "degradation-sheet.jpg") as sheet:
        assert sheet.size == (1024, 128 + 2 * 256)
    with Image.open(tmp_path / "new" / "degradation-histograms.png") as histograms:
        assert np.asarray(histograms.convert("L")).std() > 10, "nothing is drawn"
    assert "| percentile of 6 crops | 5 | 25 | 50 | 75 | 95 |" in capsys.readouterr().out


def test_crops_are_those_of_the_seed(photographs: Path) -> None:
    pictures = degradation_sheet.large_pictures(photographs)
    assert [picture.name for picture in pictures] == ["0.png", "1.png", "gray.png"]
    first, again, other = (degradation_sheet.degraded_crops(pictures, n, seed) for n, seed in ((3, 1), (2, 1), (1, 2)))
    for one, two in zip(first[:2], again, strict=True):
        np.testing.assert_array_equal(one.lq, two.lq)
        assert one.psnr == two.psnr
    assert (first[0].lq != other[0].lq).any()
    assert sum(np.isnan(crop.sharpness) for crop in first) == 1, "only the gray picture has no sharpness"
    psnr, ratio = degradation_sheet.measures(first)
    assert (len(psnr), len(ratio)) == (3, 2)


def test_sharpness_is_the_variance_of_the_laplacian_of_luma() -> None:
    """Columns of alternating black and white: the Laplacian of luma is -2 and 2 times 219/255 within."""
    stripes = torch.zeros(1, 3, 400, 400)
    stripes[..., ::2] = 1
    assert degradation_sheet.sharpness(stripes) == pytest.approx((2 * 219 / 255) ** 2, rel=0.01)


def test_folders_without_large_photographs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (500, 600)).save(tmp_path / "small.png")
    with pytest.raises(SystemExit):
        degradation_sheet.main(["--data", str(tmp_path), "-o", str(tmp_path)])
    assert "1 pictures, all smaller than the crop of 512x512" in capsys.readouterr().err
