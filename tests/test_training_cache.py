"""Training's cache folder: that of this repository's programs, and a lock that both respect."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

import host.cache
from training import cache


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("variables", [{}, {"XDG_CACHE_HOME": "/x", "LOCALAPPDATA": "/local"}])
def test_it_is_the_folder_of_the_other_programs(
    platform: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache._platform_cache() == host.cache._platform_cache()
    monkeypatch.setenv(host.cache.CACHE_VARIABLE, str(tmp_path / "new"))
    assert cache.cache_directory() == host.cache.cache_directory() == (tmp_path / "new").resolve()


def test_one_waits_for_the_other_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, order = tmp_path / "folder" / "thing", []

    def second() -> None:
        with cache.exclusive(path):
            order.append("second")

    waiting = threading.Thread(target=second)
    with host.cache.exclusive(path):
        waiting.start()
        said = ""
        while "\n" not in said:
            waiting.join(timeout=0.1)
            assert waiting.is_alive(), "it did not wait"
            said += capsys.readouterr().out
        order.append("first")
    waiting.join(timeout=60)
    assert order == ["first", "second"] and host.cache.held_by_nobody(path)
    assert f"Another process is preparing {path}" in said
