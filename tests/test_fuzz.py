"""A fixed share of `benchmarks.fuzz` in each run of the tests: nothing raw, nothing slow, nothing accepted wrongly."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.fuzz import LIMIT_SECONDS, RIGHT, report, trials
from benchmarks.fuzz_calls import attempt_call, call
from benchmarks.fuzz_files import good_files
from benchmarks.fuzz_weights import DAMAGES, attempt, damaged
from host.comfy_in_process import InProcessComfy
from host.node_pack import load_pack, models_folder

FILES, CALLS = 200, 200
SEED = 7  # not the command's
pytestmark = pytest.mark.usefixtures("inference_mode")


def test_damaged_weights_files(tmp_path: Path) -> None:
    goods = good_files(tmp_path)
    for good in goods:
        path = tmp_path / good.name
        assert attempt(path, good, True) == "equal", "the undamaged file is accepted"
    wrong, kinds = [], set()
    for index in range(FILES):
        kind, exact, good, content = damaged(goods, SEED, index)
        path = tmp_path / f"damaged{Path(good.name).suffix}"
        path.write_bytes(content)
        started = time.monotonic()
        result = attempt(path, good, exact)
        kinds.add(kind)
        if result not in RIGHT or time.monotonic() - started > LIMIT_SECONDS:
            wrong.append((index, kind, good.name, result))
    assert not wrong and kinds == set(DAMAGES)


def test_odd_calls_of_nodes(comfy_inprocess: InProcessComfy) -> None:
    models_folder(comfy_inprocess)
    pack = load_pack(comfy_inprocess, "tadsr-mini.safetensors")
    results = []
    for index in range(CALLS):
        trial = call(SEED, index)
        results.append((trial.node, trial.odd, attempt_call(pack, trial)))
    assert [result for result in results if result[2] not in RIGHT] == []
    assert {result for _, _, result in results} == {"refused", "equal", "made"}


def _serve(connection, seed: int) -> None:
    import os

    connection.send("ready")
    while (index := connection.recv()) is not None:
        connection.send("class")
        if index == 1:
            os._exit(3)
        if index == 2:
            time.sleep(60)
        connection.send("refused" if index else "raw: TypeError")


def test_a_trial_that_dies_or_hangs_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.fuzz.LIMIT_SECONDS", 0.5)
    found = list(trials(_serve, 4, 0))
    assert [result.split(":")[0] for _, result in found] == ["raw", "died", "hang", "refused"]
    assert len(report("trials", found, 1.0)) == 3
    assert "WRONG 1 x class: raw: TypeError" in capsys.readouterr().out
