"""The teachers' networks read from ncnn's files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks.rrdb import ENDS, HALF, LAYERS, SINGLE, load_rrdb, read_convolutions, state_dict

FEATURES, GROWTH = 8, 32  # spandrel takes no other growth


def sizes() -> list[tuple[int, int]]:
    """Inputs and outputs of each convolution of a network of one residual block."""
    dense = [(FEATURES + i * GROWTH, GROWTH if i < LAYERS - 1 else FEATURES) for i in range(LAYERS)]
    return [(3, FEATURES), *(3 * dense), *((FEATURES, FEATURES),) * (len(ENDS) - 1), (FEATURES, 3)]


@pytest.fixture
def stem(tmp_path: Path) -> Path:
    """Files of a random network, every other convolution in half precision."""
    rng = np.random.default_rng(0)
    lines, data = ["7767517", "1 1", "Input data 0 1 data 0=0"], b""
    for index, (inputs, outputs) in enumerate(sizes()):
        weights = 0.05 * rng.standard_normal((outputs, inputs, 3, 3))
        half = index % 2
        data += struct.pack("<I", HALF if half else SINGLE) + weights.astype("<f2" if half else "<f4").tobytes()
        data += b"\0" * (-len(data) % 4) + rng.standard_normal(outputs).astype("<f4").tobytes()
        lines.append(f"Convolution c{index} 1 1 a b 0={outputs} 1=3 4=1 5=1 6={weights.size}")
    (tmp_path / "net.bin").write_bytes(data)
    (tmp_path / "net.param").write_text("\n".join(lines))
    return tmp_path / "net"


def expected(stem: Path, image: torch.Tensor) -> torch.Tensor:
    """The network written out: ESRGAN's (arXiv 1809.00219), without its classes."""
    layers = iter([(torch.from_numpy(w), torch.from_numpy(b)) for w, b in read_convolutions(stem)])

    def convolve(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, *next(layers), padding=1)

    def active(x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(x, 0.2)

    first = hidden = convolve(image)
    for _ in range(3):
        parts = [hidden]
        for _ in range(LAYERS - 1):
            parts.append(active(convolve(torch.cat(parts, dim=1))))
        hidden = hidden + 0.2 * convolve(torch.cat(parts, dim=1))
    hidden = first + convolve(first + 0.2 * hidden)
    for _ in range(2):
        hidden = active(convolve(F.interpolate(hidden, scale_factor=2)))
    return convolve(active(convolve(hidden)))


def test_a_network_enlarges_as_its_formula(stem: Path) -> None:
    lq = np.random.default_rng(1).integers(0, 256, (2, 12, 16, 3), dtype=np.uint8)
    result = load_rrdb(stem, torch.device("cpu"))(lq)
    assert result.shape == (2, 48, 64, 3)
    planes = torch.from_numpy(lq).permute(0, 3, 1, 2) / 255
    wanted = (expected(stem, planes).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(result - wanted).max() < 0.51, "no more than rounding"
    assert wanted.std() > 1, "it is a picture"


def test_files_that_say_otherwise_are_refused(stem: Path) -> None:
    data = stem.with_suffix(".bin").read_bytes()
    stem.with_suffix(".bin").write_bytes(data + b"\0\0\0\0")
    with pytest.raises(ValueError, match="net.bin holds"):
        state_dict(stem)
    stem.with_suffix(".bin").write_bytes(struct.pack("<I", 7) + data[4:])
    with pytest.raises(ValueError, match="stored as 0x7"):
        state_dict(stem)
    stem.with_suffix(".bin").write_bytes(data)
    lines = stem.with_suffix(".param").read_text().splitlines()
    stem.with_suffix(".param").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"net\.bin holds"):
        state_dict(stem)
