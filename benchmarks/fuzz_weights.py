"""Damaged and odd weights files for `benchmarks.fuzz`: what is done to those of `benchmarks.fuzz_files`."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from benchmarks.fuzz_files import Good
from tadsr.errors import WeightsError
from tadsr.sources import read_weights
from tadsr.weights import SECTIONS, TadsrWeights

ODD_VALUES = (
    *(None, True, -1, 0, 1e308, 2**70, "", "x" * 300, "\u0000", [], [[]], {}, {"a": {}}, [1, "2"], 0.5, 3000, "NaN"),
    *([{}] * 3, {"r": [[[[[]]]]]}, "residual ", -0.0),
)
ODD_KEYS = (
    "encoder_time.encoder.down.3000.block.3000.time_emb_proj.weight",
    "unet_lora.diffusion_model.input_blocks.99999999999999.0.lora_up.weight",
    "base.first_stage_model.decoder.up.4000000000.block.0.norm1.weight",
    "x.y",
    "prompt.",
    ".",
    "encoder_lora..lora_up.weight",
    "unet_full.diffusion_model.input_blocks.0.0.weight.weight",
)


def attempt(path: Path, good: Good, exact: bool) -> str:
    """Reads a file as the loader does; returns "refused", "equal" or "accepted", or what is wrong with that.

    exact: whether only the good file's own numbers may be accepted.
    """
    try:
        weights = read_weights(path)
    except WeightsError as error:
        text = str(error)
        return "refused" if str(path) in text and "\n" not in text.strip() else f"unclear: {text[:200]!r}"
    except Exception as error:  # what this program looks for
        return f"raw: {type(error).__name__}: {str(error)[:120]!r}"
    if _same(weights, good.weights):
        return "equal"
    return "another picture" if exact else "accepted"


def damaged(goods: list[Good], seed: int, index: int) -> tuple[str, bool, Good, bytes]:
    """Returns the class of damage number `index`, whether it is damage in storage, the good file, and the bytes."""
    random = Random(f"{seed}:{index}")  # noqa: S311 - not for secrets
    kinds = sorted(DAMAGES)
    kind = kinds[index % len(kinds)]
    exact, layouts, damage = DAMAGES[kind]
    good = random.choice([good for good in goods if good.name.endswith(layouts)])
    return kind, exact, good, damage(good.content, random)


def _span(content: bytes, random: Random, largest: int = 4096) -> tuple[int, int]:
    start = random.randrange(len(content))
    # Half of the places are in the beginning or the end, where a file says what it holds.
    if random.random() < 0.5:
        start = random.choice((random.randrange(min(len(content), 8192)), -random.randrange(1, 8192) % len(content)))
    return start, min(len(content), start + random.randrange(1, largest))


def _bits(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(random.randrange(1, 9)):
        changed[_span(content, random)[0]] ^= 1 << random.randrange(8)
    return bytes(changed)


def _cut(content: bytes, random: Random) -> bytes:
    return content[: _span(content, random)[0]]


def _grown(content: bytes, random: Random) -> bytes:
    return content + random.randbytes(random.randrange(1, 5000))


def _filled(content: bytes, random: Random) -> bytes:
    start, end = _span(content, random)
    return content[:start] + random.choice((bytes(end - start), random.randbytes(end - start))) + content[end:]


def _removed(content: bytes, random: Random) -> bytes:
    start, end = _span(content, random)
    return content[:start] + content[end:]


def _doubled(content: bytes, random: Random) -> bytes:
    start, end = _span(content, random)
    return content[:end] + content[start:]


def _headed(content: bytes, random: Random) -> bytes:
    heads = (b"<html>", b"PK\x03\x04", b"\x80\x02", b"version https://git-lfs", b"", b"\xff" * 8, bytes(8))
    head = random.choice(heads)
    return head + content[len(head) :] if random.random() < 0.5 else head + random.randbytes(random.randrange(200))


def _header(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _with_header(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _odd_header(content: bytes, random: Random) -> bytes:
    """One value of the header, wherever it stands, becomes another one."""
    header, data = _header(content)
    places: list[tuple[Any, Any]] = []

    def look(part: Any) -> None:
        for key in part if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], dict | list):
                look(part[key])

    look(header)
    part, key = random.choice(places)
    part[key] = random.choice(ODD_VALUES)
    return _with_header(header, data)


def _odd_metadata(content: bytes, random: Random) -> bytes:
    """One field of our own metadata becomes another value, or a new one comes, without another digest."""
    header, data = _header(content)
    meta = header["__metadata__"]
    fields = json.loads(meta["tadsr"])
    key = random.choice([*fields, "surprise", "formula", "time_aware"])
    fields[key] = random.choice(ODD_VALUES)
    meta["tadsr"] = random.choice((json.dumps(fields), json.dumps(fields), json.dumps(random.choice(ODD_VALUES))))
    if random.random() < 0.3:
        meta.pop("tadsr.sha256")
    return _with_header(header, data)


def _odd_tensors(content: bytes, random: Random) -> bytes:
    """A tensor is lost, renamed, new, of another type or shape, or no number; written as any program would."""
    header = _header(content)[0]["__metadata__"]
    tensors = load(content)
    key = random.choice(sorted(tensors))
    tensor = tensors[key]
    change = random.randrange(7)
    if change < 2:
        del tensors[key]
    if change == 1:
        tensors[random.choice(ODD_KEYS)] = tensor
    elif change == 2:
        tensors[random.choice(ODD_KEYS)] = torch.zeros(random.choice(((), (0,), (1,), (3, 3))))
    elif change == 3:
        types = (torch.int8, torch.bool, torch.int64, torch.float64, torch.bfloat16, torch.float8_e4m3fn)
        tensors[key] = tensor.to(random.choice(types))
    elif change == 4:
        tensors[key] = tensor.reshape(random.choice(((-1,), (1, -1), (1, 1, 1, -1))))
    elif change == 5:
        tensors[key] = torch.full_like(tensor, random.choice((float("nan"), float("inf"))))
    elif change == 6:
        tensors = {name: t.to(torch.int8) for name, t in tensors.items()}
    counts = {name: sum(key.partition(".")[0] == name for key in tensors) for name in (*SECTIONS, "prompt")}
    header["tadsr.tensors"] = json.dumps({name: count for name, count in counts.items() if count})
    header.pop("tadsr.sha256")
    return save(tensors, header)


def _odd_entries(content: bytes, random: Random) -> bytes:
    """An entry of a pickle's dict, or of a dict in it, is lost, renamed or another value."""
    entries = torch.load(io.BytesIO(content), weights_only=True)
    part = random.choice([entries, *(part for part in entries.values() if isinstance(part, dict))])
    key = random.choice(list(part))
    change = random.randrange(4)
    old = part.pop(key) if change else part[key]
    values = (*ODD_VALUES, torch.zeros(()), torch.zeros(0, 3), torch.full((2, 2), torch.nan), torch.zeros(2, 2).char())
    if change == 0:
        part[key] = random.choice(values)
    elif change == 1:
        part[random.choice((0, None, "a.b", "conv_in.lora_A.default.weight", f"{key}.x", *ODD_KEYS))] = old
    elif change == 2:
        part[key] = old[:1] if isinstance(old, Tensor | list) else old
    buffer = io.BytesIO()
    torch.save(entries, buffer)
    return buffer.getvalue()


