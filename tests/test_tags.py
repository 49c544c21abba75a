"""`python -m training.tags`: texts beside pictures and lists with tags, resumed, and in two processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_tagger import CONFIG, write_tagger
from training_pictures import save_picture
from training_runs import environment

from tadsr.tagger_input import tagger_input
from tadsr.tagger_weights import TaggerWeights, load, save
from tadsr.tags import TagList, tags_text
from training.data.catalogue import read_catalogue
from training.data.pictures import scan_folder
from training.data.tagging import seen_of
from training.images import to_tensor
from training.tags import main

PICTURES = 5
SIDE = 64


@pytest.fixture(scope="module")
def dape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tagger whose thresholds lie among what it says of the test's pictures."""
    path = write_tagger(tmp_path_factory.mktemp("tagger") / "dape.safetensors")
    weights = load(path)
    folder = write_photographs(path.parent / "photographs")
    pictures = scan_folder(folder, sidecars=False).pictures
    seen = torch.cat([tagger_input(to_tensor(seen_of(p, "lq")), p.size, CONFIG.side) for p in pictures])
    middle = weights.network()(seen).sigmoid().median(dim=0).values
    save(path, replace(weights, tags=TagList(weights.tags.tags, tuple(middle.tolist()))))
    return path


def write_photographs(folder: Path) -> Path:
    for number in range(PICTURES):
        save_picture(folder / f"{number}.png", SIDE, SIDE, seed=number)
    return folder


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    return write_photographs(tmp_path / "photographs")


