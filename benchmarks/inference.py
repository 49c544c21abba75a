"""Measures speed and memory of upscaling inside a real ComfyUI: `python -m benchmarks.inference`.

Needs nothing but Python: like quickstart.py, it sets up ComfyUI in a per-user cache directory. Prints a Markdown
table: seconds for one picture with everything loaded, ComfyUI's memory above its idle memory, and what the
pack adds to ComfyUI's start. Each picture is new to ComfyUI, so nothing comes from its cache.

With --suite it measures instead every target of tiling, speed and memory (`benchmarks.suite`; --suite --help).
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(REPOSITORY) in sys.path else [str(REPOSITORY)]  # run again by path, see main

from host.errors import HostError  # noqa: E402
from host.interpreter import chosen_comfyui, prepare_comfyui, run_again  # noqa: E402

SIDES = (64, 128, 256)  # pixels of the square input; the result has four times as many
IMPORT_TIME = re.compile(r"([\d.]+) seconds:.*[/\\]custom_nodes[/\\]tadsr\s*$", re.MULTILINE)
MEGABYTE = 1e6
SUITE = "--suite"


def resident_memory(pid: int, field: str) -> float | None:
    """Returns VmRSS (now) or VmHWM (highest so far) of a process in MB, or None where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    return int(match[1]) * 1024 / MEGABYTE if match else None


def noise_png(side: int, seed: int) -> bytes:
    """Returns a picture of smooth random colours as PNG: the time does not depend on what is shown."""
    import io

    import numpy as np
    from PIL import Image

    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def measure(comfyui: Path, repeats: int, timestep: int) -> str:
    """Returns the table, measured in a fresh ComfyUI on the CPU."""
    from host.server import ComfyServer
    from host.workflow import load_workflow, with_inputs

    with ComfyServer(comfyui) as server:
        idle = resident_memory(server.pid, "VmRSS")
        lines = ["| input | result | median s | fastest s | peak MB above idle |", "|---|---|---|---|---|"]
        for side in SIDES:
            seconds = []
            for repeat in range(repeats + 1):
                name = server.upload(noise_png(side, repeat), f"noise-{side}-{repeat}.png")
                inputs = {"LoadImage": {"image": name}, "TADSRUpscale": {"timestep": timestep, "scale": 4.0}}
                seconds.append(server.run(with_inputs(load_workflow(), inputs)).seconds)
            warm = seconds[1:]  # the first loads the model
            peak = resident_memory(server.pid, "VmHWM")
            above = f"{peak - idle:.0f}" if peak and idle else "not known"
            lines.append(
                f"| {side}x{side} | {4 * side}x{4 * side} | {statistics.median(warm):.2f} | {min(warm):.2f} | {above} |"
            )
        imports = IMPORT_TIME.search(server.log())
        lines.append(f"\nimport of the pack: {imports[1] if imports else 'not in the log'} s")
        lines.append(f"ComfyUI's idle memory: {idle:.0f} MB" if idle else "ComfyUI's idle memory: not known")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    if SUITE in arguments:
        from benchmarks import suite

        return suite.main([argument for argument in arguments if argument != SUITE])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, metavar="DIR", help="use this ComfyUI instead of fetching one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--timestep", type=int, default=500)
    options = parser.parse_args(arguments)
    try:
        comfyui = chosen_comfyui()
        if comfyui is None:
            run_again(prepare_comfyui(options.comfyui), Path(__file__), arguments)
        print(measure(comfyui, options.repeats, options.timestep))
    except HostError as error:
        print(f"\nbenchmarks.inference: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
