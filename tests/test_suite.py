"""The suite's verdicts: which figure is held against which target. What it measures takes minutes and runs by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.inference import main
from benchmarks.suite import Target, plot, table, targets

FIGURES: dict[str, Any] = {
    "speed": {
        "runs": [
            {"side": 1024, "seconds_per_megapixel": 6.0},
            {"side": 1448, "seconds_per_megapixel": 6.6},
            {"side": 4096, "seconds_per_megapixel": 7.2},
        ]
    },
    "memory": {
        "all that is free": {"2": {"side": 1448, "working_mb": 800.0}, "16": {"side": 4096, "working_mb": 900.0}},
        "at most 1 GB": {"2": {"side": 1448, "working_mb": 200.0}, "16": {"side": 4096, "working_mb": 300.0}},
    },
    "difference": {"tadsr-mini": {"encoder": {"mean": 0.4, "largest": 5.0}}},
    "seams": {"tadsr-mini": {"smooth gradient": {"tiled": 1.2, "whole": 1.0}}},
    "growth": {"mb_per_run": 0.01, "limit_mb_per_run": 0.1},
}


def verdicts(figures: dict[str, Any]) -> list[bool]:
    return [target.met for target in targets(figures)]


def test_each_figure_is_held_against_its_target() -> None:
    # 1.1 and 1.2 times the time of a megapixel; 1.125 and 1.5 times the memory; mean, largest difference; seam; growth.
    assert verdicts(FIGURES) == [True, False, True, False, True, False, False, True]


def test_parts_that_were_not_measured_have_no_verdict() -> None:
    assert verdicts({"machine": {}}) == []
    assert verdicts(
        {"full_size": {"ratios": {"seconds": 0.7, "peak": 0.9}, "targets": {"seconds": 0.75, "peak": 0.8}}}
    ) == [
        True,
        False,
    ]
    assert verdicts({"gpu_large": {"peak_mb": 6100.0}}) == [False]


def test_table_and_plot_show_every_target(tmp_path: Path) -> None:
    found = targets(FIGURES)
    assert table(found).count("\n") == len(found) + 1
    assert "| 1.200 | 1.15 | **not met** |" in table(found) and "| 1.125 | 1.25 | met |" in table(found)
    plot(found, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width > 500
    assert not Target("worse than nothing", float("nan"), 1.0).met


def test_the_command_refuses_unknown_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--suite", "--parts", "sped"])
    assert "invalid choice: 'sped'" in capsys.readouterr().err
