"""Tries to break the reading of weights and the nodes: `python -m benchmarks.fuzz [--files N] [--calls N] [--seed S]`.

Damaged and odd weights files are read as the loader reads them, and the nodes are called with what a link may carry,
in a real ComfyUI; `benchmarks.fuzz_weights` and `benchmarks.fuzz_calls` make them. Equal seeds give equal trials. Each
trial must end within 10 seconds, in a sentence or in the right result; a file, besides, in 1.5 times its size plus
200 MB. Prints what came of each class; exits with 1 where a trial went wrong. Linux, for the memory; minutes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(REPOSITORY) in sys.path else [str(REPOSITORY)]  # run again by path, see main

from host.errors import HostError  # noqa: E402
from host.interpreter import chosen_comfyui, prepare_tests, run_again  # noqa: E402

LIMIT_SECONDS = 10.0
START_SECONDS = 300.0  # importing torch and ComfyUI on a busy machine
SPARE_BYTES, SIZE_FACTOR = 200 * 10**6, 1.5
RIGHT = ("refused", "equal", "accepted", "made")
RESET_PEAK = "5"  # Linux, proc(5): /proc/PID/clear_refs
CANARY_EVERY = 50  # calls, after which a usual call must give what it gave at first

Trial = tuple[str, str]  # the class, and what came of it


def try_files(connection: Connection, seed: int) -> None:
    """Serves numbers of damaged files: sends the trial's class and result for each."""
    import torch

    from benchmarks.fuzz_files import good_files
    from benchmarks.fuzz_weights import attempt, damaged

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tadsr-fuzz-") as folder:
        goods = good_files(Path(folder))
        connection.send("ready")
        while (index := connection.recv()) is not None:
            kind, exact, good, content = damaged(goods, seed, index)
            path = Path(folder) / f"damaged{Path(good.name).suffix}"
            path.write_bytes(content)
            connection.send(kind)  # known even if the rest never ends
            before = _resident("VmRSS")
            Path("/proc/self/clear_refs").write_text(RESET_PEAK)
            result = attempt(path, good, exact)
            taken = _resident("VmHWM") - before
            allowed = SIZE_FACTOR * len(content) + SPARE_BYTES
            connection.send(result if taken <= allowed else f"memory: {taken / 1e6:.0f} MB for {len(content)} bytes")


def try_calls(connection: Connection, seed: int) -> None:
    """Serves numbers of node calls, in a ComfyUI of its own."""
    import torch

    from benchmarks.fuzz_calls import Call, attempt_call, call
    from host import comfy_in_process
    from host.node_pack import load_pack

    comfyui = chosen_comfyui()
    assert comfyui is not None, "the parent found it"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tadsr-fuzz-") as folder, torch.inference_mode():
        pack = load_pack(comfy_in_process.load(comfyui, Path(folder)), "tadsr-mini.safetensors")
        picture = torch.rand(1, 6, 7, 3, generator=torch.Generator().manual_seed(0))
        first = pack.upscale(picture, 300, scale=2.0)
        connection.send("ready")
        while (index := connection.recv()) is not None:
            trial: Call = call(seed, index)
            connection.send(f"{trial.node}: {trial.odd or 'all usual'}")
            result = attempt_call(pack, trial)
            if index % CANARY_EVERY == 0 and not torch.equal(pack.upscale(picture, 300, scale=2.0), first):
                result = f"leak: after {result} a usual call gives another picture"
            connection.send(result)


def trials(worker: Callable[[Connection, int], None], count: int, seed: int) -> Iterator[Trial]:
    """Yields `count` trials; a process that hangs or dies is one's result, and the next gets a new one."""
    process, connection = None, None
    for index in range(count):
        if process is None or connection is None:
            process, connection = _start(worker, seed)
        kind = "unknown"
        try:
            connection.send(index)
            kind = _received(connection, LIMIT_SECONDS)
            yield kind, _received(connection, LIMIT_SECONDS)
        except TimeoutError:
            yield kind, f"hang: number {index} took over {LIMIT_SECONDS:g} seconds"
        except (EOFError, ConnectionError):
            process.join()
            yield kind, f"died: number {index} ended the process with {process.exitcode}"
        else:
            continue
        process.kill()
        process.join()
        process = None
    if process is not None and connection is not None:
        connection.send(None)
        process.join()


def _start(worker: Callable[[Connection, int], None], seed: int) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=worker, args=(theirs, seed), daemon=True)
    process.start()
    theirs.close()
    _received(ours, START_SECONDS)
    return process, ours


def _received(connection: Connection, seconds: float) -> str:
    if not connection.poll(seconds):
        raise TimeoutError
    return connection.recv()


def _resident(field: str) -> int:
    """Returns a size of this process in bytes: proc(5), /proc/PID/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def report(title: str, found: list[Trial], seconds: float) -> list[str]:
    """Prints what came of each class; returns the trials that went wrong."""
    counts = Counter((kind, result if result in RIGHT else "WRONG") for kind, result in found)
    print(f"\n{title}: {len(found)} in {seconds:.0f} s")
    for kind in sorted({kind for kind, _ in counts}):
        print(f"  {kind}: {', '.join(f'{result} {n}' for (k, result), n in sorted(counts.items()) if k == kind)}")
    wrong = Counter(f"{kind}: {result}" for kind, result in found if result not in RIGHT)
    for text, count in wrong.most_common():
        print(f"  WRONG {count} x {text}")
    return list(wrong)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=3000, help="damaged weights files")
    parser.add_argument("--calls", type=int, default=2000, help="calls of nodes")
    parser.add_argument("--seconds", type=float, default=1200.0, help="of each of both: it then ends with fewer trials")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        if chosen_comfyui() is None:
            run_again(prepare_tests(), Path(__file__), arguments)
        wrong = []
        for title, worker, count in (("files", try_files, options.files), ("calls", try_calls, options.calls)):
            started, found = time.monotonic(), []
            for trial in trials(worker, count, options.seed) if count else ():
                found.append(trial)
                if time.monotonic() - started > options.seconds:
                    break
            wrong += report(title, found, time.monotonic() - started)
    except HostError as error:
        print(f"\nbenchmarks.fuzz: {error}", file=sys.stderr)
        return 1
    print(f"\n{len(wrong)} kinds of wrong results" if wrong else "\nNothing went wrong.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
