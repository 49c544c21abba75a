"""The bugs of `python -m tests.mutants` still fit the code that they are put into."""

from __future__ import annotations

import ast
from pathlib import Path

import mutants
import pytest
from mutants import MUTANTS, Mutant

FEWEST = 18


def test_there_are_enough_of_them_each_with_a_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= FEWEST


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_bug_is_put_in_once_and_its_tests_exist(mutant: Mutant, repository: Path, tmp_path: Path) -> None:
    original = (repository / mutant.file).read_text(encoding="utf-8")
    (tmp_path / mutant.file).parent.mkdir(parents=True)
    (tmp_path / mutant.file).write_text(original, encoding="utf-8")
    mutant.apply(tmp_path)
    changed = (tmp_path / mutant.file).read_text(encoding="utf-8")
    assert changed != original
    ast.parse(changed)
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name or 'test_'}" in (repository / file).read_text(encoding="utf-8")


def test_a_line_that_has_changed_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="two: a.py has 'x = 2' 0 times; wanted: 1"):
        Mutant("two", "a.py", "x = 2", "x = 3", []).apply(tmp_path)


def test_the_command_lists_what_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutants.main(["--list", "--only", "clipped", "lpips"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "training/objective/objective.py: lpips_weight ignored",
        "training/run/optimizer.py: gradients not clipped",
    ]


def test_a_bug_that_no_test_sees_has_survived(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a tree of one file and two tests, with pytest as on the repository."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "pytest.ini").write_text("[pytest]\npythonpath = ..\n")
    (tmp_path / "two.py").write_text("TWO = 2\nTHREE = 3\n")
    (tmp_path / "tests" / "test_two.py").write_text("from two import TWO\n\n\ndef test_two():\n    assert TWO == 2\n")
    seen, unseen = (
        Mutant(line, "two.py", line, f"{line}0", ["tests/test_two.py"]) for line in ("TWO = 2", "THREE = 3")
    )
    assert mutants.try_mutant(seen, tmp_path) and not mutants.try_mutant(unseen, tmp_path)
    out = capsys.readouterr().out.splitlines()
    assert out == ["caught    TWO = 2: test_two", "SURVIVED  THREE = 3: no test fails"]
    assert (tmp_path / "two.py").read_text() == "TWO = 2\nTHREE = 3\n"
