"""The speed and memory suite, `python -m benchmarks.inference --suite`: every target of tiling, met or not.

Each part runs in a process of its own (`benchmarks.suite_parts`), so that memory is that of the part alone. On the CPU
seconds are processor seconds, which the load of a shared machine does not count in; on a GPU they are the clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(REPOSITORY) in sys.path else [str(REPOSITORY)]  # run again by path, see main

from host.commands import clean_environment  # noqa: E402
from host.errors import HostError  # noqa: E402
from host.interpreter import INSIDE_VARIABLE, chosen_comfyui, prepare_tests, run_again  # noqa: E402

MINI, RANDOM, FULL = "tadsr-mini", "random, SD 2.1-shaped", "random, SD 2.1's full size"
MEGAPIXEL_SIDES = {1: 1024, 2: 1448, 4: 2048, 16: 4096}  # pixels of a square result
LARGE = 16  # megapixels: only on demand, as it takes minutes on a CPU
PRECISIONS = ("bf16", "fp16")
MEMORY_LIMITS = {"all that is free": None, "at most 1 GB": 1e9}  # bytes that a run may take
PARTS = ("speed", "memory", "difference", "choices", "seams", "profile", "growth", "full_size", "gpu")
PROFILE_SIDE = 512  # pixels of the result, with SD 2.1's full size
CARD_BYTES = 6e9  # the card that a 4096x4096 result must come out on
Figures = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One figure and what the project asks of it."""

    name: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit


def run_part(name: str, **options: Any) -> Figures:
    """Returns what a part measured. Raises HostError where it failed; its own error is above, on the terminal."""
    with tempfile.TemporaryDirectory(prefix="suite-") as folder:
        answer = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "benchmarks.suite_parts", name, str(answer), json.dumps(options)]
        environment = clean_environment(**{INSIDE_VARIABLE: str(chosen_comfyui())})
        print(f"suite: {name} {options or ''}", file=sys.stderr, flush=True)
        code = subprocess.run(command, cwd=REPOSITORY, env=environment).returncode  # noqa: S603 - our own
        if code:
            raise HostError(f"the part {name} of the suite ended with exit code {code}; its error is above")
        figures = answer.read_text()
    print(f"suite: {figures}", file=sys.stderr, flush=True)  # so that a part that fails later does not lose it
    return json.loads(figures)


def full_size(repeats: int) -> Figures:
    """Returns what `benchmarks.full_size` measures."""
    command = [sys.executable, "-m", "benchmarks.full_size", "--repeats", str(repeats)]
    print("suite: full_size", file=sys.stderr, flush=True)
    result = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own
    if result.returncode:
        raise HostError(f"benchmarks.full_size ended with exit code {result.returncode}; its error is above")
    return json.loads(result.stdout.splitlines()[-1])


def measure(parts: Sequence[str], *, large: bool, threads: int, repeats: int, side: int) -> Figures:
    """Returns the figures of the parts asked for. side: pixels of the square results that are compared."""
    megapixels = [size for size in MEGAPIXEL_SIDES if large or size < LARGE]
    common = {"threads": threads}
    on_gpu = run_part("machine", **common)
    figures: Figures = {"machine": {"system": platform.platform(), **on_gpu}}
    if "speed" in parts:
        sides = [MEGAPIXEL_SIDES[size] for size in megapixels]
        figures["speed"] = run_part("speed", sides=sides, repeats=repeats, **common)
    if "memory" in parts:
        figures["memory"] = {
            name: {
                str(size): run_part("memory", side=MEGAPIXEL_SIDES[size], limit=limit, **common)
                for size in (2, megapixels[-1])
            }
            for name, limit in MEMORY_LIMITS.items()
        }
    for name in ("difference", "choices", "seams"):
        if name in parts:
            figures[name] = {
                weights: run_part(name, weights=weights, side=side, **common) for weights in (MINI, RANDOM)
            }
    if "profile" in parts:
        figures["profile"] = run_part("profile", weights=FULL, side=PROFILE_SIDE, **common)
    if "growth" in parts:
        figures["growth"] = run_part("growth", **common)
    if "full_size" in parts:
        figures["full_size"] = full_size(repeats)
    if "gpu" in parts and on_gpu["gpu"]:
        figures["gpu"] = {precision: run_part("gpu", weights=FULL, precision=precision) for precision in PRECISIONS}
        figures["gpu_large"] = run_part(
            "gpu_large", weights=FULL, precision=PRECISIONS[0], card_bytes=CARD_BYTES, side=MEGAPIXEL_SIDES[LARGE]
        )
    return figures


