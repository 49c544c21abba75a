"""Measures the node Prompt from Image (DAPE) at the tagger's full size: `python -m benchmarks.tagger`.

Inside a real ComfyUI on the CPU, with random weights of RAM's size: the time does not depend on them, and they say
nothing about tags. Prints a table of seconds by size of the picture, and the peak of the resident memory above what the
loaded node holds; where other programs run, processor seconds (of all threads) say more. The command is pinned to
--cores processors. Needs 3 GB of memory and 0.5 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(REPOSITORY) in sys.path else [str(REPOSITORY)]  # run again by path, see main

from host.errors import HostError  # noqa: E402
from host.interpreter import chosen_comfyui, prepare_tests, run_again  # noqa: E402

SIZES = ((64, 64), (128, 128), (512, 512), (1080, 1920))  # height and width of the picture, before it is enlarged
WEIGHTS = "random-tagger.safetensors"
TARGETS = {"seconds": 1.2, "peak_mb": 1200.0}  # the project's aims, on two cores


class Taken(NamedTuple):
    """What pictures of one size took, everything loaded."""

    height: int
    width: int
    seconds: list[float]
    cpu_seconds: list[float]  # of all threads: changed less by other programs
    peak_mb: float  # the most that was held, above `held_mb` before


def write_random_tagger(path: Path) -> None:
    """Writes a tagger of RAM's size, of random weights."""
    import torch

    from tadsr.tagger import Tagger, TaggerConfig
    from tadsr.tagger_weights import TaggerWeights, save
    from tadsr.tags import TagList

    torch.manual_seed(0)
    config = TaggerConfig()
    state = {key: tensor.half() for key, tensor in Tagger(config).state_dict().items()}
    tags = TagList(tuple(f"tag {number}" for number in range(config.tags)), (0.5,) * config.tags)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, TaggerWeights(state, tags, {}))


def measure(comfyui: Path, repeats: int) -> list[Taken]:
    """Returns what the node took for each size."""
    import torch

    from benchmarks.suite_meters import begin_peak, held_mb, peak_mb
    from host.comfy_in_process import load
    from host.node_pack import models_folder

    with tempfile.TemporaryDirectory(prefix="tagger-") as base, torch.inference_mode():
        comfy = load(comfyui, Path(base))
        write_random_tagger(models_folder(comfy) / "tadsr" / WEIGHTS)
        node = comfy.node("TADSRPromptFromImage")
        node.execute(torch.rand(1, 32, 32, 3), WEIGHTS)  # loads the network
        taken = []
        for height, width in SIZES:
            picture = torch.rand(1, height, width, 3)
            seconds, cpu_seconds = [], []
            held = held_mb()
            begin_peak()
            for _ in range(repeats):
                begin, begin_cpu = time.perf_counter(), time.process_time()
                node.execute(picture, WEIGHTS)
                seconds.append(time.perf_counter() - begin)
                cpu_seconds.append(time.process_time() - begin_cpu)
            taken.append(Taken(height, width, seconds, cpu_seconds, peak_mb() - held))
    return taken


def table(taken: list[Taken]) -> str:
    """Returns the figures as a Markdown table, with the targets in its last line."""
    lines = [
        "| picture | median s | fastest s | processor s | peak MB above the loaded node |",
        "|---|---|---|---|---|",
    ]
    for size in taken:
        median, fastest = statistics.median(size.seconds), min(size.seconds)
        cpu = statistics.median(size.cpu_seconds)
        lines.append(f"| {size.width}x{size.height} | {median:.2f} | {fastest:.2f} | {cpu:.2f} | {size.peak_mb:.0f} |")
    return "\n".join([*lines, f"| target | {TARGETS['seconds']:g} | | | {TARGETS['peak_mb']:g} |"])


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code: 0 also where a target is not met."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tagger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cores", type=int, default=2, help="processors, and threads of torch (default: 2)")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    try:
        comfyui = chosen_comfyui()
        if comfyui is None:
            run_again(prepare_tests(), Path(__file__), arguments)
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.cores)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
        print(table(measure(comfyui, options.repeats)))
    except HostError as error:
        print(f"\nbenchmarks.tagger: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
