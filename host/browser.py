"""Finds a Chromium-like browser for the page test, or installs Debian's where that is possible."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from .cache import cache_directory
from .commands import run_logged

BROWSER_VARIABLE = "TADSR_BROWSER"
_COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge", "msedge")
_MAC_APPLICATIONS = ("Google Chrome", "Chromium", "Microsoft Edge")
_WINDOWS_PROGRAMS = (
    "Google/Chrome/Application/chrome.exe",
    "Microsoft/Edge/Application/msedge.exe",
    "Chromium/Application/chrome.exe",
)


def find_browser() -> Path | None:
    """Returns the executable of a browser: $TADSR_BROWSER, else Chromium, Chrome or Edge, else None."""
    return next((path for path in _candidates() if path.is_file()), None)


def _candidates() -> list[Path]:
    named = os.environ.get(BROWSER_VARIABLE)
    if named:
        return [Path(named)]
    on_path = [Path(found) for command in _COMMANDS if (found := shutil.which(command))]
    if sys.platform == "darwin":
        return on_path + [Path(f"/Applications/{name}.app/Contents/MacOS/{name}") for name in _MAC_APPLICATIONS]
    if sys.platform == "win32":
        variables = ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA")
        roots = [Path(os.environ[name]) for name in variables if name in os.environ]
        return on_path + [root / program for root in roots for program in _WINDOWS_PROGRAMS]
    return on_path


def install_browser() -> None:
    """Installs Debian's Chromium and one font, as root on a system with apt-get; does nothing elsewhere.

    Raises HostError when apt-get fails.
    """
    apt = shutil.which("apt-get")
    if apt is None or os.name != "posix" or os.geteuid() != 0:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    advice = f"Install Chromium, Chrome or Edge yourself, or name one with the variable {BROWSER_VARIABLE}."
    packages = ("chromium", "fonts-dejavu-core")
    for doing, words in (
        ("Updating the list of Debian's packages", ("update",)),
        ("Installing Chromium for the page test", ("install", "-y", "--no-install-recommends", *packages)),
    ):
        run_logged([apt, *words], doing=doing, advice=advice, log=cache_directory() / "apt.log", env=environment)
