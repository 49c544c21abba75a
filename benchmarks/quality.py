"""Measures the bundled model on the 24 Kodak test crops: `python -m benchmarks.quality`.

Prints one Markdown table per test set (bicubic: x4 downscaled; realesrgan: degraded with a fixed seed) with PSNR-Y,
SSIM and LPIPS (AlexNet, VGG16) of bicubic and Lanczos enlargement and of the model at several timesteps, and
writes a contact sheet per photograph. While tuning a training, measure a checkpoint on the crops that the training
leaves out instead: `--weights RUN/checkpoint.pt --held-out CROPS.npy`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.testset import DEGRADATIONS, Sample, load_test_set, make_test_set
from host.cache import cache_directory
from host.sheet import before_after_sheet
from tadsr.color import match_adain
from tadsr.geometry import crop_padding, enlarge, pad_to_multiple
from tadsr.weights import load
from training.export_mini import load_student, student_from_weights
from training.images import to_picture, to_tensor
from training.lpips import LPIPS
from training.metrics import Reference
from training.mini import MiniStudent
from training.train_mini import MiniConfig

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "tadsr-mini.safetensors"
BORDER = 4  # pixels left out of PSNR and SSIM at each side: the scale, as is usual

Upscaler = Callable[[np.ndarray], Tensor]  # uint8 (h, w, 3) -> (1, 3, 4 h, 4 w) in [0, 1]


def pillow_upscaler(resampling: Image.Resampling) -> Upscaler:
    """Returns Pillow's x4 enlargement."""

    def upscale(lq: np.ndarray) -> Tensor:
        image = Image.fromarray(lq)
        return to_tensor(np.asarray(image.resize((4 * image.width, 4 * image.height), resampling)))

    return upscale


def student_upscaler(student: MiniStudent, timestep: int) -> Upscaler:
    """Returns the student at a timestep, with AdaIN and 8-bit rounding as in the node and SaveImage."""

    @torch.inference_mode()
    def upscale(lq: np.ndarray) -> Tensor:
        reference = enlarge(to_tensor(lq), (4 * lq.shape[0], 4 * lq.shape[1]))
        padded, padding = pad_to_multiple(reference, student.encoder.downscale)
        result = student(padded * 2 - 1, torch.tensor([timestep])) / 2 + 0.5
        result = match_adain(crop_padding(result.clamp(0, 1), padding), reference).clamp(0, 1)
        return (result * 255).round() / 255

    return upscale


def measure(methods: dict[str, Upscaler], samples: list[Sample], sheets: Path | None) -> dict[str, list[float]]:
    """Returns the mean PSNR-Y, SSIM, LPIPS-Alex, LPIPS-VGG and seconds of each method over the samples."""
    networks = [LPIPS(net=net) for net in ("alex", "vgg")]
    rows: dict[str, list[list[float]]] = {name: [] for name in methods}
    for sample in samples:
        target = to_tensor(sample.hq)
        reference = Reference(target, networks, BORDER)
        pictures: dict[str, Tensor] = {}
        for name, upscale in methods.items():
            started = time.perf_counter()
            pictures[name] = upscale(sample.lq)
            seconds = time.perf_counter() - started
            scores = reference.score(pictures[name])
            rows[name].append([scores.psnr_y, scores.ssim, *scores.lpips.values(), seconds])
        if sheets is not None:
            write_sheet(sheets / f"{sample.name}.png", pictures | {"photograph": target})
    return {name: np.mean(values, axis=0).tolist() for name, values in rows.items()}


def held_out_samples(crops_path: Path, kind: str, count: int) -> list[Sample]:
    """Returns `count` of the crops that training.train_mini leaves out, degraded by `kind` of the test sets."""
    crops = np.load(crops_path, mmap_mode="r")[-MiniConfig().validation_crops :]
    chosen = [np.array(crop) for crop in crops[:: max(1, len(crops) // count)][:count]]
    return [replace(s, name=f"held-out{i:02d}") for i, s in enumerate(make_test_set(kind, chosen), start=1)]


def write_sheet(path: Path, pictures: dict[str, Tensor]) -> None:
    """Writes the pictures, (1, 3, H, W) in [0, 1], side by side with their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [(name, to_picture(picture)) for name, picture in pictures.items()]
    before_after_sheet(shown).save(path)


def table(results: dict[str, list[float]]) -> str:
    """Returns the results as a Markdown table."""
    lines = [
        "| method | PSNR-Y | SSIM | LPIPS (Alex) | LPIPS (VGG) | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, (psnr, similarity, alex, vgg, seconds) in results.items():
        lines.append(f"| {name} | {psnr:.2f} | {similarity:.4f} | {alex:.4f} | {vgg:.4f} | {seconds:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, help="a weights file, or a checkpoint (.pt) of training.train_mini"
    )
    parser.add_argument("--held-out", type=Path, metavar="CROPS", help="measure on crops that the training left out")
    parser.add_argument("--timesteps", default="100,500,900")
    parser.add_argument("--kinds", default=",".join(DEGRADATIONS), help="test sets, by name")
    parser.add_argument("--limit", type=int, default=24, help="only the first photographs of each set")
    parser.add_argument("--sheets", type=Path, default=cache_directory() / "quality", help="folder of the sheets")
    arguments = parser.parse_args()
    is_checkpoint = arguments.weights.suffix == ".pt"
    student = load_student(arguments.weights)[0] if is_checkpoint else student_from_weights(load(arguments.weights))
    methods = {
        "bicubic": pillow_upscaler(Image.Resampling.BICUBIC),
        "Lanczos": pillow_upscaler(Image.Resampling.LANCZOS),
    }
    for timestep in map(int, arguments.timesteps.split(",")):
        methods[f"tadsr-mini t={timestep}"] = student_upscaler(student, timestep)
    for kind in arguments.kinds.split(","):
        if arguments.held_out:
            samples = held_out_samples(arguments.held_out, kind, arguments.limit)
        else:
            samples = load_test_set(kind)[: arguments.limit]
        print(f"\n{kind}, mean of {len(samples)}:\n\n{table(measure(methods, samples, arguments.sheets / kind))}")
    print(f"\nsheets: {arguments.sheets}")


if __name__ == "__main__":
    main()