@pytest.fixture
def pairs(tmp_path: Path, photographs: Path) -> Path:
    """A list of pairs, the second of which has tags."""
    lines = []
    for number in range(PICTURES):
        lq = Image.open(photographs / f"{number}.png").resize((SIDE // 4, SIDE // 4))
        (tmp_path / "small pictures").mkdir(exist_ok=True)
        lq.save(tmp_path / "small pictures" / f"{number}.png")
        lines.append(f"photographs/{number}.png\tsmall pictures/{number}.png\t{'mine, only' if number == 1 else ''}")
    (tmp_path / "list.txt").write_text("\n".join(lines))
    return tmp_path / "list.txt"


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--workers", "0", "--batch", "2"])


def texts_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}


def expected_text(weights: TaggerWeights, image: np.ndarray, size: tuple[int, int] = (SIDE, SIDE)) -> str:
    logits = weights.network()(tagger_input(to_tensor(image), size, CONFIG.side))
    return tags_text(weights.tags.given(logits)[0])


@pytest.mark.parametrize("of", ["lq", "hq"])
def test_each_photograph_gets_the_tags_of_itself_or_of_its_degradation(photographs: Path, dape: Path, of: str) -> None:
    weights = load(dape)
    assert run("--data", photographs, "--dape", dape, "--of", of) == 0
    found = {}
    for number in range(PICTURES):
        photograph = np.asarray(Image.open(photographs / f"{number}.png").convert("RGB"))
        picture = scan_folder(photographs, sidecars=True).pictures[number]
        image = photograph if of == "hq" else seen_of(picture, "lq")
        assert image.shape == ((SIDE, SIDE, 3) if of == "hq" else (SIDE // 4, SIDE // 4, 3))
        found[f"{number}.txt"] = expected_text(weights, image) + "\n"
        assert picture.prompt == (found[f"{number}.txt"].strip() or None), "training must read it as the prompt"
    assert texts_of(photographs) == found
    assert len(set(found.values())) > 1, "the test's pictures must differ in their tags"


def test_a_degradation_depends_on_the_photograph_alone(photographs: Path) -> None:
    picture = scan_folder(photographs, sidecars=False).pictures[2]
    first = seen_of(picture, "lq")
    (photographs / "0.png").unlink()
    assert np.array_equal(seen_of(scan_folder(photographs, sidecars=False).pictures[1], "lq"), first)
    other = replace(picture, name="another name")
    assert not np.array_equal(seen_of(other, "lq"), first), "photographs must not all be degraded alike"


def test_a_list_gets_tags_where_it_has_none_and_trains(pairs: Path, dape: Path, tmp_path: Path) -> None:
    output = tmp_path / "elsewhere" / "tagged.txt"
    assert run("--data", pairs, "--dape", dape, "--output", output) == 0
    assert [path.name for path in output.parent.iterdir()] == ["tagged.txt"], "parts are left behind"
    tagged = read_catalogue(output, "auto", 4, "auto", tmp_path / "cache").pictures
    assert len(tagged) == PICTURES
    weights = load(dape)
    for number, picture in enumerate(tagged):
        lq = np.asarray(Image.open(pairs.parent / "small pictures" / f"{number}.png").convert("RGB"))
        expected = "mine, only" if number == 1 else expected_text(weights, lq)
        assert (picture.prompt or "") == expected
    beside = tmp_path / "tagged.txt"
    assert run("--data", pairs, "--dape", dape, "--output", beside) == 0
    assert beside.read_text().startswith(f"photographs/0.png\t{Path('small pictures')}/0.png\t")


def test_what_was_done_before_a_kill_is_kept(photographs: Path, pairs: Path, dape: Path, tmp_path: Path) -> None:
    (photographs / "3.txt").write_text("my own words")
    assert run("--data", photographs, "--dape", dape) == 0
    assert texts_of(photographs)["3.txt"] == "my own words" and len(texts_of(photographs)) == PICTURES
    output = tmp_path / "tagged.txt"
    key = [str(tmp_path / folder / "0.png") for folder in ("photographs", "small pictures")]
    part = tmp_path / "tagged.txt.part-7"  # of a run in more processes, killed while it wrote its second line
    part.write_text(f"\n{json.dumps([*key, 'kept'])}\n\n{json.dumps(key)[:-5]}", encoding="utf-8")
    assert run("--data", pairs, "--dape", dape, "--output", output) == 0
    lines = output.read_text().splitlines()
    assert len(lines) == PICTURES and lines[0].endswith("\tkept") and not part.exists()


def test_two_processes_write_what_one_writes(photographs: Path, pairs: Path, dape: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(photographs, tmp_path / "alone")
    assert run("--data", alone, "--dape", dape) == 0
    assert run("--data", pairs, "--dape", dape, "--output", tmp_path / "one.txt") == 0
    for arguments in (["--data", photographs], ["--data", pairs, "--output", tmp_path / "two.txt"]):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += ["-m", "training.tags", "--dape", str(dape), "--workers", "0", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
        assert done.returncode == 0, done.stderr[-3000:]
        assert "3/3" in done.stderr or "2/2" in done.stderr, f"the first process did not take its share: {done.stderr}"
    assert texts_of(photographs) == texts_of(alone)
    assert (tmp_path / "two.txt").read_text() == (tmp_path / "one.txt").read_text()


def test_a_damaged_picture_is_left_out_and_named(
    photographs: Path, dape: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (photographs / "2.png").read_bytes()
    (photographs / "2.png").write_bytes(whole[: len(whole) // 2])  # its header can be read
    (photographs / "4.png").write_text("no picture")
    Image.new("L", (3, 50)).save(photographs / "thin.png")
    assert run("--data", photographs, "--dape", dape) == 0
    assert set(texts_of(photographs)) == {"0.txt", "1.txt", "3.txt"}
    said = capsys.readouterr()
    assert all(f"left out: {name}" in said.err for name in ("2.png", "4.png", "thin.png"))
    assert "is 3x50 pixels; accepted: from 4x4" in said.err
    assert "tags beside 3 of 5 pictures" in said.out


def test_what_cannot_be_tagged_is_refused(
    photographs: Path, pairs: Path, dape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for data, more, message in (
        (tmp_path / "absent", [], "absent: there is no such folder or list"),
        (tmp_path / "empty", [], "empty has no JPEG, PNG or WebP pictures"),
        (photographs, ["--output", tmp_path / "out.txt"], "accepted for a folder: none"),
        (pairs, [], "--output is None; accepted for a list: another file"),
        (pairs, ["--output", pairs], "accepted for a list: another file"),
    ):
        assert run("--data", data, "--dape", dape, *more) == 1
        assert message in capsys.readouterr().err
    assert run("--data", photographs, "--dape", pairs) == 1
    assert "list.txt is not a safetensors file" in capsys.readouterr().err
