"""Batches on servers of other people, good and bad ones."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batch_pictures import Kept, assert_inverted, pictures, records
from faulty_proxy import FaultyProxy

from host.batch import BatchOptions, upscale_folder
from host.server import ComfyServer

Invert = Callable[..., BatchOptions]


def test_two_servers_share_the_work_and_neither_is_flooded(
    invert: Invert, comfy_server: ComfyServer, tmp_path: Path
) -> None:
    pictures(tmp_path / "in", 12)
    (tmp_path / "key").write_text("s3cret\n")
    with (
        FaultyProxy(comfy_server.url, key="s3cret", delay=0.05) as one,
        FaultyProxy(comfy_server.url, key="s3cret", delay=0.05) as two,
    ):
        wrong = upscale_folder(
            [tmp_path / "in"], tmp_path / "out", invert(servers=[one.url], patience=0.5, key="guessed")
        )
        assert wrong.done == 0 and wrong.ended is not None and one.refused > 0
        report = upscale_folder(
            [tmp_path / "in"], tmp_path / "out", invert(servers=[one.url, two.url + "/"], key="s3cret")
        )
        assert report.done == 12 and one.prompts + two.prompts == 12
        assert one.prompts >= 3 and two.prompts >= 3 and max(one.most, two.most) <= 2
    assert_inverted(tmp_path / "out", 12)


def test_a_server_that_goes_away_loses_its_pictures_and_is_used_again(
    invert: Invert, comfy_server: ComfyServer, tmp_path: Path
) -> None:
    pictures(tmp_path / "in", 60)
    with FaultyProxy(comfy_server.url, delay=0.1) as steady, FaultyProxy(comfy_server.url, delay=0.1) as other:
        before: list[int] = []

        def after(count: int) -> None:
            if count == 8:
                threading.Thread(target=other.stop).start()
            if count == 20:
                before.append(other.prompts)
                threading.Thread(target=other.start).start()

        watcher = Kept(after)
        report = upscale_folder([tmp_path / "in"], tmp_path / "out", invert(servers=[steady.url, other.url]), watcher)
        assert (report.done, report.failures, report.ended) == (60, [], None)
        assert any(f"{other.url} is left for now" in line for line in watcher.lines), watcher.lines
        assert f"{other.url} works again" in watcher.lines, watcher.lines
        assert before and other.prompts > before[0]
    assert_inverted(tmp_path / "out", 60)
    assert len(records(tmp_path / "out")) == 60, "each once"


@pytest.mark.parametrize("fault", ["500", "hang", "close", "text"])
def test_a_bad_server_s_pictures_are_done_by_a_good_one(
    invert: Invert, comfy_server: ComfyServer, tmp_path: Path, fault: str
) -> None:
    pictures(tmp_path / "in", 6)
    with FaultyProxy(comfy_server.url, fault=fault) as bad, FaultyProxy(comfy_server.url, delay=0.3) as good:
        watcher = Kept()
        options = invert(servers=[bad.url, good.url], timeout=3.0, in_flight=1)
        report = upscale_folder([tmp_path / "in"], tmp_path / "out", options, watcher)
    assert (report.done, report.failures) == (6, [])
    assert any(bad.url in line for line in watcher.lines), watcher.lines
    assert_inverted(tmp_path / "out", 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"servers": ["http://127.0.0.1:9"], "patience": 0.5}, "none has answered for"),
        ({"assignments": ["8.imagee=3"]}, r"node 8 \(ImageInvert\) has no input imagee; it has image"),
        (
            {"workflow": None, "assignments": ["3.timestep=5000"]},
            "refused the workflow: node 3 .*Value 5000 bigger than max",
        ),
    ],
)
def test_what_stops_every_server_ends_the_batch_in_one_sentence(
    invert: Invert, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    pictures(tmp_path / "in", 2)
    report = upscale_folder([tmp_path / "in"], tmp_path / "out", invert(**changes))
    assert report.done == 0 and report.left == 2
    assert re.search(message, report.ended or ""), report.ended


def test_a_server_without_a_node_is_named(comfy_server: ComfyServer, inverting: Path, tmp_path: Path) -> None:
    workflow = json.loads(inverting.read_text())
    workflow["8"]["class_type"] = "TADSRNotYetInvented"
    (tmp_path / "w.json").write_text(json.dumps(workflow))
    pictures(tmp_path / "in", 1)
    report = upscale_folder(
        [tmp_path / "in"], tmp_path / "out", BatchOptions(workflow=tmp_path / "w.json", servers=[comfy_server.url])
    )
    assert report.ended is not None and "has no node TADSRNotYetInvented; is this pack in" in report.ended


def test_a_failing_picture_is_tried_three_times_and_nothing_stays_in_the_history(
    invert: Invert, comfy_server: ComfyServer, tmp_path: Path
) -> None:
    pictures(tmp_path / "in", 3)
    before = comfy_server.get_json("/history").keys()
    with FaultyProxy(comfy_server.url) as proxy:
        assert upscale_folder([tmp_path / "in"], tmp_path / "out", invert(servers=[proxy.url])).done == 3
        failing = invert(servers=[proxy.url], assignments=["8.image=3"])
        report = upscale_folder([tmp_path / "in"], tmp_path / "out", failing)
        assert proxy.prompts == 3 + 3 * 3
    assert [failure.name for failure in sorted(report.failures, key=str)] == ["p000.png", "p001.png", "p002.png"]
    assert all("failed: Node 9 (PreviewImage) failed" in failure.reason for failure in report.failures)
    assert comfy_server.get_json("/history").keys() == before
