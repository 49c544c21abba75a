"""The precision that the loader's networks compute in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from comfy.cli_args import args

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


@contextmanager
def usable_flags() -> Iterator[None]:
    """Leaves out, while the block loads a network, the one flag of ComfyUI whose dtype holds no network, and says so.

    The float8 types with a sign and a mantissa keep it: `tests/test_precision.py` says how well.
    """
    if not getattr(args, "fp8_e8m0fnu_unet", False):
        yield
        return
    logging.warning(
        "TADSR: --fp8_e8m0fnu-unet would keep powers of two without a sign of the UNet's weights, and no picture; the "
        "UNet is loaded as without that flag. --fp8_e4m3fn-unet and --fp8_e5m2-unet can be used"
    )
    args.fp8_e8m0fnu_unet = False
    try:
        yield
    finally:
        args.fp8_e8m0fnu_unet = True
