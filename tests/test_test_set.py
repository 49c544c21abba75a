from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from training.evaluation.test_set import (
    EvaluationError,
    TestPicture,
    check_sizes,
    find_pictures,
    match,
    read_picture,
    short_stem,
)


def save(path: Path, width: int = 8, height: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "grey").save(path)
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0801x4.png", "0801"),
        ("Canon_001_LR4.png", "Canon_001"),
        ("Canon_001_HR.png", "Canon_001"),
        ("panasonic_103_x1.png", "panasonic_103"),
        ("img_LR_x4.png", "img"),
        ("box.png", "box"),
        ("x4.png", "x4"),
        ("color.png", "color"),
    ],
)
def test_short_stems(name: str, expected: str) -> None:
    assert short_stem(Path(name)) == expected


def test_files_are_matched_by_exact_stems_first() -> None:
    wanted = [Path("lq/a_x1.png"), Path("lq/b.png")]
    assert match(wanted, [Path("a.png"), Path("a_x1.png"), Path("b_HR.jpg")], "") == [
        Path("a_x1.png"),
        Path("b_HR.jpg"),
    ]
    with pytest.raises(EvaluationError, match=r"b_HR\.png, b_x4\.png all match b\.png"):
        match(wanted[1:], [Path("b_HR.png"), Path("b_x4.png")], "")
    with pytest.raises(EvaluationError, match="have one stem"):
        match(wanted[1:], [Path("b.png"), Path("b.jpg")], "")


@pytest.mark.parametrize(
    ("lq", "hq"),
    [
        ("test_LR/p.png", "test_HR/p.png"),
        ("lq/p.png", "gt/p.png"),
        ("LQ/px4.png", "HQ/p.jpg"),
        ("lr/p_LR4.png", "HR/p_HR.png"),
        ("p_LR4.png", "p_HR.png"),
    ],
)
def test_layouts_of_test_sets(tmp_path: Path, lq: str, hq: str) -> None:
    picture = TestPicture("p", save(tmp_path / lq), save(tmp_path / hq, 32, 32))
    assert find_pictures(tmp_path) == [picture]


def test_a_list_of_pairs(tmp_path: Path) -> None:
    hq, lq = save(tmp_path / "big pictures" / "p.png", 32, 32), save(tmp_path / "small" / "p.png")
    (tmp_path / "pairs.txt").write_text("big pictures/p.png\tsmall/p.png\ta cat, a dog\n\n")
    assert find_pictures(tmp_path / "pairs.txt") == [TestPicture("p", lq, hq, "a cat, a dog")]
    (tmp_path / "pairs.txt").write_text("small/p.png small/q.png")
    with pytest.raises(EvaluationError, match=r"pairs\.txt: line 1: there is no file .*q\.png"):
        find_pictures(tmp_path / "pairs.txt")
    (tmp_path / "pairs.txt").write_text("small/p.png")
    with pytest.raises(EvaluationError, match=r"pairs\.txt: line 1: .* has no two paths"):
        find_pictures(tmp_path / "pairs.txt")
    (tmp_path / "pairs.txt").write_text("")
    with pytest.raises(EvaluationError, match="names no pictures"):
        find_pictures(tmp_path / "pairs.txt")


def test_folders_that_are_no_test_sets(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no such folder or file"):
        find_pictures(tmp_path / "nowhere")
    with pytest.raises(EvaluationError, match="has no pictures; accepted: .jpg"):
        find_pictures(tmp_path)
    save(tmp_path / "HR" / "p.png")
    with pytest.raises(EvaluationError, match="has HR/ but no low-quality folder"):
        find_pictures(tmp_path)
    save(tmp_path / "LR" / "p.png")
    save(tmp_path / "LQ" / "p.png")
    with pytest.raises(EvaluationError, match=r"has LQ, LR; accepted: one of them"):
        find_pictures(tmp_path)


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    pair = TestPicture("p", save(tmp_path / "l.png", 10, 8), save(tmp_path / "h.png", 40, 32))
    check_sizes([pair], 4)
    check_sizes([replace(pair, hq=save(tmp_path / "same.png", 10, 8)), replace(pair, hq=None)], 4)
    with pytest.raises(EvaluationError, match=r"h\.png is 40x32 pixels, .*l\.png 10x8; accepted: 20x16 \(x2\)"):
        check_sizes([pair], 2)
    (tmp_path / "h.png").write_bytes(b"no picture")
    with pytest.raises(EvaluationError, match=r"h\.png"):
        check_sizes([pair], 4)
    with pytest.raises(EvaluationError, match=r"h\.png"):
        read_picture(tmp_path / "h.png")
