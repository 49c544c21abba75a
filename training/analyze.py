"""Draws figures 3 and 4 of the paper from one's own weights.

    python -m training.analyze --weights W [--base B] --data DIR --output DIR [--checkpoint RUN/checkpoints/step-...]
        [--timesteps 100,200,...,900] [--limit N]

Figure 3, the latent z of the Time-Aware Encoder: latent.png (mean and standard deviation by timestep) and
latent-pca.png (principal components). Figure 4, score distillation: gradient.png (mean and standard deviation of the
VSD gradient by teacher timestep) and predictions.png (the decoded x0 of the guided teacher and of the fake score).
The fake score is only in checkpoints of a training, so figure 4 needs --checkpoint. --data is a test set as
`training.evaluation.test_set` describes; only its low-quality pictures are used, the centre of each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tadsr.schedule import DEFAULT_TIMESTEP
from training.config.train_config import from_saved
from training.evaluate import TIMESTEPS, Sample, positive, read_sample, timesteps_in
from training.evaluation.figures import draw_scatter, draw_sheet, draw_statistics
from training.evaluation.test_set import find_pictures
from training.networks.base import load_base
from training.networks.inference import Restorer
from training.networks.teacher import Teacher
from training.objective.losses import Tavsd, tavsd
from training.randomness import sample_noise
from training.run.build import build_prompts, build_teacher
from training.run.checkpoint import NAME, Checkpoint, CheckpointError

SEED = 0  # of the noise in which teacher and fake score look
CROP = 128  # paper, section 4.1: low-quality pictures of the test sets
LIMIT = 16
SHEET_COLUMNS = 5  # timesteps at which predictions are shown


@dataclass(frozen=True)
class Scores:
    """The networks of score distillation, and the embeddings (1, tokens, width) that they are asked with."""

    teacher: Teacher
    context: Tensor
    negative: Tensor
    guidance: float


def latents(restorer: Restorer, samples: Sequence[Sample], timesteps: Sequence[int]) -> Tensor:
    """Returns z, (timesteps, samples, 4, h, w) float32 on the CPU. The samples have one size."""
    rows = [torch.cat([restorer.latent(s.lq, t, s.scale).float().cpu() for s in samples]) for t in timesteps]
    return torch.stack(rows)


def mean_and_deviation(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation over each latent: (timesteps, samples, ...) -> twice (timesteps, samples)."""
    flat = values.flatten(2).double()
    return flat.mean(dim=2).numpy(), flat.std(dim=2, correction=0).numpy()


