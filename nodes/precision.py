"""The precision that the loader's networks compute in."""

from __future__ import annotations

import torch
from comfy_api.latest import io

AUTO = "auto"
PRECISIONS: dict[str, torch.dtype | None] = {
    AUTO: None,  # ComfyUI's rules, for each network on its own
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def precision_input() -> io.Combo.Input:
    """Returns the choice of precision."""
    return io.Combo.Input(
        "precision",
        options=list(PRECISIONS),
        default=AUTO,
        optional=True,
        advanced=True,
        tooltip="What all three networks compute in. auto: what ComfyUI chooses for this device, by its own rules "
        "and flags. fp32: exact, twice the memory. fp16 and bf16: half the memory; slow on a CPU.",
    )


def parse_precision(precision: str) -> torch.dtype | None:
    """Returns the dtype, None for ComfyUI's choice; raises ValueError for another word."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; accepted are {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]
