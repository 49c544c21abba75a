"""PyTorch's files: none takes more than its size, none is believed, and a damaged one is told."""

from __future__ import annotations

import io
import pickle
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tadsr.errors import WeightsError
from tadsr.pickles import CHECKPOINT_NAMES, check_pickle, read_pickle

SPARE_BYTES = 2_000_000  # of Python's own, while the pickle is followed


def deflated(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/data/0", bytes(10**8))


def endless(path: Path) -> None:
    torch.save({"x": torch.zeros(1).expand(2**31)}, path)


def lost_numbers(path: Path) -> None:
    """A storage of 4,000 bytes of which the archive has 40."""
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(1000)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            target.writestr(entry.filename, data[:40] if "data/" in entry.filename else data)


def scripted(script: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(script)


SIZE = (2**40).to_bytes(8, "little")
SMALL_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bytearray(2 * 10**9)": (scripted(b"\x80\x02cbuiltins\nbytearray\nJ\x00\x94\x35\x77\x85R."), "builtins.bytearray"),
    "a bytearray of its own length": (scripted(b"\x80\x05\x96" + SIZE + b"."), "did not write"),
    "a memo far away": (scripted(b"\x80\x02Nr\xff\xff\xff\x7f."), "did not write|before 1.6"),
    "compressed": (deflated, "it is compressed .*which PyTorch's files are not"),
    "one number a million times": (endless, r"\(2147483648,\) claims more numbers than the 1 that"),
    "numbers that are not there": (lost_numbers, "claims 4000 bytes, but the file has 40"),
    "a PyTorch before 1.6": (
        lambda path: torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False),
        "saved by a PyTorch before 1.6: load it there and save it again",
    ),
    "no dict": (lambda path: torch.save([torch.zeros(3)], path), "it holds a list; accepted is a dict of tensors"),
}


@pytest.mark.parametrize("kind", SMALL_FILES)
def test_a_small_file_takes_little_and_is_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    make, message = SMALL_FILES[kind]
    path = tmp_path / "small.pkl"
    make(path)
    started = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=message) as caught:
            read_pickle(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert peak <= 1.5 * path.stat().st_size + SPARE_BYTES
    assert time.process_time() - started < 5


def saved(path: Path) -> dict[str, torch.Tensor]:
    content = {"a": torch.randn(1000), "b": torch.arange(10).half()}
    torch.save(content, path)
    return content


def test_what_is_whole_is_read(tmp_path: Path) -> None:
    content = saved(tmp_path / "good.pkl")
    read = read_pickle(tmp_path / "good.pkl")
    assert read.keys() == content.keys() and all(torch.equal(read[key], content[key]) for key in content)


def test_a_flipped_bit_is_told(tmp_path: Path) -> None:
    path = tmp_path / "flipped.pkl"
    saved(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # among the numbers
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="data/0.*checksum differs.*get the file again"):
        read_pickle(path)


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="an older PyTorch always writes them")
def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        content = saved(tmp_path / "good.pkl")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_pickle(tmp_path / "good.pkl")["a"], content["a"])


def test_a_checkpoint_may_name_what_its_reader_leaves_out(tmp_path: Path) -> None:
    """As Stable Diffusion 2.1-base's .ckpt does; a weights file may not."""
    path = tmp_path / "sd.ckpt"
    import numpy as np

    torch.save({"state_dict": {"a": torch.zeros(3)}, "loss": np.float64(0.5)}, path)
    check_pickle(path, CHECKPOINT_NAMES)
    with pytest.raises(WeightsError, match="holds code .numpy"):
        check_pickle(path)
