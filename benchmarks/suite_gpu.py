"""The suite on a GPU, with random weights of SD 2.1's full size: stages, share of the matrix rate, VRAM, compiled."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.suite import Figures
from benchmarks.suite_meters import begin_peak, peak_mb
from benchmarks.suite_pictures import LEFT, picture
from benchmarks.suite_stages import SCALE, Stages
from host.node_pack import Pack

SIDE = 512  # pixels of the result: 128 -> 512
REPEATS, WARM_UPS = 20, 3
MATRIX_SIDE = 8192  # of the square matrices whose product tells the chip's rate
COMPILER = "inductor"


def gpu(pack: Pack) -> Figures:
    """Returns, for 128 -> 512: milliseconds and share of the measured matrix rate of each stage, and peak VRAM."""
    rate = matrix_rate(pack.model.model.get_dtype_inference())
    plain = stage_times(pack, rate)
    begin_peak()
    pack.upscale(picture(LEFT, SIDE // SCALE))
    figures: Figures = {"matrix_tflops": rate / 1e12, "stages": plain, "peak_mb": peak_mb()}
    pack.comfy.load_core_nodes("nodes_torch_compile.py")
    compiled = pack.comfy.node("TorchCompileModel").execute(pack.model, COMPILER).result[0]
    figures["stages_compiled"] = stage_times(replace(pack, model=compiled), rate)
    return figures


def gpu_large(pack: Pack, card_bytes: float, side: int) -> Figures:
    """Returns peak VRAM and seconds of one large result on a card of `card_bytes`, which torch really keeps to."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(card_bytes / total)
    management = pack.comfy.module("memory").mm
    # What --reserve-vram sets. The weights are not on the card yet, so that all that is free but for the card's size
    # is reserved.
    management.EXTRA_RESERVED_VRAM = management.get_free_memory(pack.model.load_device) - card_bytes
    begin_peak()
    milliseconds = elapsed(lambda: pack.upscale(picture(LEFT, side // SCALE)))
    return {"side": side, "seconds": milliseconds / 1e3, "peak_mb": peak_mb()}


def stage_times(pack: Pack, rate: float) -> Figures:
    """Returns milliseconds and share of `rate`, in operations a second, of each stage run whole."""
    stages = Stages(pack, SIDE, (SIDE, SIDE, SIDE))
    data = stages.begin(picture(LEFT, SIDE // SCALE))
    figures = {}
    for index, planned in enumerate(stages.plan.stages):
        times = [elapsed(lambda i=index, d=data: stages.run(i, d)) for _ in range(WARM_UPS + REPEATS)]
        milliseconds = statistics.median(times[WARM_UPS:])
        with FlopCounterMode(display=False) as counter:
            after = stages.run(index, data)
        share = counter.get_total_flops() / (milliseconds / 1e3) / rate
        figures[planned.stage.name] = {"milliseconds": milliseconds, "share_of_matrix_rate": share}
        data = after
    return figures


def matrix_rate(dtype: torch.dtype) -> float:
    """Returns the operations a second of a product of two large square matrices."""
    left, right = (torch.randn(MATRIX_SIDE, MATRIX_SIDE, device="cuda", dtype=dtype) for _ in range(2))
    times = [elapsed(lambda: left @ right) for _ in range(WARM_UPS + REPEATS)]
    return 2 * MATRIX_SIDE**3 / (statistics.median(times[WARM_UPS:]) / 1e3)


def elapsed(work: Callable[[], object]) -> float:
    """Returns the milliseconds between two CUDA events around the work."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
