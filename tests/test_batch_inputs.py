"""What a batch does, without a server: finding pictures, sharing them out, and the record of results."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from host.batch import BatchOptions
from host.batch.board import TRIES, Board, Task
from host.batch.frames import recolored, statistics
from host.batch.inputs import Failure, Item, find_inputs, shown
from host.batch.manifest import NAME, PART_PREFIX, Entry, Manifest, file_digest, settings_digest
from host.carrier import carrier, node_named, read_workflow, with_settings
from host.errors import HostError
from host.workflow import UPSCALE_WORKFLOW, load_workflow


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# --- inputs


def test_a_folder_s_tree_is_the_output_s(tmp_path: Path) -> None:
    names = ["frame10.png", "frame2.png", "b/c/d.JPG", "b/notes.md", "out/old.png"]
    touch(*(tmp_path / name for name in names))
    found = find_inputs([tmp_path], tmp_path / "out", ".webp")
    assert [item.output for item in found.items] == ["frame2.webp", "frame10.webp", "b/c/d.webp"]
    assert found.ignored == 1 and not found.failures, "the output folder is no input, and notes are no picture"


def test_a_list_keeps_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "a/b.png", tmp_path / "c.png", tmp_path / "new\nline.png")
    (tmp_path / "list.txt").write_text(f"a/b.png\n\n{tmp_path}/c.png\n./a/../gone.png\n")
    found = find_inputs([Path("list.txt")], tmp_path / "out", ".png")
    assert [item.output for item in found.items] == ["a/b.png", "c.png"]
    assert [str(failure) for failure in found.failures] == ["gone.png is not there"]
    (tmp_path / "nul.lst").write_bytes(b"a/b.png\0new\nline.png\0")
    assert [item.output for item in find_inputs([Path("nul.lst")], tmp_path / "out", ".png").items][
        1
    ] == "new\nline.png"


def test_two_inputs_of_one_output_are_told(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg", tmp_path / "a.png")
    found = find_inputs([tmp_path], tmp_path / "out", ".png")
    assert [item.name for item in found.items] == ["a.jpg"]
    assert "would be written to a.png" in found.failures[0].reason and "--keep-suffix" in found.failures[0].reason
    both = find_inputs([tmp_path], tmp_path / "out", ".png", keep_suffix=True)
    assert [item.output for item in both.items] == ["a.jpg.png", "a.png.png"]


def test_a_video_names_the_commands_that_split_and_join_it(tmp_path: Path) -> None:
    touch(tmp_path / "film.mp4")
    (failure,) = find_inputs([tmp_path], tmp_path / "out", ".png").failures
    assert "ffmpeg -i VIDEO frames/%06d.png" in str(failure) and "-framerate 25 -i OUTPUT/%06d.png" in str(failure)


@pytest.mark.parametrize(
    ("names", "given", "output", "message"),
    [
        ([], ".", "out", "there is no picture in"),
        (["a.doc"], ".", "out", r"\(1 other files\)"),
        (["a.png"], ".", ".", "the output folder .* is the input folder"),
        (["a.png"], "b.png", "out", "there is no file or folder"),
    ],
)
def test_wrong_inputs_are_one_sentence(tmp_path: Path, names: list[str], given: str, output: str, message: str) -> None:
    touch(*(tmp_path / name for name in names))
    with pytest.raises(HostError, match=message):
        find_inputs([tmp_path / given], tmp_path / output, ".png")


def test_a_name_that_gets_too_long_and_a_link_to_nothing_are_told(tmp_path: Path) -> None:
    touch(tmp_path / ("a" * 251 + ".png"))
    (tmp_path / "link.png").symlink_to(tmp_path / "nothing")
    found = find_inputs([tmp_path], tmp_path / "out", ".webp")
    assert [failure.reason for failure in found.failures] == [
        "would get a name of more than 255 bytes: shorten it",
        "is no regular file",
    ]


def test_names_are_shown_on_one_line() -> None:
    assert shown("a\nb\udcff.png") == r"a\nb\udcff.png"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"format": "gif"}, "'gif' is none of png, jpg, webp"),
        ({"quality": 0}, "quality 0 is not in 1..100"),
        ({"in_flight": 0}, "in_flight is 0"),
        ({"ray": "", "servers": ["http://a"]}, "choose one"),
    ],
)
def test_wrong_options_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(HostError, match=message):
        BatchOptions(**wrong)


# --- workflows


def test_the_carrying_nodes_are_found_or_named() -> None:
    prompt = load_workflow()
    assert carrier(prompt).load == "1" and carrier(prompt).save == "4"
    assert node_named(prompt, "Upscale with TADSR") == node_named(prompt, "TADSRUpscale") == "3"
    two = {**prompt, "9": prompt["1"]}
    with pytest.raises(HostError, match=r"2 LoadImage nodes \(1, 9\): name one with --input-node"):
        carrier(two)
    assert carrier(two, load="9").load == "9"
    with pytest.raises(HostError, match="no LoadImage node"):
        carrier({name: node for name, node in prompt.items() if name != "1"})
    with pytest.raises(HostError, match="has no input image, and cannot carry"):
        carrier(prompt, load="2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"nodes": [], "links": []}', r"export it with Workflow > Export \(API\)"),
        ("[1]", "is not a workflow in API format"),
        ("{}", "is not a workflow in API format"),
    ],
)
def test_a_file_that_is_no_workflow_is_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(HostError, match=message):
        read_workflow(tmp_path / "w.json")


def test_settings_are_read_as_json_or_text() -> None:
    changed = with_settings(load_workflow(), ["3.timestep=7", "TADSRUpscale.color_match=wavelet"])
    assert changed["3"]["inputs"]["timestep"] == 7 and changed["3"]["inputs"]["color_match"] == "wavelet"
    with pytest.raises(HostError, match="not of the form NODE.INPUT=VALUE"):
        with_settings(load_workflow(), ["timestep=7"])
    with pytest.raises(HostError, match="'nobody' names 0 nodes"):
        with_settings(load_workflow(), ["nobody.timestep=7"])


def test_settings_count_only_where_they_change_the_result(tmp_path: Path) -> None:
    def digest(**options: object) -> str:
        made = BatchOptions(**options)  # pyright: ignore[reportArgumentType]
        return settings_digest(made.settings(made.carrier()))

    renamed = load_workflow()
    renamed["4"]["inputs"]["filename_prefix"], renamed["3"]["_meta"]["title"] = "other", "Other"
    (tmp_path / "same.json").write_text(json.dumps(renamed))
    plain = digest()
    assert (
        plain == digest(workflow=UPSCALE_WORKFLOW, quality=50, in_flight=7) == digest(workflow=tmp_path / "same.json")
    )
    others = [digest(assignments=["3.timestep=501"]), digest(format="jpg"), digest(format="jpg", quality=50)]
    assert len({plain, *others}) == 4


# --- the board


def tasks(count: int) -> list[Task]:
    return [Task(Item(f"/{number}", f"{number}", f"{number}.png"), number) for number in range(count)]


def test_a_picture_is_tried_three_times_and_a_lost_server_costs_no_try() -> None:
    failures: list[Failure] = []
    board = Board(tasks(1), failures.append)
    for _ in range(5):
        claim = board.take("a")
        assert claim is not None
        board.give_back(claim, "the server went away", counts=False)
    for number in range(TRIES):
        assert not board.finished.is_set()
        claim = board.take("a")
        assert claim is not None
        board.give_back(claim, f"reason {number}", counts=True)
    assert board.take("a") is None and board.finished.is_set()
    assert [failure.reason for failure in failures] == ["reason 2"]


def test_a_slow_server_s_picture_is_done_by_another_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("host.batch.board.SLOW_SECONDS", 0.05)
    board = Board(tasks(2))
    slow, quick = board.take("slow"), board.take("quick")
    assert slow is not None and quick is not None
    assert board.settle(quick) and not board.finished.is_set()
    copy = board.take("quick")
    assert copy is not None and copy.task is slow.task
    assert board.settle(copy) and slow.stop.is_set(), "the slow one is told to stop"
    assert not board.settle(slow), "the second result does not count"
    assert board.finished.is_set() and board.take("slow") is None


def test_an_ended_board_counts_what_is_left() -> None:
    board = Board(tasks(3))
    claim = board.take("a")
    board.abort("the disk is full")
    assert claim is not None and claim.stop.is_set()
    assert (board.reason, board.left, board.take("a")) == ("the disk is full", 3, None)
    assert Board([]).finished.is_set()


# --- the manifest


def kept(folder: Path, name: str = "a", settings: str = "s", weights: str | None = "w") -> tuple[Item, Entry]:
    """Makes an input and keeps a result of it."""
    source = folder.parent / f"{name}.png"
    Image.new("RGB", (2, 2)).save(source)
    stat = source.stat()
    digests = (file_digest(source), hashlib.sha256(b"result").hexdigest())
    entry = Entry(
        name, digests[0], stat.st_size, stat.st_mtime_ns, settings, weights, f"{name}.png", digests[1], 6, 0.5, "here"
    )
    with Manifest(folder) as manifest:
        part = folder / f"{PART_PREFIX}1"
        part.write_bytes(b"result")
        manifest.keep(entry, part)
    return Item(str(source), name, f"{name}.png"), entry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    made.mkdir()
    return made


def test_a_result_is_done_until_something_changes(folder: Path) -> None:
    item, _ = kept(folder)

    def done(settings: str = "s", weights: str | None = "w") -> bool:
        with Manifest(folder) as manifest:
            return manifest.is_done(item, settings, weights)

    assert done() and done(weights=None)
    assert not done(settings="t") and not done(weights="x")
    os.utime(item.source, ns=(1, 1))
    assert done(), "a new date alone changes nothing"
    (folder / item.output).write_bytes(b"resulT")
    assert not done(), "a result that is not what was written"
    (folder / item.output).write_bytes(b"result")
    Image.new("RGB", (2, 2), "red").save(item.source)
    assert not done(), "another picture"


def test_a_line_that_was_cut_off_costs_one_picture(folder: Path) -> None:
    item, _ = kept(folder)
    with (folder / NAME).open("ab") as file:
        file.write(b'{"input": "b", "inpu')
    other, _ = kept(folder, "b")
    with Manifest(folder) as manifest:
        assert manifest.is_done(item, "s", "w") and manifest.is_done(other, "s", "w")
    lines = (folder / NAME).read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[2])["input"] == "b"


def test_what_was_half_written_is_cleared_and_what_others_made_is_known(folder: Path) -> None:
    item, _ = kept(folder)
    touch(folder / "deep" / f"{PART_PREFIX}2", folder / "mine.png")
    with Manifest(folder) as manifest:
        assert not (folder / "deep" / f"{PART_PREFIX}2").exists()
        assert manifest.is_foreign(Item("/m", "m", "mine.png")) and not manifest.is_foreign(item)
        with pytest.raises(HostError, match="another batch is writing to"), Manifest(folder):
            pass


def test_a_file_that_is_no_manifest_is_refused(folder: Path) -> None:
    (folder / NAME).write_text("[1, 2]\n")
    with pytest.raises(HostError, match="not a manifest of this program: line 1"), Manifest(folder):
        pass


def test_the_colours_of_a_frame_are_those_that_can_be_seen(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (100, 50, 200, 255)
    pixels[1, :, :3] += 20
    pixels[2:, :, 1] = 255  # green, hidden
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    found = statistics(str(tmp_path / "frame.png"))
    assert np.allclose(found, ((110, 60, 210), (10, 10, 10)))
    change = recolored(((120, 60, 210), (10, 20, 10)))
    rows = change(pixels)[:2, 0]
    assert rows.tolist() == [[110, 40, 200], [130, 80, 220]]
