"""Evaluates weights on a test set as section 4.1 of the paper does (x4, 128 -> 512 pixels).

    python -m training.evaluate --weights W [--base B] --data DIR|PAIRS [--timesteps 100,200,...,900]
        [--dape FILE] [--prompt TEXT] [--text-encoder DIR]
        [--methods NAME=DIR ...] [--metrics psnr,ssim,...] [--output DIR] [--limit N]

--data is a folder or a list of pairs, as `training.evaluation.test_set` describes. Lanczos enlargement, the weights at
each timestep and other methods' pictures are measured side by side; OUTPUT gets results.md, results.csv (a line for
each picture and method), results.json and curve.png (fidelity against realism, figure 6 of the paper).
`accelerate launch -m training.evaluate ...` shares the pictures out over its processes, a GPU each; several processes
on CPUs need ACCELERATE_USE_CPU=true and `torchrun --nproc-per-node N`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tadsr.schedule import check_timestep
from training.evaluation.prompts import Prompts, Wanted, find_prompts
from training.evaluation.report import Evaluation, Row, markdown, write_report
from training.evaluation.test_set import (
    EvaluationError,
    TestPicture,
    check_sizes,
    find_pictures,
    other_method,
    read_picture,
)
from training.images import to_picture, to_tensor
from training.metrics.registry import METRICS, Metrics
from training.networks.inference import DEFAULT_SCALE, Restorer

TIMESTEPS = (100, 200, 300, 400, 500, 600, 700, 800, 900)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Sample:
    """A test picture, read."""

    name: str
    lq: Tensor  # (1, 3, h, w) in [0, 1]
    hq: Tensor | None  # (1, 3, scale h, scale w) in [0, 1]
    scale: int  # 1: the low-quality picture has been enlarged already


@dataclass(frozen=True)
class Method:
    """A way to restore a sample: (1, 3, scale h, scale w) in [0, 1], rounded to 8 bits."""

    name: str
    restore: Callable[[Sample], Tensor]
    timestep: int | None = None  # None: not ours


def read_sample(picture: TestPicture, scale: int = DEFAULT_SCALE, crop: int = 0) -> Sample:
    """Returns the pictures of a test picture whose sizes `check_sizes` accepts.

    crop: side of the centre of the low-quality picture that is kept (the truth's is `scale` times it); 0: all.
    Raises EvaluationError for a broken file or a picture smaller than the crop.
    """
    lq = read_picture(picture.lq)
    hq = None if picture.hq is None else read_picture(picture.hq)
    if hq is not None and hq.shape == lq.shape:
        scale, crop = 1, crop * scale
    if crop:
        height, width = lq.shape[2:]
        if min(height, width) < crop:
            raise EvaluationError(f"{picture.lq} is {width}x{height} pixels; accepted with --crop: sides from {crop}")
        top, left = (height - crop) // 2, (width - crop) // 2
        lq = _cut(lq, top, left, crop)
        hq = None if hq is None else _cut(hq, top * scale, left * scale, crop * scale)
    return Sample(picture.name, lq, hq, scale)


def lanczos(sample: Sample) -> Tensor:
    """Returns Pillow's Lanczos enlargement."""
    height, width = (side * sample.scale for side in sample.lq.shape[2:])
    return to_tensor(np.asarray(to_picture(sample.lq).resize((width, height), Image.Resampling.LANCZOS)))


def our_method(restorer: Restorer, timestep: int, name: str, prompts: Prompts) -> Method:
    """Returns the weights at a timestep."""

    def restore(sample: Sample) -> Tensor:
        context = prompts.context(sample.name)
        return (restorer(sample.lq, timestep, sample.scale, context).cpu() * 255).round() / 255

    return Method(f"{name} t={timestep}", restore, timestep)


def folder_method(name: str, folder: Path, pictures: Sequence[TestPicture]) -> Method:
    """Returns what reads another method's pictures. Raises EvaluationError where one is missing or of another size."""
    paths = other_method(folder, pictures)

    def restore(sample: Sample) -> Tensor:
        result = read_picture(paths[sample.name])
        expected = tuple(side * sample.scale for side in sample.lq.shape[2:])
        if tuple(result.shape[2:]) != expected:
            raise EvaluationError(
                f"{paths[sample.name]} is {result.shape[3]}x{result.shape[2]} pixels; "
                f"accepted for {sample.name}: {expected[1]}x{expected[0]}"
            )
        return result

    return Method(name, restore)


def share(count: int, process: int, processes: int) -> range:
    """Returns the indices, of `count` pictures, that a process takes: every processes-th, so that shares are alike."""
    return range(process, count, processes)


def measure(
    pictures: Sequence[TestPicture],
    indices: Sequence[int],
    methods: Sequence[Method],
    metrics: Metrics,
    *,
    scale: int = DEFAULT_SCALE,
    crop: int = 0,
    device: torch.device | str = "cpu",
    save: Path | None = None,
    quiet: bool = True,
) -> list[tuple[int, Row]]:
    """Returns the rows of the pictures with these indices, each with its picture's index.

    save: a folder that gets every method's pictures, as <method>/<picture>.png. Errors as `read_sample` and the
    methods raise them.
    """
    rows = []
    for index in tqdm(indices, desc="evaluating", unit="picture", disable=quiet):
        sample = read_sample(pictures[index], scale, crop)
        score = metrics.scorer(None if sample.hq is None else sample.hq.to(device))
        for method in methods:
            result = method.restore(sample)
            rows.append((index, Row(sample.name, method.name, method.timestep, score(result.to(device)))))
            if save is not None:
                _save(save / method.name / f"{sample.name}.png", result)
    return rows


def evaluate(arguments: argparse.Namespace, state: PartialState) -> Evaluation:
    """Returns what was found over all processes, the same in each. Raises EvaluationError and WeightsError."""
    device = state.device
    assert device is not None  # accelerate sets it, and declares it as optional
    pictures = find_pictures(arguments.data)[: arguments.limit]
    check_sizes(pictures, arguments.scale)
    others = [folder_method(name, folder, pictures) for name, folder in arguments.methods]
    with state.main_process_first():  # pyiqa downloads weights
        metrics = Metrics(arguments.metrics, device, arguments.border)
    restorer = Restorer.load(arguments.weights, arguments.base, device, DTYPES[arguments.dtype])
    indices = share(len(pictures), state.process_index, state.num_processes)
    prompts = find_prompts(
        Wanted(arguments.prompt, arguments.dape, arguments.text_encoder),
        pictures,
        [pictures[index] for index in indices],
        lambda picture: read_sample(picture, arguments.scale, arguments.crop),
        arguments.base or arguments.weights,
        device,
    )
    ours = [our_method(restorer, timestep, arguments.weights.stem, prompts) for timestep in arguments.timesteps]
    rows = measure(
        pictures,
        indices,
        [Method("Lanczos", lanczos), *ours, *others],
        metrics,
        scale=arguments.scale,
        crop=arguments.crop,
        device=device,
        save=arguments.output / "pictures" if arguments.save else None,
        quiet=not state.is_main_process,
    )
    gathered = sorted(gather_object(rows), key=lambda row: row[0])  # stable: methods keep their order
    missing = {name: reason for found in gather_object([metrics.missing]) for name, reason in found.items()}
    if not any(picture.hq for picture in pictures):
        needing = [name for name in metrics.names if METRICS[name].needs_reference]
        missing |= dict.fromkeys(needing, "the test set has no high-quality pictures")
    return Evaluation(
        data=str(arguments.data),
        weights=str(arguments.weights),
        border=arguments.border,
        prompts=prompts.source,
        rows=[row for _, row in gathered],
        missing=missing,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    try:
        evaluation = evaluate(arguments, state)
    except ValueError as error:  # EvaluationError, WeightsError, PromptError, sizes that a metric refuses
        print(f"evaluation: {error}", file=sys.stderr)
        return 1
    if state.is_main_process:
        written = write_report(arguments.output, evaluation)
        print(f"{markdown(evaluation)}\n\n{', '.join(map(str, written))}")
    state.destroy_process_group()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="a TADSR weights file")
    parser.add_argument("--base", type=Path, help="its base model, unless it is self-contained")
    parser.add_argument("--data", type=Path, required=True, help="the test set: a folder, or a list of HQ LQ pairs")
    parser.add_argument("--timesteps", type=timesteps_in, default=TIMESTEPS, help="default: 100,200,...,900")
    parser.add_argument("--dape", type=Path, help="a tagger that makes the prompts, of python -m tadsr.convert --ram")
    parser.add_argument("--prompt", help="a text for all pictures; with --dape it comes after the tags")
    parser.add_argument(
        "--text-encoder", type=Path, help="folder with text_encoder/ and tokenizer/, unless --base is one"
    )
    parser.add_argument("--methods", type=_named_folder, nargs="*", default=[], metavar="NAME=DIR")
    parser.add_argument("--metrics", type=_names, default=tuple(METRICS), help=f"of {','.join(METRICS)}")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--limit", type=positive, help="only the first pictures, by name")
    parser.add_argument("--scale", type=positive, default=DEFAULT_SCALE)
    parser.add_argument("--crop", type=int, default=0, help="keep this side of each picture's centre; 0: all of it")
    parser.add_argument("--border", type=int, default=0, help="pixels that PSNR and SSIM leave out at each side")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--save", action="store_true", help="write all methods' pictures to OUTPUT/pictures")
    return parser


def timesteps_in(text: str) -> tuple[int, ...]:
    """Returns the timesteps in a text such as 100,500; raises argparse's error for others than 1..999."""
    try:
        return tuple(check_timestep(int(part)) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: NAME=DIR")
    return name, Path(folder)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; accepted: {', '.join(METRICS)}")
    return names


def positive(text: str) -> int:
    """Returns the integer in a text; raises argparse's error unless it is at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}; accepted: integers from 1")
    return number


def _cut(image: Tensor, top: int, left: int, side: int) -> Tensor:
    return image[..., top : top + side, left : left + side]


def _save(path: Path, picture: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    to_picture(picture).save(path)


if __name__ == "__main__":
    sys.exit(main())