def principal_components(vectors: Tensor, count: int = 2) -> tuple[np.ndarray, list[float]]:
    """Returns the coordinates (N, count) on the first principal components, and their shares of the variance.

    vectors: (N, D), N and D at least `count`. A component's sign makes its largest coordinate positive.
    """
    centred = vectors.double() - vectors.double().mean(dim=0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    coordinates = left[:, :count] * singular[:count]
    largest = coordinates.gather(0, coordinates.abs().argmax(dim=0, keepdim=True))
    shares = singular.square() / singular.square().sum()
    return (coordinates * largest.sign()).numpy(), shares[:count].tolist()


def load_scores(path: Path, base: Path | None = None, device: torch.device | str = "cpu") -> Scores:
    """Returns teacher and fake score of a training checkpoint (RUN/checkpoints/step-...).

    base: the base model, where it is no longer at the training's place. Raises CheckpointError, WeightsError and
    PromptError.
    """
    named = NAME.fullmatch(path.name)
    if named is None or not path.is_dir():
        raise CheckpointError(f"{path} is no training checkpoint; accepted: a folder RUN/checkpoints/step-...")
    checkpoint = Checkpoint(int(named[1]), path)
    config = from_saved(checkpoint.state()["config"])
    if config.distillation == "none":
        raise CheckpointError(f"{path} was trained without distillation, so it has no fake score")
    if base is not None:
        config = replace(config, base=base)
    texts = [config.prompt, config.negative_prompt]
    prompts = build_prompts(config, texts, "cpu")
    teacher = build_teacher(config, load_base(config.base))
    checkpoint.copy_into(teacher.trainable(), checkpoint.tensors(), "fake_score.")
    context, negative = (prompts.batch([text]).to(device) for text in texts)
    return Scores(teacher.to(device).eval(), context, negative, config.guidance)


@torch.no_grad()
def distillation(scores: Scores, x0: Tensor, timestep: int, index: int) -> Tavsd:
    """Returns score distillation at one teacher timestep. x0: (1, 4, h, w), scaled, of sample `index`."""
    noise = sample_noise(SEED, "analysis", [index], tuple(x0.shape[1:])).to(x0.device)
    return tavsd(
        z0=x0,
        noise=noise,
        teacher_timestep=torch.tensor([timestep], device=x0.device),
        fake_score=scores.teacher,
        teacher=scores.teacher.teach,
        context=scores.context,
        negative=scores.negative,
        guidance=scores.guidance,
    )


def gradients(scores: Scores, clean: Sequence[Tensor], timesteps: Sequence[int]) -> Tensor:
    """Returns VSD gradients, (timesteps, samples, 4, h, w), on the CPU. clean: the samples' x0."""
    rows = []
    for timestep in timesteps:
        found = [distillation(scores, x0, timestep, index).gradient.cpu() for index, x0 in enumerate(clean)]
        rows.append(torch.cat(found))
    return torch.stack(rows)


def predictions(restorer: Restorer, scores: Scores, x0: Tensor, timesteps: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns what guided teacher and fake score take sample 0 for, decoded: (timesteps, H, W, 3) in [0, 1]."""
    found = [distillation(scores, x0, timestep, 0) for timestep in timesteps]
    latent = {"teacher": [f.x0_real for f in found], "fake score": [f.x0_fake for f in found]}
    return {
        name: np.stack([restorer.decode(x)[0].permute(1, 2, 0).cpu().numpy() for x in row])
        for name, row in latent.items()
    }


def draw_latents(folder: Path, restorer: Restorer, samples: Sequence[Sample], timesteps: Sequence[int]) -> list[Path]:
    """Writes figure 3; returns its files."""
    z = latents(restorer, samples, timesteps)
    files = [folder / "latent.png", folder / "latent-pca.png"]
    draw_statistics(files[0], timesteps, *mean_and_deviation(z), what="the latent z", axis="timestep")
    coordinates, shares = principal_components(z.flatten(0, 1).flatten(1))
    grid = coordinates.reshape(len(timesteps), len(samples), -1)
    draw_scatter(files[1], timesteps, grid, shares, "the latent z")
    return files


def draw_distillation(
    folder: Path, restorer: Restorer, scores: Scores, samples: Sequence[Sample], timesteps: Sequence[int]
) -> list[Path]:
    """Writes figure 4, for the student's result at timestep 500; returns its files."""
    student = DEFAULT_TIMESTEP
    clean = [restorer.clean_latent(restorer.latent(s.lq, student, s.scale), student).float() for s in samples]
    files = [folder / "gradient.png", folder / "predictions.png"]
    statistics = mean_and_deviation(gradients(scores, clean, timesteps))
    draw_statistics(files[0], timesteps, *statistics, what="the VSD gradient", axis="teacher timestep")
    places = np.linspace(0, len(timesteps) - 1, min(SHEET_COLUMNS, len(timesteps))).round().astype(int)
    shown = [timesteps[place] for place in places]
    rows = predictions(restorer, scores, clean[0], shown)
    draw_sheet(files[1], list(rows.items()), [f"t = {timestep}" for timestep in shown])
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        written = _analyze(arguments)
    except ValueError as error:  # EvaluationError, WeightsError, CheckpointError, PromptError
        print(f"analysis: {error}", file=sys.stderr)
        return 1
    print(f"figures: {', '.join(map(str, written))}")
    if arguments.checkpoint is None:
        print("left out: figure 4, which needs the fake score of a training: --checkpoint RUN/checkpoints/step-...")
    return 0


def _analyze(arguments: argparse.Namespace) -> list[Path]:
    timesteps = sorted(set(arguments.timesteps))
    if len(timesteps) < 2:
        raise ValueError(f"timesteps are {timesteps}; accepted: two or more, to compare them")
    pictures = find_pictures(arguments.data)[: arguments.limit]
    samples = [read_sample(picture, crop=arguments.crop) for picture in pictures]
    device = arguments.device
    restorer = Restorer.load(arguments.weights, arguments.base, device)
    written = draw_latents(arguments.output, restorer, samples, timesteps)
    if arguments.checkpoint is not None:
        scores = load_scores(arguments.checkpoint, arguments.base, device)
        written += draw_distillation(arguments.output, restorer, scores, samples, timesteps)
    return written


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="a TADSR weights file")
    parser.add_argument("--base", type=Path, help="its base model, unless it is self-contained")
    parser.add_argument("--data", type=Path, required=True, help="a test set: a folder, or a list of HQ LQ pairs")
    parser.add_argument("--output", type=Path, default=Path("runs/analysis"))
    parser.add_argument("--checkpoint", type=Path, help="of the training that made the weights, for figure 4")
    parser.add_argument("--timesteps", type=timesteps_in, default=TIMESTEPS, help="default: 100,200,...,900")
    parser.add_argument("--limit", type=positive, default=LIMIT, help=f"pictures (default: {LIMIT})")
    parser.add_argument("--crop", type=positive, default=CROP, help=f"side of their centre (default: {CROP})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    sys.exit(main())
