"""Measures training: `python -m benchmarks.training --data DIR [--preset smoke] [--base PATH] [key=value ...]`.

Prints steps per second, peak memory, and the share of time of each part of a step: on the GPU if there is one, else on
the CPU. Without --base, the untrained small model of `training.mini.base` is used.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from training.config.train_config import PRESETS, TrainConfig, load_config
from training.mini.base import write_mini_base
from training.run.build import build_run, open_data
from training.run.loop import Trainer

WARM_UP_STEPS = 2
QUIET = ["validate_every=0", "save_every=1000000", "log_every=1000000"]
MIB = 2**20


class PartClock:
    """Adds up the time of each part of a step; on a GPU it waits for the work of the part to be done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.seconds[part] += time.perf_counter() - started

    def time_decoding(self, decoder: nn.Module) -> None:
        """Takes the decoder's forward pass out of the student's part, into one of its own."""
        started: list[float] = []

        def begin(*_: object) -> None:
            self._wait()
            started.append(time.perf_counter())

        def end(*_: object) -> None:
            self._wait()
            seconds = time.perf_counter() - started.pop()
            self.seconds["decode"] += seconds
            self.seconds["student"] -= seconds

        decoder.register_forward_pre_hook(begin)
        decoder.register_forward_hook(end)

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def measure(config: TrainConfig, steps: int) -> str:
    """Returns a Markdown table of `steps` steps after a warm-up."""
    accelerator, clock = Accelerator(mixed_precision=config.mixed_precision), PartClock()
    run = build_run(config, open_data(config), accelerator, clock)
    clock.time_decoding(run.student.module.decoder)
    trainer = Trainer(run, accelerator, clock=clock)
    started = total = 0.0
    for number, batches in enumerate(trainer.steps()):
        if number == WARM_UP_STEPS:
            clock.seconds.clear()
            started = time.perf_counter()
        if number == WARM_UP_STEPS + steps:
            total = time.perf_counter() - started
            break
        trainer.step(batches)
    rows = sorted(clock.seconds.items(), key=lambda row: -row[1])
    rows.append(("the rest", total - sum(clock.seconds.values())))
    lines = [
        f"{config.batch} samples of {config.crop}x{config.crop} a step on {device_name(accelerator.device)}: "
        f"{steps / total:.3g} steps/s, {steps * config.batch / total:.3g} samples/s, peak {peak_memory()}",
        "",
        "| part | share of a step |",
        "|---|---|",
        *(f"| {part} | {100 * seconds / total:.1f} % |" for part, seconds in rows),
    ]
    return "\n".join(lines)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def peak_memory() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / MIB:.0f} MiB on the GPU"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB without the workers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--preset", default="smoke", help="name of a preset: paper, mini, smoke")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        base = options.base or write_mini_base(Path(folder) / "base")
        overrides = [*options.overrides, *QUIET, f"steps={WARM_UP_STEPS + options.steps + 1}"]
        paths = {"data": options.data, "base": base, "output": Path(folder) / "run"}
        print(measure(load_config(PRESETS / f"{options.preset}.yaml", overrides, **paths), options.steps))


if __name__ == "__main__":
    main()
