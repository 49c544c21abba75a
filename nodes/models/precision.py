"""The precision that the loader's networks compute in."""

from __future__ import annotations

import torch

AUTO = "auto"
PRECISIONS: dict[str, torch.dtype | None] = {
    AUTO: None,  # ComfyUI's rules, for each network on its own
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def parse_precision(precision: str) -> torch.dtype | None:
    """Returns the dtype, None for ComfyUI's choice; raises ValueError for another word."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; accepted are {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]
