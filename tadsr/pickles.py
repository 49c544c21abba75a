"""Reads PyTorch's pickles without executing anything in them, and without making room for what they only claim.

Before PyTorch reads a file, its instructions are followed once with nothing behind them: names that are not those of
tensors end the reading, and every tensor is compared with the bytes that the file has for it.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import WeightsError, reading

ACCEPTED = "a file that PyTorch 1.6 or newer saved, with a dict of tensors in it"
ITEM_BYTES = {  # PyTorch's names of storages: bytes of one number
    **{"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2},
    **{"LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1},
}
CHECKPOINT_NAMES = (  # in checkpoints of Stable Diffusion, besides tensors; ComfyUI reads them as nothing, too
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)
ARCHIVE = b"PK\x03\x04"  # how a zip file begins
LEGACY_PICKLES = 4  # an older PyTorch's file begins with three small pickles before that of its content
LEGACY_BYTES = 1 << 24  # of such a file that are looked at: numbers follow the pickles


def read_pickle(path: Path) -> dict[str, Any]:
    """Returns the dict in a PyTorch pickle; its tensors are views of the file, mapped into memory.

    Raises WeightsError for anything else: code, compressed parts, tensors larger than what the file holds of them.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    with reading(path, ACCEPTED):
        check_pickle(path)
        content = _load(path)
        if not isinstance(content, dict):
            raise WeightsError(f"it holds a {type(content).__name__}; accepted is a dict of tensors")
        return content


def _load(path: Path) -> Any:
    """Returns what a checked file holds, mapped; but under safetensors' suffix PyTorch maps nothing else."""
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def check_pickle(path: Path, names: Collection[str] = (), *, sums: bool = True) -> None:
    """Raises WeightsError, or what a damaged file makes Python raise, unless the file can be read without harm.

    names: of what may be named in it besides tensors, because its reader does nothing with it. sums: compares all
    parts with their checksums, which reads the whole file, half a gigabyte in a second.
    """
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            _refuse_without_archive(path)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check_entries(entries, path.stat().st_size)
            summed = _with_sums(entries)
            scripts = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(scripts) != 1:
                raise WeightsError(f"it is a zip archive that PyTorch did not write; accepted is {ACCEPTED}")
            folder = scripts[0].filename.removesuffix("data.pkl") + "data/"
            sizes = {e.filename.removeprefix(folder): e.file_size for e in entries if e.filename.startswith(folder)}
            _Rehearsal(io.BytesIO(archive.read(scripts[0])), sizes, names).load()
            damaged = archive.testzip() if sums and summed else None
        if damaged is not None:
            raise WeightsError(f"its part {damaged[:100]!r} is damaged (its checksum differs): get the file again")


def _with_sums(entries: list[zipfile.ZipInfo]) -> bool:
    """Returns whether the parts have checksums: PyTorch leaves them all at 0 where it is told so."""
    if any(entry.CRC for entry in entries):
        return True
    for entry in entries:
        entry.CRC = None  # type: ignore[assignment] # what makes zipfile not compare it
    return False


def _check_entries(entries: list[zipfile.ZipInfo], file_bytes: int) -> None:
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise WeightsError(f"it is compressed ({packed[0][:100]}), which PyTorch's files are not: get it again")
    claimed = sum(entry.file_size for entry in entries)
    if claimed > file_bytes:
        raise WeightsError(f"its parts claim {claimed} bytes, but the file has {file_bytes}: get it again")


def _refuse_without_archive(path: Path) -> None:
    """Raises WeightsError, saying whether the file holds code."""
    with path.open("rb") as file:
        start = io.BytesIO(file.read(min(LEGACY_BYTES, path.stat().st_size)))  # makes room for so many
    if start.getvalue().startswith(ARCHIVE):
        raise WeightsError(
            "it is a damaged, incomplete or foreign file (a zip archive without its end): get it again; accepted is "
            f"{ACCEPTED}"
        )
    try:
        for _ in range(LEGACY_PICKLES):
            _Rehearsal(start, None).load()
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(
            f"it is a damaged or incomplete file, or a pickle that PyTorch did not write; accepted is {ACCEPTED}"
        ) from error
    raise WeightsError(f"it was saved by a PyTorch before 1.6: load it there and save it again; accepted is {ACCEPTED}")


class _Inert(OrderedDict[Any, Any]):
    """Stands for an object of the file: takes what is put into it, and does nothing."""


def _set_nothing(rehearsal: Any) -> None:
    """Stands for the instruction that sets an object's attributes."""
    rehearsal.stack.pop()


class _Rehearsal(pickle._Unpickler):  # Python's own: the one in C makes a table as long as a number in the file says
    """Follows a pickle's instructions with stand-ins for tensors. `load` raises WeightsError for all other names."""

    def __init__(self, file: Any, sizes: Mapping[str, int] | None, names: Collection[str] = ()) -> None:
        """sizes: the bytes that the file has for each storage; None: unknown. names: as of `check_pickle`."""
        super().__init__(file)
        self._sizes, self._names = sizes, names

    dispatch = {  # as in the class above
        **{code: function for code, function in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]},
        pickle.BUILD[0]: _set_nothing,
    }

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return (lambda *_: _Inert()) if self._sizes is None else _check_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return _Inert
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in ITEM_BYTES:
            return lambda: name  # only ever named, in `persistent_load`
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return lambda: name
        if f"{module}.{name}" in self._names:
            return lambda *_: _Inert()
        raise WeightsError(
            f"it holds code ({module}.{name}) besides tensors, which may be harmful; nothing in it was executed. Get "
            f"the file from its authors again, or a safetensors copy"
        )

    def persistent_load(self, pid: Any) -> int:
        """Returns how many numbers a storage has. pid: ("storage", its type, its name, its device, its numbers)."""
        if self._sizes is None:
            return 0
        _, kind, key, _, count = pid
        held, needed = self._sizes.get(key, 0), _number(count) * ITEM_BYTES[kind()]
        if needed > held:
            raise WeightsError(f"a storage claims {needed} bytes, but the file has {held} for it: get it again")
        return count


def _check_tensor(storage: int, offset: Any, size: Any, stride: Any, *_: object) -> _Inert:
    shape, steps = [_number(n) for n in size], [_number(n) for n in stride]
    last = _number(offset) + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    if prod(shape) > storage or (prod(shape) and last >= storage):
        raise WeightsError(
            f"a tensor of shape {tuple(shape)} claims more numbers than the {storage} that the file has for it"
        )
    return _Inert()


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise WeightsError(f"a size in it is {str(value)[:50]!r}; accepted are numbers from 0")
    return value


def is_pickle(path: Path) -> bool:
    """Returns whether a file begins as PyTorch's pickles do, whatever it is called."""
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file begins with the size of its header, whose first byte may be 80, too.
    return start.startswith(ARCHIVE) or (start.startswith(b"\x80") and not start.endswith(b"{"))


def tensors_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors in a dict read from a pickle, of its `state_dict` if it has one."""
    inner = content.get("state_dict", content)
    return {key: value for key, value in inner.items() if isinstance(value, Tensor)}
