"""Measures batches through ComfyUI's API: `python -m benchmarks.batch [NAME ...]`.

Needs nothing but Python, like quickstart.py. Names: overhead (a batch beside the nodes' own times), servers (two of one
thread beside one), many (memory and a resumed start with ten thousand pictures), coding (seconds of reading, sending
and saving a large picture), kills (twenty kills at random moments). Without names, all of them. Ratios are of runs on
the same machine, one after the other; run it on an idle one.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(REPOSITORY) in sys.path else [str(REPOSITORY)]  # run again by path, see main

from host.errors import HostError  # noqa: E402
from host.interpreter import chosen_comfyui, prepare_comfyui, run_again  # noqa: E402

UPSCALE = "TADSRUpscale"
MEGABYTE = 2**20
COMMAND = REPOSITORY / "batch.py"


def make_pictures(folder: Path, count: int, side: int) -> None:
    """Writes `count` pictures of smooth random colours."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:05}.png", compress_level=1)


def inverting(folder: Path) -> Path:
    """Writes a workflow that takes no time, so that what is left is the batch's own."""
    workflow = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "x.png"}},
        "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
    }
    file = folder / "invert.json"
    file.write_text(json.dumps(workflow), encoding="utf-8")
    return file


def overhead(comfyui: Path, work: Path) -> str:
    """Forty pictures of 128x128, four times larger: the batch beside the sum of the nodes' own times."""
    from host.batch import BatchOptions, upscale_folder
    from host.server import ComfyServer

    make_pictures(work / "in", 40, 128)
    with ComfyServer(comfyui, flags=("--verbose", "INFO")) as server:
        options = BatchOptions(servers=[server.url])
        upscale_folder([work / "in" / "00000.png"], work / "warm", options)  # loads the model
        before = len(server.log())
        report = upscale_folder([work / "in"], work / "out", options)
        log = server.log()[before:]
    _require(report)
    # ComfyUI logs what each prompt took, from its first node's start to its last one's end.
    executed = [float(seconds) for seconds in re.findall(r"Prompt executed in ([0-9.]+) seconds", log)]
    ratio = report.seconds / sum(executed)
    return (
        f"overhead: {report.done} pictures of 128x128 x4 in {report.seconds:.1f} s; the nodes' own times are "
        f"{sum(executed):.1f} s of {len(executed)} prompts; ratio {ratio:.3f} (wanted: 1.15 at most)"
    )


def servers(comfyui: Path, work: Path) -> str:
    """Two servers of one thread each beside one of them."""
    from host.batch import BatchOptions, upscale_folder
    from host.server import ComfyServer

    make_pictures(work / "in", 24, 128)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    seconds = []
    with ComfyServer(comfyui) as one, ComfyServer(comfyui) as two:
        for server in (one, two):
            upscale_folder([work / "in" / "00000.png"], work / f"warm-{server.pid}", BatchOptions(servers=[server.url]))
        for number, urls in enumerate([[one.url], [one.url, two.url]]):
            report = upscale_folder([work / "in"], work / f"out-{number}", BatchOptions(servers=urls))
            _require(report)
            seconds.append(report.seconds)
    return (
        f"servers: 24 pictures on one server of one thread {seconds[0]:.1f} s, on two {seconds[1]:.1f} s; "
        f"{seconds[0] / seconds[1]:.2f} times as fast (wanted: 1.7, on two idle cores)"
    )


def many(comfyui: Path, work: Path) -> str:
    """The command's memory over ten thousand tiny pictures, and the start of a run that finds them done."""
    from host.server import ComfyServer

    make_pictures(work / "in", 10_000, 4)
    with ComfyServer(comfyui) as server:
        line = [sys.executable, str(COMMAND), str(work / "in"), "-o", str(work / "out"), "--server", server.url]
        line += ["--workflow", str(inverting(work)), "--in-flight", "4"]
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
        readings: list[float] = []
        while process.poll() is None:
            if (work / "out" / "00200.png").exists():
                readings.append(_resident(process.pid))
            time.sleep(1)
        started = time.monotonic()
        again = subprocess.run(line, capture_output=True, text=True)  # noqa: S603
        seconds = time.monotonic() - started
    if process.returncode or "10000 done before" not in again.stdout:
        raise HostError(f"the batch failed: {again.stdout}{again.stderr}")
    readings = [reading for reading in readings if reading]
    growth = max(readings) - readings[0]
    return (
        f"many: from picture 200 to 10,000 the command's memory grows by {growth:.0f} MB of {readings[0]:.0f} (wanted: "
        f"under 50); finding 10,000 done takes {seconds:.1f} s with Python's start (wanted: under 5)"
    )


