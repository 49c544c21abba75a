"""How much of a text the context of CLIP holds: ComfyUI encodes a longer one in several parts, the method cuts it."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import comfy.sd1_clip

CONTEXT_TOKENS = 77  # of CLIP, with one for the start and one for the end
WORD = re.compile(r"\s*(?:\w+|[^\w\s]+)")


def fit(text: str) -> str:
    """Returns the text as far as CLIP's context holds it, up to the last whole word."""
    if _fits(text):
        return text
    ends = [match.end() for match in WORD.finditer(text)]
    low, high = 0, len(ends)  # so many words fit, and so many do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(text[: ends[middle - 1]]) else (low, middle)
    return text[: ends[low - 1]] if low else ""


def _fits(text: str) -> bool:
    if len(text.encode()) <= CONTEXT_TOKENS - 2:  # a token is a byte at least
        return True
    return len(_tokenizer()(text, verbose=False)["input_ids"]) <= CONTEXT_TOKENS


@cache
def _tokenizer() -> Any:
    """Returns ComfyUI's copy of CLIP's tokenizer, which SD 2.1's text encoder shares."""
    return comfy.sd1_clip.SDTokenizer().tokenizer
