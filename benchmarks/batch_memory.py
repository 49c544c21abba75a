"""Measures the main memory that pictures take beside networks: `python -m benchmarks.batch_memory [PICTURES]`.

In a ComfyUI in this process, on the processor, with the bundled model: what each further picture of a batch adds to the
peak of Upscale with TADSR, in multiples of its result (about 1 at best; without what the node keeps for a change of
colours, 256 MB at most), and what finishing one large picture holds at a time.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path

import psutil
import torch
from torch import Tensor

from host import torch_import_shim
from host.comfy_in_process import load
from host.comfyui import fetch_comfyui
from host.node_pack import load_pack, picture
from tadsr.color import COLOR_MATCHES

INTERVAL = 0.005  # seconds between two looks at the process
PICTURES, SIDE = 60, 256
LARGE_SIDE = 4096


class Peak(threading.Thread):
    """Watches how much memory the process holds while the block runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process, self.over = psutil.Process(), threading.Event()
        self.before = self.most = self.process.memory_info().rss

    def run(self) -> None:
        while not self.over.wait(INTERVAL):
            self.most = max(self.most, self.process.memory_info().rss)

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()

    @property
    def bytes(self) -> int:
        """Bytes at the peak above what was held before."""
        return self.most - self.before


def main(arguments: list[str]) -> None:
    """Runs the command."""
    pictures = int(arguments[0]) if arguments else PICTURES
    torch_import_shim.install()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        pack = load_pack(load(fetch_comfyui(), Path(folder)), "tadsr-mini.safetensors")
        setattr(pack.comfy.module("kept"), "MOST_BYTES", 0)  # noqa: B010
        batch = picture(SIDE // 4, SIDE // 4, batch=pictures)
        pack.upscale(batch[:1])  # torch takes what it keeps for ever
        with Peak() as alone:
            one: Tensor = pack.upscale(batch[:1])
        with Peak() as peak:
            pack.upscale(batch)
        more = (peak.bytes - alone.bytes) / (one.nbytes * (pictures - 1))
        print(f"{pictures} pictures of {SIDE}x{SIDE}: each further one takes {more:.2f} times its result")
        large = picture(LARGE_SIDE, LARGE_SIDE)
        for color_match in COLOR_MATCHES:
            with Peak() as peak:
                pack.finish(large, large, color_match)
            size = f"{LARGE_SIDE}x{LARGE_SIDE}"
            print(f"{color_match}: one of {size} takes {peak.bytes / large.nbytes:.1f} times its result")


if __name__ == "__main__":
    main(sys.argv[1:])