def coding(comfyui: Path, work: Path) -> str:
    """Seconds of what surrounds the networks for a result of 2048x2048: PNG levels, and the batch's own part."""
    import numpy as np
    from PIL import Image

    from host.batch import BatchOptions, upscale_folder
    from host.server import ComfyServer

    photo = Image.open(REPOSITORY / "assets" / "sample_hq.webp").convert("RGB").resize((2048, 2048))
    noisy = np.asarray(photo, dtype=np.int16) + np.random.default_rng(0).integers(-4, 5, (2048, 2048, 3))
    photo = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    lines = ["| PNG level | s | MB |", "|---|---|---|"]
    for level in (0, 1, 4, 6, 9):
        content = io.BytesIO()
        seconds = _timed(lambda content=content, level=level: photo.save(content, "PNG", compress_level=level))
        lines.append(f"| {level} | {seconds:.2f} | {len(content.getvalue()) / 1e6:.1f} |")
    (work / "in").mkdir()
    photo.resize((512, 512)).save(work / "in" / "a.png")
    photo.save(work / "whole.png", compress_level=1)
    with ComfyServer(comfyui) as server:
        own = BatchOptions(servers=[server.url])
        network = upscale_folder([work / "in"], work / "out", own)
        invert = BatchOptions(servers=[server.url], workflow=inverting(work))
        around = upscale_folder([work / "whole.png"], work / "around", invert)
    _require(network, around)
    lines.append(
        f"\ncoding: 512x512 to 2048x2048 takes {network.seconds:.1f} s; reading, sending, decoding, saving and "
        f"fetching 2048x2048 without a network {around.seconds:.1f} s"
    )
    return "\n".join(lines)


def kills(comfyui: Path, work: Path, count: int = 20, pictures: int = 60) -> str:
    """Kills the command at random moments, and compares what is there at last with an undisturbed run's results."""
    from host.server import ComfyServer

    make_pictures(work / "in", pictures, 16)
    draws = random.Random(0)  # noqa: S311 - moments, no secrets
    with ExitStack() as stack:
        server = stack.enter_context(ComfyServer(comfyui))
        line = [sys.executable, str(COMMAND), str(work / "in"), "--server", server.url]
        line += ["--set", f"{UPSCALE}.scale=1", "-o"]
        subprocess.run([*line, str(work / "whole")], check=True, capture_output=True)  # noqa: S603
        killed = 0
        for _ in range(count):
            process = subprocess.Popen([*line, str(work / "out")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # noqa: S603
            assert process.stdout is not None
            process.stdout.readline()  # it has read what is there
            time.sleep(draws.uniform(0, 3))
            killed += process.poll() is None
            process.kill()
            process.communicate()
        before = len(list((work / "out").glob("*.png")))
        last = subprocess.run([*line, str(work / "out")], capture_output=True, text=True)  # noqa: S603
    contents = [{file.name: file.read_bytes() for file in (work / name).glob("*.png")} for name in ("whole", "out")]
    equal = contents[0] == contents[1] and len(contents[0]) == pictures and last.returncode == 0
    left = [file.name for file in (work / "out").iterdir() if file.name.startswith(".tadsr-part")]
    return (
        f"kills: {killed} kills in {count} runs left {before} of {pictures} results; the next run did the rest; "
        f"{'equal to' if equal and not left else 'DIFFERENT from'} an undisturbed run's, to the byte"
    )


def _require(*reports: Any) -> None:
    for report in reports:
        if report.failures or report.ended:
            raise HostError(f"the batch failed: {report}")


def _resident(pid: int) -> float:
    """Returns a process's resident memory in MB, 0 where it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / MEGABYTE


def _timed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


PARTS: dict[str, Callable[[Path, Path], str]] = {
    part.__name__: part for part in (overhead, servers, many, coding, kills)
}


def main(arguments: list[str]) -> int:
    """Measures and prints; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.batch", description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PARTS)} (default: all)")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - PARTS.keys())
    if unknown:
        parser.error(f"{', '.join(unknown)}: accepted are {', '.join(PARTS)}")
    try:
        comfyui = chosen_comfyui()
        if comfyui is None:
            run_again(prepare_comfyui(), Path(__file__), arguments)
        for name in options.names or PARTS:
            with tempfile.TemporaryDirectory(prefix="tadsr-batch-") as folder:
                print(PARTS[name](comfyui, Path(folder)), flush=True)
    except HostError as error:
        print(f"\nbenchmarks.batch: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