def _odd_script(content: bytes, random: Random) -> bytes:
    """Some bytes of the pickle in the archive are others; its checksums are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                changed = bytearray(data)
                for _ in range(random.randrange(1, 4)):
                    changed[random.randrange(len(changed))] = random.randrange(256)
                data = bytes(changed)
            target.writestr(entry.filename, data)
    return out.getvalue()


def _hostile(content: bytes, random: Random) -> bytes:
    """Small files that ask for much, or hold code."""
    zeros = io.BytesIO()
    with zipfile.ZipFile(zeros, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/data/0", bytes(random.randrange(10**7, 10**8)))
    wide = io.BytesIO()
    torch.save({"state_dict_unet": {"x": torch.zeros(1).expand(2**31)}}, wide)
    old = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, old, _use_new_zipfile_serialization=False)
    size = struct.pack("<Q", random.randrange(10**9, 2**62))
    kinds = (
        b"\x80\x02cbuiltins\nbytearray\nJ\x00\x94\x35\x77\x85R.",  # bytearray(2 * 10**9)
        b"\x80\x05\x96" + size + b".",  # BYTEARRAY8
        b"\x80\x04\x8e" + size + b".",  # BINBYTES8
        b"\x80\x04\x95" + size + b"N.",  # FRAME
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # LONG_BINPUT far away
        b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x02]" + b"2" * 60 + b"e.",
        b"cos\nsystem\n(S'true'\ntR.",
        pickle.dumps({"a": [[]] * 1000}, 0),
        zeros.getvalue(),
        wide.getvalue(),
        old.getvalue(),
        struct.pack("<Q", 90_000_000) + b"{" + b" " * 1000,
        _with_header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, b""),
        _with_header({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, b""),
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 400_014) + b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}" + b" " * 8,
    )
    return random.choice(kinds)


ANY, OURS, PICKLES = ("",), (".safetensors",), (".pkl", ".pth")
# name: whether only equal numbers may be accepted, as from a bad disk or line; for which files; what is done
DAMAGES: dict[str, tuple[bool, tuple[str, ...], Callable[[bytes, Random], bytes]]] = {
    "bits flipped": (True, ANY, _bits),
    "cut off": (True, ANY, _cut),
    "bytes added": (True, ANY, _grown),
    "a block of zeros or noise": (True, ANY, _filled),
    "a block lost": (True, ANY, _removed),
    "a block twice": (True, ANY, _doubled),
    "another beginning": (True, ANY, _headed),
    "header: odd value": (True, OURS, _odd_header),
    "metadata: odd value": (False, OURS, _odd_metadata),
    "tensors lost, renamed, odd": (False, OURS, _odd_tensors),
    "pickle: odd entry": (False, PICKLES, _odd_entries),
    "pickle: odd instruction": (False, PICKLES, _odd_script),
    "hostile": (False, ANY, _hostile),
}


def _same(a: TadsrWeights, b: TadsrWeights) -> bool:
    prompts = ({} if w.prompt is None else {"": w.prompt} for w in (a, b))
    sections = [(getattr(a, name), getattr(b, name)) for name in SECTIONS]
    return a.metadata == b.metadata and all(
        one.keys() == other.keys()
        and all(t.dtype == other[key].dtype and torch.equal(t, other[key]) for key, t in one.items())
        for one, other in [*sections, (next(prompts), next(prompts))]
    )
