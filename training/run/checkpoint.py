"""Checkpoints that a killed run leaves whole or not at all: `step-00000123/` with tensors, state and a manifest.

A checkpoint is written into a hidden folder beside it, brought to the disk with fsync, and only then renamed; a
checkpoint that goes is first renamed to a hidden name too. So every visible folder is complete, unless the disk damages
it, which the sizes and digests of the manifest show. One process at a time may write into a folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from training.run.optimizer_state import CheckpointError, load_optimizer, load_parameters, optimizer_tensors

__all__ = ["Checkpoint", "CheckpointError", "Checkpoints", "load_optimizer", "load_parameters", "optimizer_tensors"]

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
FORMAT_VERSION = 1
NAME = re.compile(r"step-(\d{8,})")
LEFTOVER = re.compile(r"\.step-\d{8,}\.(?:tmp|old)-(\d+)")  # being written, being removed; by which process
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the disk, of the user's quota, of a file


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. Reading raises CheckpointError if it is damaged, naming the file."""

    step: int  # how many steps were done
    path: Path

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors, on the CPU, as they were saved to the bit."""
        return safetensors.torch.load(self._read(TENSORS))

    def state(self) -> dict[str, Any]:
        """Returns the state that was saved, in JSON's types."""
        return json.loads(self._read(STATE))

    def copy_into(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Sets the parameters to `tensors`, which are this checkpoint's, named `<prefix><name>`.

        Raises CheckpointError, and changes nothing, unless names, shapes and dtypes are the same.
        """
        try:
            load_parameters(parameters, tensors, prefix)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def fault(self) -> str | None:
        """Reads all files; returns what is damaged, None if each is what was written."""
        try:
            for name in (TENSORS, STATE):
                self._read(name)
        except CheckpointError as error:
            return str(error)
        return None

    def _read(self, name: str) -> bytes:
        try:
            manifest = json.loads((self.path / MANIFEST).read_bytes())
            content = (self.path / name).read_bytes()
            wanted = manifest["files"][name]
            size, digest = int(wanted["bytes"]), str(wanted["sha256"])
        except OSError as error:
            raise CheckpointError(f"{self.path} is damaged: {error.filename}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path} is damaged: its {MANIFEST} cannot be read ({error})") from error
        if len(content) != size:
            raise CheckpointError(f"{self.path} is damaged: {name} has {len(content):,} bytes instead of {size:,}")
        if _sha256(content) != digest:
            raise CheckpointError(f"{self.path} is damaged: the content of {name} is not what was written")
        return content


class Checkpoints:
    """The checkpoints in one folder, of which the newest `keep` stay.

    writes: whether this process may write; it then makes the folder and removes what dead runs left half-done.
    """

    def __init__(self, folder: Path, keep: int, *, writes: bool = True) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; accepted: integers from 1")
        self.folder, self.keep = folder, keep
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            self._clean()

    def all(self) -> list[Checkpoint]:
        """Returns the checkpoints, oldest first, damaged ones too."""
        if not self.folder.is_dir():
            return []
        found = [(match, path) for path in self.folder.iterdir() if (match := NAME.fullmatch(path.name))]
        return sorted(
            (Checkpoint(int(match[1]), path) for match, path in found), key=lambda checkpoint: checkpoint.step
        )

    def latest(self) -> Checkpoint | None:
        """Returns the newest sound checkpoint, None if there are none at all; warns about each damaged one passed over.

        Raises CheckpointError if all are damaged.
        """
        faults: list[str] = []
        for checkpoint in reversed(self.all()):
            fault = checkpoint.fault()
            if fault is None:
                for passed_over in faults:
                    warnings.warn(f"{passed_over}; going on from {checkpoint.path.name}", stacklevel=2)
                return checkpoint
            faults.append(fault)
        if faults:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read: {'; '.join(faults)}. Remove them to start anew"
            )
        return None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Returns the folder of the new checkpoint, which is on the disk; then removes those beyond `keep`.

        A sound checkpoint of this step stays as it is: a step has one result. state: JSON's types, keys text.
        Raises CheckpointError if the disk is full; all earlier checkpoints are kept then.
        """
        path = self.folder / f"step-{step:08d}"
        if path.exists() and Checkpoint(step, path).fault():
            self._remove(path)
        if not path.exists():
            self._write(path, _files(step, tensors, state))
        earlier = [checkpoint for checkpoint in self.all() if checkpoint.step <= step]
        for checkpoint in earlier[: -self.keep]:
            self._remove(checkpoint.path)
        return path

    def _write(self, path: Path, files: dict[str, bytes]) -> None:
        unfinished = self.folder / f".{path.name}.tmp-{os.getpid()}"
        try:
            unfinished.mkdir()
            for name, content in files.items():
                with (unfinished / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            _sync_folder(unfinished)
            unfinished.rename(path)
        except BaseException as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise self._disk_full(path, sum(map(len, files.values())), error) from error
            raise
        _sync_folder(self.folder)

    def _disk_full(self, path: Path, needed: int, error: OSError) -> CheckpointError:
        last = next((checkpoint for checkpoint in reversed(self.all()) if not checkpoint.fault()), None)
        kept = f"the last good checkpoint, {last.path.name}, is kept" if last else "there is no checkpoint before it"
        return CheckpointError(
            f"{path.name} could not be written ({error.strerror}): it needs {needed:,} bytes in {self.folder}, where "
            f"{shutil.disk_usage(self.folder).free:,} are free; {kept}. Make room and run the same command again"
        )

    def _remove(self, path: Path) -> None:
        hidden = self.folder / f".{path.name}.old-{os.getpid()}"
        path.rename(hidden)
        shutil.rmtree(hidden)

    def _clean(self) -> None:
        for path in self.folder.iterdir():
            match = LEFTOVER.fullmatch(path.name)
            if match and not _runs_elsewhere(int(match[1])):
                shutil.rmtree(path)


def _files(step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> dict[str, bytes]:
    files = {
        TENSORS: safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}),
        STATE: json.dumps(state, indent=1).encode(),
    }
    contents = {name: {"bytes": len(content), "sha256": _sha256(content)} for name, content in files.items()}
    manifest = {"format_version": FORMAT_VERSION, "step": step, "files": contents}
    return files | {MANIFEST: json.dumps(manifest, indent=1).encode()}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk. Windows cannot open folders; its file system logs renames itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _runs_elsewhere(process: int) -> bool:
    """Returns whether another process of this number is alive. On Windows, asking would end it: assumes not."""
    if process == os.getpid() or os.name == "nt":  # a restarted container gives the same number again
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