def targets(figures: Figures) -> list[Target]:
    """Returns every target that the figures decide."""
    found = []
    if speed := figures.get("speed"):
        per_megapixel = {run["side"]: run["seconds_per_megapixel"] for run in speed["runs"]}
        first = per_megapixel[MEGAPIXEL_SIDES[1]]
        found += [
            Target(f"time per megapixel, {side}x{side} against 1024x1024", value / first, 1.15)
            for side, value in per_megapixel.items()
            if value is not first
        ]
    for limit, (small, large) in ((limit, sizes.values()) for limit, sizes in figures.get("memory", {}).items()):
        sides = f"{large['side']}x{large['side']} against {small['side']}x{small['side']}"
        name = f"peak memory without the picture, {limit}, {sides}"
        found.append(Target(name, large["working_mb"] / small["working_mb"], 1.25))
    for weights, stages in figures.get("difference", {}).items():
        for stage, difference in stages.items():
            found.append(Target(f"{weights}: {stage}, mean difference /255", difference["mean"], 0.5))
            found.append(Target(f"{weights}: {stage}, largest difference /255", difference["largest"], 4.0))
    for weights, pictures in figures.get("seams", {}).items():
        for picture, ratio in pictures.items():
            found.append(Target(f"{weights}: seam ratio, {picture}", ratio["tiled"], 1.05))
    if growth := figures.get("growth"):
        found.append(Target("memory growth over 50 runs, MB a run", growth["mb_per_run"], growth["limit_mb_per_run"]))
    if full := figures.get("full_size"):
        for name, limit in full["targets"].items():
            found.append(Target(f"full size against unmerged diffusers: {name}", full["ratios"][name], limit))
    if large := figures.get("gpu_large"):
        found.append(Target("VRAM for 4096x4096 with full-size weights, GB", large["peak_mb"] / 1e3, CARD_BYTES / 1e9))
    return found


def table(found: Sequence[Target]) -> str:
    """Returns the targets as a Markdown table."""
    lines = ["| figure | measured | target | |", "|---|---|---|---|"]
    for target in found:
        met = "met" if target.met else "**not met**"
        lines.append(f"| {target.name} | {target.value:.3f} | {target.limit:g} | {met} |")
    return "\n".join(lines)


def plot(found: Sequence[Target], path: Path) -> None:
    """Draws each figure as a share of its limit; everything left of the line is met."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 0.35 * len(found) + 1.2), layout="constrained")
    names = [f"{target.name} ({target.value:.3g}, limit {target.limit:g})" for target in found]
    axes.barh(
        names,
        [target.value / target.limit for target in found],
        color=["tab:green" if target.met else "tab:red" for target in found],
    )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("share of the limit")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code: 0 also where a target is not met."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference --suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--large", action="store_true", help="16 megapixels, too: minutes on a CPU")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the processor")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", type=int, default=MEGAPIXEL_SIDES[1], help="pixels of the results compared")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the targets there")
    options = parser.parse_args(arguments)
    try:
        if chosen_comfyui() is None:
            run_again(prepare_tests(), Path(__file__), arguments)
        figures = measure(
            options.parts,
            large=options.large,
            threads=options.threads,
            repeats=options.repeats,
            side=options.side,
        )
    except HostError as error:
        print(f"\nbenchmarks.inference --suite: {error}", file=sys.stderr)
        return 1
    found = targets(figures)
    if options.json:
        figures["targets"] = [{**asdict(target), "met": target.met} for target in found]
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.plot and found:
        plot(found, options.plot)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
