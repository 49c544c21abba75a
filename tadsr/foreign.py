"""What a file that is not a TADSR weights file is instead, and where it belongs: for error messages."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

MAX_HEADER_BYTES = 100_000_000  # the safetensors format
CONVERT_HINT = "convert an official tadsr.pkl with: python -m tadsr.convert tadsr.pkl -o tadsr.safetensors"

FOREIGN_KEYS = (  # first match wins: pattern of a key, what such a file is, where it belongs
    (
        r"model\.diffusion_model\.|first_stage_model\.",
        "a Stable Diffusion checkpoint",
        "put it in models/checkpoints and choose it as the base checkpoint",
    ),
    (
        r"lora_unet_|lora_te|.*\.lora_(A|B|up|down)\b",
        "a LoRA without a Time-Aware Encoder",
        "put it in models/loras",
    ),
    (
        r"(down|up)_blocks\.|mid_block\.",
        "a UNet in diffusers format",
        "give the folder above it to python -m tadsr.convert as --base",
    ),
    (r"(encoder|decoder|quant_conv)\.", "a VAE", "put it in models/vae"),
)
FOREIGN_BYTES = (  # how a file begins, what it is, what to do
    (b"PK\x03\x04", "a PyTorch pickle (nothing in it was executed)", CONVERT_HINT),
    (b"\x80", "a Python pickle (nothing in it was executed)", CONVERT_HINT),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it with git lfs pull"),
    (b"<", "a web page", "download the file itself, not the page about it"),
)


def describe_keys(keys: Sequence[str]) -> str:
    """Returns what a safetensors file with these keys is, and where it belongs."""
    for pattern, what, cure in FOREIGN_KEYS:
        if any(re.match(pattern, key) for key in keys):
            return f"{what}: {cure}"
    return f"something else ({len(keys)} tensors: {', '.join(sorted(keys)[:3])}, ...): {CONVERT_HINT}"


def describe_bytes(path: Path) -> str:
    """Returns what a file that is no readable safetensors file seems to be, and what to do."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(32)
        header_size = int.from_bytes(start[:8], "little")
        if start[8:9] == b"{" and header_size <= MAX_HEADER_BYTES:
            end = _data_end(file, header_size)
            needed = "" if end is None else f" of {8 + header_size + end}"
            return f"a damaged or incomplete safetensors file ({size}{needed} bytes): get it again"
    for magic, what, cure in FOREIGN_BYTES:
        if start.startswith(magic):
            return f"not a safetensors file but {what}: {cure}"
    return f"not a safetensors file ({size} bytes): {CONVERT_HINT}"


def _data_end(file: BinaryIO, header_size: int) -> int | None:
    """Returns where the last tensor ends, counted from the end of the header; None if unreadable."""
    file.seek(8)
    try:
        entries = json.loads(file.read(header_size))
        return max(e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
