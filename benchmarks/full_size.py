"""Measures the nodes at the full size of SD 2.1 against diffusers modules: `python -m benchmarks.full_size`.

Both restore the same 128x128 picture to 512x512 in float32 on the CPU with the same random weights: the nodes inside a
real ComfyUI, and diffusers modules with unmerged LoRA (peft) in a process of their own (`benchmarks.unmerged`). They
take turns. Prints one line of JSON: seconds and peak resident memory of each, their ratios, and how much the results
differ. Needs 12 GB of memory and 4 GB of disk. Random weights say nothing about quality.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(REPOSITORY) in sys.path else [str(REPOSITORY)]  # run again by path, see main

from benchmarks.inference import noise_png, resident_memory  # noqa: E402
from host.cache import cache_directory  # noqa: E402
from host.errors import HostError  # noqa: E402
from host.interpreter import chosen_comfyui, prepare_tests, run_again  # noqa: E402

if TYPE_CHECKING:
    from host.server import ComfyServer

WEIGHTS, CHECKPOINT = "full-size.safetensors", "full-size-sd.safetensors"
FILES = {"tadsr": WEIGHTS, "checkpoints": CHECKPOINT}  # folder of ComfyUI's models -> file
RUN_TIMEOUT_SECONDS = 1800.0  # on a slow machine, with loading
RESET_PEAK = "5"  # Linux, proc(5): /proc/PID/clear_refs
INPUT_SIDE = 128
TARGETS = {"seconds": 0.75, "peak": 0.8}  # of the diffusers modules' figures; the project's aims
SD_UNET = {  # SD 2.1 UNet config
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
PROMPT_TOKENS = 77  # as the text encoder gives
LORA_SPREAD = 0.02  # standard deviation of the random `up` matrices: enough to change the result


class Turn(NamedTuple):
    """One picture."""

    seconds: float
    cpu_seconds: float
    peak_mb: float


@dataclass(frozen=True)
class Side:
    """What one side of the comparison took."""

    seconds: list[float]  # one picture each, everything loaded
    cpu_seconds: list[float]  # the same, of all the process's threads: hardly changed by other programs
    peak_mb: float  # highest resident memory of the process, loading included
    peak_while_running_mb: float  # the same, from after the first picture on

    @classmethod
    def of(cls, turns: list[Turn]) -> Side:
        """Returns the side's figures. turns: the first loads the networks, and counts for the peak alone."""
        warm = turns[1:]
        return cls(
            seconds=[turn.seconds for turn in warm],
            cpu_seconds=[turn.cpu_seconds for turn in warm],
            peak_mb=max(turn.peak_mb for turn in turns),
            peak_while_running_mb=max(turn.peak_mb for turn in warm),
        )


@dataclass(frozen=True)
class Comparison:
    """The nodes against the diffusers modules."""

    nodes: Side
    diffusers: Side
    largest_difference: int  # of the results' 8-bit values
    threads: int

    def ratios(self) -> dict[str, float]:
        """Returns the nodes' figures as shares of the diffusers modules'."""
        nodes, other = self.nodes, self.diffusers
        return {
            "seconds": statistics.median(nodes.seconds) / statistics.median(other.seconds),
            "cpu_seconds": statistics.median(nodes.cpu_seconds) / statistics.median(other.cpu_seconds),
            "peak": self.nodes.peak_mb / self.diffusers.peak_mb,
            "peak_while_running": self.nodes.peak_while_running_mb / self.diffusers.peak_while_running_mb,
        }

    def report(self) -> str:
        """Returns everything as one line of JSON."""
        return json.dumps({**asdict(self), "ratios": self.ratios(), "targets": TARGETS})


def write_random_weights(models: Path, seed: int = 0) -> None:
    """Writes FILES: random weights with LoRA on every module that training gives it, and their checkpoint."""
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.autoencoders.vae import Decoder
    from safetensors.torch import save_file

    from benchmarks.unmerged import MOMENTS, SD_NORM_GROUPS, SD_WIDTHS
    from tadsr.architecture import is_time_layer
    from tadsr.encoder import EncoderConfig, TimeAwareEncoder
    from tadsr.weights import Metadata, save
    from training.networks.base import Base, LatentDecoder
    from training.networks.lora import LORA_PARTS
    from training.networks.student import Student, base_section, student_weights

    torch.manual_seed(seed)
    latent_channels = MOMENTS // 2
    decoder = Decoder(
        in_channels=latent_channels,
        out_channels=3,
        up_block_types=("UpDecoderBlock2D",) * len(SD_WIDTHS),
        block_out_channels=SD_WIDTHS,
        layers_per_block=2,
        norm_num_groups=SD_NORM_GROUPS,
    )
    encoder = TimeAwareEncoder(EncoderConfig()).state_dict()
    base = Base(
        unet=UNet2DConditionModel(**SD_UNET).eval(),
        encoder={key: tensor for key, tensor in encoder.items() if not is_time_layer(key)},
        decoder=LatentDecoder(decoder).eval(),
        norm_groups=SD_NORM_GROUPS,
        encoder_time={key: tensor for key, tensor in encoder.items() if is_time_layer(key)},
        prompt=None,
        name="random",
        sha256="",
    )
    for folder in FILES:
        (models / folder).mkdir(parents=True, exist_ok=True)
    weights, checkpoint = (models / folder / name for folder, name in FILES.items())
    save_file(base_section(base), checkpoint)
    student = Student(base, seed=seed)
    for network in (student.unet, student.encoder):
        for name, parameter in network.named_parameters():
            if LORA_PARTS[1] in name:  # zero as training starts
                torch.nn.init.normal_(parameter, std=LORA_SPREAD)
    prompt = torch.randn(1, PROMPT_TOKENS, SD_UNET["cross_attention_dim"])
    save(weights, student_weights(student, Metadata(name="random"), prompt=prompt))


