"""The RRDB networks among the peers (ESRGAN's kind: Real-ESRGAN x4plus, RealSR) in PyTorch, for many pictures on a GPU.

ncnn's files hold the convolutions in the order in which they run: <stem>.param names each layer with its sizes,
<stem>.bin holds a tag, the weights and the biases of each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from spandrel import ImageModelDescriptor, ModelLoader
from torch import Tensor

from training.images import BYTE_MAX

HALF, SINGLE = 0x01306B47, 0  # ncnn's tags: how the weights are stored
BLOCKS, LAYERS = 3, 5  # dense blocks in a residual one, convolutions in a dense block
ENDS = ("conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last")


def read_convolutions(stem: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns weights (out, in, k, k) and biases (out,) of <stem>.param's convolutions, float32, in their order.

    Raises ValueError for files that hold anything else that has weights, or more or less than they say.
    """
    data, at, found = stem.with_suffix(".bin").read_bytes(), 0, []

    def take(dtype: str, count: int) -> np.ndarray:
        nonlocal at
        values = np.frombuffer(data, dtype, count, at)
        at += -(-values.nbytes // 4) * 4
        return values

    for line in stem.with_suffix(".param").read_text(encoding="ascii").splitlines()[2:]:
        words = line.split()
        if not words or words[0] != "Convolution":
            continue
        options = dict(word.split("=") for word in words[4:] if "=" in word)
        out, side, count = int(options["0"]), int(options["1"]), int(options["6"])
        tag = int(take("<u4", 1)[0])
        if tag not in (HALF, SINGLE):
            raise ValueError(f"{stem.name}.bin: layer {words[1]} is stored as {tag:#x}; accepted: half and single")
        weights = take("<f2" if tag == HALF else "<f4", count).astype(np.float32)
        found.append((weights.reshape(out, -1, side, side), take("<f4", out).astype(np.float32)))
    if at != len(data):
        raise ValueError(f"{stem.name}.bin holds {len(data)} bytes, its convolutions take {at}")
    return found


def state_dict(stem: Path) -> dict[str, Tensor]:
    """Returns the weights under the names of Real-ESRGAN's RRDBNet. Errors as `read_convolutions`."""
    convolutions = read_convolutions(stem)
    residual = (len(convolutions) - 1 - len(ENDS)) // (BLOCKS * LAYERS)
    inner = (
        f"body.{i}.rdb{block}.conv{layer}"
        for i in range(residual)
        for block in range(1, BLOCKS + 1)
        for layer in range(1, LAYERS + 1)
    )
    names = ["conv_first", *inner, *ENDS]
    if len(names) != len(convolutions):
        raise ValueError(f"{stem.name} has {len(convolutions)} convolutions; accepted: an RRDB network's")
    parts = zip(names, convolutions, strict=True)
    return {
        f"{name}.{kind}": torch.from_numpy(t)
        for name, pair in parts
        for kind, t in zip(("weight", "bias"), pair, strict=True)
    }


def load_rrdb(stem: Path, device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
    """Returns what enlarges a batch, uint8 (B, h, w, 3) to uint8 (B, 4 h, 4 w, 3), in half precision on a GPU.

    Errors as `state_dict`; the result raises ArithmeticError where it is not finite.
    """
    descriptor = ModelLoader().load_from_state_dict(state_dict(stem))
    assert isinstance(descriptor, ImageModelDescriptor)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    network = descriptor.model.to(device, dtype).eval()

    def enlarge(lq: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            planes = torch.from_numpy(lq).to(device).permute(0, 3, 1, 2).to(dtype) / BYTE_MAX
            result = network(planes.contiguous(memory_format=torch.channels_last)).float()
            if not result.isfinite().all():
                raise ArithmeticError(f"{stem.name} gave no finite picture for a batch of {lq.shape}")
            return (result.clamp(0, 1) * BYTE_MAX).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()

    return enlarge
