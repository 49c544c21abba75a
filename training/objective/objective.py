"""The losses of one micro batch: the student's (paper, equations 8 and 9) and the fake score's (equation 10).

Ours, and off unless `realism_weight` is set: a discriminator that counts in proportion to the timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tadsr.schedule import MAX_TIMESTEP
from training.config.train_config import TrainConfig
from training.metrics.lpips import LPIPS
from training.networks.discriminator import Discriminator, hinge_loss, judged, realism_loss
from training.networks.teacher import Teacher
from training.objective.losses import blurred_mse, diffusion_loss, mse, shifted, tavsd
from training.objective.timesteps import distillation_timesteps, fake_score_timesteps, student_timesteps
from training.randomness import sample_integers, sample_noise

Comparison = tuple[Tensor, list[Tensor], list[Tensor]]
"""Distances (B,), and features of results and photographs for the discriminator; none without `realism_weight`."""

Clock = Callable[[str], AbstractContextManager[None]]
"""Gives a context for each part of a step, which may measure it."""


def no_clock(part: str) -> AbstractContextManager[None]:
    """Measures nothing."""
    return nullcontext()


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass works on, on the device."""

    indices: Sequence[int]  # numbers of the samples, which decide all random choices
    lq: Tensor  # (B, 3, H, W) in [-1, 1], enlarged
    hq: Tensor  # (B, 3, H, W) in [-1, 1]
    context: Tensor  # (B, tokens, width): the prompts' embeddings
    negative: Tensor  # (B, tokens, width): that of the negative prompt


@dataclass(frozen=True)
class Networks:
    """The networks of a run; `student`, `fake_score` and `judge` may be wrapped for several processes."""

    student: nn.Module
    fake_score: nn.Module  # the Teacher, called with its LoRA on
    teacher: Teacher  # the same one without a wrapper
    perceptual: LPIPS
    perceptual_autocast: Callable[[], AbstractContextManager[Any]]  # the others have it in themselves
    discriminator: Discriminator
    judge: nn.Module  # the discriminator, called to train it


@dataclass(frozen=True)
class Judged:
    """What the discriminator learns from."""

    ours: list[Tensor]  # LPIPS's features of the results, without gradients
    real: list[Tensor]  # those of the photographs
    weight: Tensor  # (B,): how much it counts at their timesteps, in 0..1


@dataclass(frozen=True)
class StudentLoss:
    """The student's loss of a micro batch, and what the other networks learn from."""

    loss: Tensor  # a number
    parts: dict[str, float]  # for the report
    x0: Tensor  # (B, 4, h, w): the student's latents, without gradients
    judged: Judged | None  # None without `realism_weight`


def student_loss(
    config: TrainConfig, networks: Networks, batch: MicroBatch, downscale: int, clock: Clock = no_clock
) -> StudentLoss:
    """Returns the student's loss.

    downscale: image pixels per latent pixel, along each side.
    """
    device = batch.lq.device
    latent_shape = (4, batch.lq.shape[2] // downscale, batch.lq.shape[3] // downscale)
    timestep = student_timesteps(config, batch.indices).to(device)
    noise = None
    if config.sample_latent:
        noise = sample_noise(config.seed, "latent", batch.indices, latent_shape).to(device)
    with clock("student"):
        x0, image = networks.student(batch.lq, timestep, batch.context, noise)
        x0, image = x0.float(), image.float()
    with clock("reconstruction"):
        blurred = config.reconstruction == "blurred_mse"
        difference = blurred_mse(image, batch.hq, timestep) if blurred else mse(image, batch.hq)
    parts = {"mse": difference.mean()}
    loss = config.mse_weight * parts["mse"]
    to_judge = None
    if config.lpips_weight or config.realism_weight:
        with clock("lpips"), networks.perceptual_autocast():
            distance, ours, real = _compare(config, networks.perceptual, image, batch)
        parts["lpips"] = distance.mean()
        loss = loss + config.lpips_weight * parts["lpips"]
        if config.realism_weight:
            with clock("judge"):
                to_judge = Judged([feature.detach() for feature in ours], real, timestep / MAX_TIMESTEP)
                parts["realism"] = (to_judge.weight * realism_loss(networks.discriminator.verdicts(ours))).mean()
            loss = loss + config.realism_weight * parts["realism"]
    if config.distillation != "none":
        with clock("distillation"):
            parts["distillation"] = _distillation(config, networks.teacher, batch, x0, timestep)
        loss = loss + config.distillation_weight * parts["distillation"]
    return StudentLoss(loss, {name: part.item() for name, part in parts.items()}, x0.detach(), to_judge)


def _compare(config: TrainConfig, perceptual: LPIPS, image: Tensor, batch: MicroBatch) -> Comparison:
    """Compares by LPIPS; VGG's features are the largest tensors of a step, which checkpointing computes again."""
    room = config.lpips_shift
    first = batch.indices[0]  # one place for the micro batch
    top, left = sample_integers(config.seed, "LPIPS shift", (2 * first, 2 * first + 1), 0, room).tolist()
    parts = shifted((image, batch.hq), top, left, room)

    def compared(a: Tensor, b: Tensor) -> Comparison:
        ours, real = perceptual.features(a), perceptual.features(b)
        distance = perceptual.distance(ours, real)
        return (distance, judged(ours), judged(real)) if config.realism_weight else (distance, [], [])

    if not config.gradient_checkpointing:
        return compared(*parts)
    return cast(Comparison, checkpoint(compared, *parts, use_reentrant=False))


def _distillation(config: TrainConfig, teacher: Teacher, batch: MicroBatch, x0: Tensor, timestep: Tensor) -> Tensor:
    """Returns the loss of (timestep-aware) variational score distillation, a number."""
    t_v = distillation_timesteps(config, timestep.cpu(), batch.indices).to(x0.device)
    noise = sample_noise(config.seed, "distillation", batch.indices, tuple(x0.shape[1:])).to(x0.device)
    scores = (teacher, teacher.teach)
    return tavsd(x0, noise, t_v, *scores, batch.context, batch.negative, config.guidance).loss.mean()


def judge_loss(networks: Networks, judged: Judged) -> Tensor:
    """Returns the discriminator's own loss, a number."""
    return (judged.weight * hinge_loss(networks.judge(judged.real), networks.judge(judged.ours))).mean()


def fake_score_loss(config: TrainConfig, networks: Networks, batch: MicroBatch, x0: Tensor) -> Tensor:
    """Returns the diffusion loss of the fake score on the student's latents, a number (paper, equation 10)."""
    noise = sample_noise(config.seed, "fake score", batch.indices, tuple(x0.shape[1:])).to(x0.device)
    timestep = fake_score_timesteps(config, batch.indices).to(x0.device)
    return diffusion_loss(networks.fake_score, x0, noise, timestep, batch.context).mean()