class DiffusersProcess:
    """`benchmarks.unmerged` in a process of its own, as a context manager."""

    def __init__(self, weights: Path, checkpoint: Path) -> None:
        self._command = [sys.executable, "-m", "benchmarks.unmerged", str(weights), str(checkpoint)]

    def __enter__(self) -> DiffusersProcess:
        self._process = subprocess.Popen(  # noqa: S603 - our own program
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        assert self._process.returncode is not None

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, picture: Path) -> None:
        """Restores one picture; the result lies beside it as `.npy`."""
        assert self._process.stdin is not None
        print(picture, file=self._process.stdin, flush=True)
        self._answer()

    def _answer(self) -> None:
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise HostError("the diffusers modules' process ended; its error is above")


def run_nodes(server: ComfyServer, picture: Path, repeat: int) -> bytes:
    """Returns the result of the whole workflow as PNG. A new name keeps the picture from ComfyUI's cache."""
    from host.workflow import load_workflow, with_inputs

    inputs = {
        "LoadImage": {"image": server.upload(picture.read_bytes(), f"picture-{repeat}.png")},
        "TADSRModelLoader": {"weights": WEIGHTS, "base": CHECKPOINT},
    }
    run = server.run(with_inputs(load_workflow(), inputs), timeout=RUN_TIMEOUT_SECONDS)
    return server.view(run.images()[0])


def compare(comfyui: Path, repeats: int, models: Path | None = None) -> Comparison:
    """Returns the comparison, each side running `repeats` times after a first picture that does not count.

    models: a folder that `write_random_weights` has filled; None: written first, and removed at the end.
    """
    import torch

    from host.server import ComfyServer

    with tempfile.TemporaryDirectory(prefix="full-size-", dir=cache_directory()) as temporary:
        folder = Path(temporary)
        picture = folder / "picture.png"
        picture.write_bytes(noise_png(INPUT_SIDE, 0))
        if models is None:
            models = folder / "models"
            # In a process of its own, whose memory is gone when the comparison starts.
            command = [sys.executable, "-m", "benchmarks.full_size", "--write", str(models)]
            subprocess.run(command, check=True, cwd=REPOSITORY)  # noqa: S603 - our own program
        weights, checkpoint = (models.resolve() / kind / name for kind, name in FILES.items())
        base = folder / "comfyui"
        base.mkdir()
        (base / "models").symlink_to(models.resolve())
        with ComfyServer(comfyui, base=base) as server, DiffusersProcess(weights, checkpoint) as other:
            sides: tuple[list[Turn], list[Turn]] = ([], [])
            result = b""
            for repeat in range(repeats + 1):
                with measured(server.pid, sides[0]):
                    result = run_nodes(server, picture, repeat)
                with measured(other.pid, sides[1]):
                    other.run(picture)
        difference = _largest_difference(result, picture.with_suffix(".npy"))
    return Comparison(Side.of(sides[0]), Side.of(sides[1]), difference, torch.get_num_threads())


@contextmanager
def measured(pid: int, turns: list[Turn]) -> Iterator[None]:
    """Adds what the process `pid` took while the block ran, its peak from the last turn on. Raises HostError."""
    processor, started = _cpu_seconds(pid), time.perf_counter()
    yield
    seconds, processor = time.perf_counter() - started, _cpu_seconds(pid) - processor
    peak = resident_memory(pid, "VmHWM")
    if peak is None:
        raise HostError(f"process {pid} ended while it was measured")
    Path(f"/proc/{pid}/clear_refs").write_text(RESET_PEAK)
    turns.append(Turn(seconds, processor, peak))


def _cpu_seconds(pid: int) -> float:
    """Returns the processor time of a process so far, in user and system mode, all threads."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError as error:
        raise HostError(f"process {pid} cannot be measured ({error}); the comparison needs Linux") from error
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")  # utime, stime: proc(5)


def _largest_difference(result: bytes, other: Path) -> int:
    import numpy as np
    from PIL import Image

    ours = np.asarray(Image.open(io.BytesIO(result)).convert("RGB")).astype(int)
    return int(np.abs(ours - np.load(other)).max())


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="only write the random weights there")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="use what --write wrote there")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; accepted are 1 and more")
    try:
        if options.write:
            write_random_weights(options.write)
            return 0
        comfyui = chosen_comfyui()
        if comfyui is None:
            run_again(prepare_tests(), Path(__file__), arguments)
        print(compare(comfyui, options.repeats, options.models).report())
    except HostError as error:
        print(f"\nbenchmarks.full_size: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
