"""Tar shards: packing, the index, foreign and broken ones."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from training_pictures import open_set, same, save_picture

from training.data import DataError, shards
from training.data.shards import pack, read_index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(["a.png", "b.two.JPG", "c/d.webp", "c/e.jpeg", "f.png"]):
        save_picture(tmp_path / "data" / name, seed=seed)
    (tmp_path / "data" / "a.txt").write_text("a prompt, with ü")
    return tmp_path / "data"


def test_shards_give_the_samples_of_the_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.png").write_bytes(b"nothing")
    command = ["shards", "--data", str(folder), "--output", str(tmp_path / "shards"), "--per-shard", "2"]
    monkeypatch.setattr(sys, "argv", command)
    shards.main()
    printed = capsys.readouterr().out
    assert "left out: broken.png" in printed and "3 shards" in printed
    loose, packed = (open_set(place, tmp_path / "cache", held_out=1) for place in (folder, tmp_path / "shards"))
    assert packed.texts == loose.texts == ["a prompt, with ü", "clean"]
    assert packed.names[1] == "shard-000000/00000001-b_two" and not packed.skipped
    for index in range(10):
        first, second = loose[index], packed[index]
        assert torch.equal(first.lq, second.lq) and torch.equal(first.hq, second.hq) and first.prompt == second.prompt
    with pytest.raises(SystemExit):
        shards.main()
    assert "has shards already" in capsys.readouterr().err
    one = open_set(tmp_path / "shards" / "shard-000001.tar", tmp_path / "cache", held_out=0)
    assert one.names == ["shard-000001/00000002-d", "shard-000001/00000003-e"]


def test_the_index_is_kept_until_the_shard_changes(folder: Path, tmp_path: Path) -> None:
    shard = pack(folder, tmp_path / "shards")[0][0]
    cache = tmp_path / "cache"
    index = read_index(shard, cache)
    (kept,) = (cache / "shards").iterdir()
    content = json.loads(kept.read_text())
    content["members"] = content["members"][:1]  # a mark: is this file what is read?
    kept.write_text(json.dumps(content))
    assert len(read_index(shard, cache).members) == 1
    for damaged in ("{", "[]", '{"format": 0}', json.dumps({**content, "members": [{"key": 1}]})):
        kept.write_text(damaged)
        assert read_index(shard, cache) == index
    kept.write_text(json.dumps(content))
    with tarfile.open(shard, "a") as tar:
        tar.add(folder / "f.png", "new.png")
    assert len(read_index(shard, cache).members) == len(index.members) + 1


def test_foreign_shards(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cls.json").write_text("{}")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "x.tar", "w") as tar:
        for file, name in [
            (folder / "a.txt", "./in/one.txt"),  # the prompt before its picture
            (tmp_path / "cls.json", "./in/one.json"),
            (folder / "a.png", "./in/one.PNG"),
            (folder / "c" / "d.webp", "two.webp"),
            (folder / "f.png", "two.png"),
            (folder / "a.png", "two.mask.png"),
        ]:
            tar.add(file, name)
        tar.add(folder / "c", "c", recursive=False)
    data = open_set(tmp_path / "shards", tmp_path / "cache", held_out=0)
    assert data.names == ["x/./in/one", "x/two"] and data.texts == ["a prompt, with ü", "clean"]
    assert [skipped.reason for skipped in data.skipped] == ["is a second picture of the sample two"]


def test_broken_shards_and_members_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "g.png").write_bytes(b"nothing")
    place = tmp_path / "shards"
    place.mkdir()
    for name in ("cut.tar", "whole.tar"):
        with tarfile.open(place / name, "w") as tar:
            for file in ("a.png", "f.png", "g.png"):
                tar.add(folder / file, file)
    with tarfile.open(place / "whole.tar") as tar:
        places = {entry.name: entry for entry in tar.getmembers()}
    (place / "none.tar").write_bytes(b"x" * 2000)
    (place / "zero.tar").touch()
    whole = (place / "whole.tar").read_bytes()
    second = places["f.png"]
    damaged = bytearray(whole)
    damaged[second.offset + 10] ^= 255  # its header no longer has the right sum
    in_picture, in_header = whole[: second.offset_data + 100], whole[: second.offset + 100]
    for number, content in enumerate([in_picture, in_header, whole[: second.offset], bytes(damaged)]):
        (place / "cut.tar").write_bytes(content)
        data = open_set(place, tmp_path / f"cache{number}", held_out=0)
        assert set(data.names) == {"whole/a", "whole/f", "cut/a"}
        reasons = "\n".join(map(str, data.skipped))
        assert "whole.tar/g.png" in reasons and "none.tar" in reasons and "zero.tar" in reasons
        assert "cut.tar: is broken" in reasons, reasons
        assert ("cut.tar/f.png: is cut off" in reasons) == (content is in_picture)


def test_shards_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    packed = pack(folder, tmp_path / "shards")[0]
    with pytest.raises(DataError, match=r"has no \.tar files"):
        open_set(folder, tmp_path, data_format="shards")
    (tmp_path / "shards" / "x.png").write_bytes((folder / "a.png").read_bytes())
    with pytest.raises(DataError, match="1 .tar files and 1 pictures: say which"):
        open_set(tmp_path / "shards", tmp_path)
    assert open_set(tmp_path / "shards", tmp_path, data_format="shards", held_out=0).epoch_length == 5
    assert same(open_set(tmp_path / "shards", tmp_path, data_format="shards")[0], open_set(packed[0], tmp_path)[0])
    packed[0].write_bytes(b"")
    with pytest.raises(DataError, match="none of the 1 shards has a .* picture that can be read"):
        open_set(packed[0], tmp_path)
    with pytest.raises(DataError, match="accepted: 1 and more"):
        pack(folder, tmp_path / "again", 0)
