"""What the networks learn from one micro batch: the student (paper, equations 8 and 9) and the fake score (10).

Ours, and off unless `adversarial_weight` is set: a discriminator that counts in proportion to the timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tadsr.schedule import MAX_TIMESTEP
from training.metrics.lpips import LPIPS
from training.networks.discriminator import Discriminator, chosen, discriminator_loss, generator_loss
from training.networks.teacher import Teacher
from training.objective.losses import blurred_mse, diffusion_loss, mse, shared_crop, tavsd
from training.objective.settings import LossSettings
from training.objective.timesteps import distillation_timesteps, fake_score_timesteps, student_timesteps
from training.randomness import sample_integers, sample_noise

Comparison = tuple[Tensor, list[Tensor], list[Tensor]]
"""Distances (B,), and features of results and photographs for the discriminator; none without one."""

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
class Compared:
    """What the discriminator learns from."""

    results: list[Tensor]  # LPIPS's features, without gradients
    photographs: list[Tensor]
    weight: Tensor  # (B,): how much it counts at their timesteps, in 0..1


@dataclass(frozen=True)
class StudentLoss:
    """The student's loss of a micro batch, and what the other networks learn from."""

    loss: Tensor  # a number
    parts: dict[str, Tensor]  # numbers without gradients, for the report
    x0: Tensor  # (B, 4, h, w): the student's latents, without gradients
    compared: Compared | None  # None without a discriminator


class Objective:
    """The losses of a run's networks, each a number.

    Networks are handed over where they are used, as the run wrapped them for training.
    """

    def __init__(
        self,
        settings: LossSettings,
        perceptual: LPIPS,
        downscale: int,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        clock: Clock = no_clock,
    ) -> None:
        """downscale: image pixels per latent pixel, along each side; autocast: the precision of LPIPS."""
        self.settings, self.perceptual, self.downscale = settings, perceptual, downscale
        self._autocast, self._clock = autocast, clock

    def student(
        self,
        student: nn.Module,
        batch: MicroBatch,
        teacher: Teacher | None = None,
        discriminator: Discriminator | None = None,
    ) -> StudentLoss:
        """Returns the student's loss. teacher: None without distillation; discriminator: None without its part."""
        settings, timestep = self.settings, self.timestep(batch)
        with self._clock("student"):
            x0, image = student(batch.lq, timestep, batch.context, self._latent_noise(batch))
            x0, image = x0.float(), image.float()
        with self._clock("reconstruction"):
            parts = {"mse": self._reconstruction(image, batch, timestep)}
        loss = settings.mse_weight * parts["mse"]
        compared = None
        if settings.lpips_weight or discriminator is not None:
            with self._clock("lpips"), self._autocast():
                distance, ours, real = self._compare(image, batch)
            parts["lpips"] = distance.mean()
            loss = loss + settings.lpips_weight * parts["lpips"]
            if discriminator is not None:
                compared = Compared([feature.detach() for feature in ours], real, timestep / MAX_TIMESTEP)
                with self._clock("discriminator"):
                    logits = discriminator.frozen_logits(ours)
                    parts["adversarial"] = (compared.weight * generator_loss(logits)).mean()
                loss = loss + settings.adversarial_weight * parts["adversarial"]
        if teacher is not None:
            with self._clock("distillation"):
                parts["distillation"] = self._distillation(teacher, batch, x0, timestep)
            loss = loss + settings.distillation_weight * parts["distillation"]
        return StudentLoss(loss, {name: part.detach() for name, part in parts.items()}, x0.detach(), compared)

    def discriminator(self, discriminator: nn.Module, compared: Compared) -> Tensor:
        """Returns the discriminator's own loss."""
        logits = discriminator(compared.photographs), discriminator(compared.results)
        return (compared.weight * discriminator_loss(*logits)).mean()

    def fake_score(self, fake_score: nn.Module, batch: MicroBatch, x0: Tensor) -> Tensor:
        """Returns the diffusion loss of the fake score on the student's latents (paper, equation 10)."""
        noise = sample_noise(self.settings.seed, "fake score", batch.indices, tuple(x0.shape[1:])).to(x0.device)
        timestep = fake_score_timesteps(self.settings, batch.indices).to(x0.device)
        return diffusion_loss(fake_score, x0, noise, timestep, batch.context).mean()

    def timestep(self, batch: MicroBatch) -> Tensor:
        """Returns the student's timesteps, (B,), on the batch's device."""
        return student_timesteps(self.settings, batch.indices).to(batch.lq.device)

    def _latent_noise(self, batch: MicroBatch) -> Tensor | None:
        if not self.settings.sample_latent:
            return None
        shape = (4, batch.lq.shape[2] // self.downscale, batch.lq.shape[3] // self.downscale)
        return sample_noise(self.settings.seed, "latent", batch.indices, shape).to(batch.lq.device)

    def _reconstruction(self, image: Tensor, batch: MicroBatch, timestep: Tensor) -> Tensor:
        blurred = self.settings.reconstruction == "blurred_mse"
        return (blurred_mse(image, batch.hq, timestep) if blurred else mse(image, batch.hq)).mean()

    def _compare(self, image: Tensor, batch: MicroBatch) -> Comparison:
        """Compares by LPIPS; VGG's features are the largest tensors of a step, which checkpointing computes again."""
        settings, perceptual = self.settings, self.perceptual
        crops = shared_crop((image, batch.hq), *self._place(batch), settings.lpips_shift)

        def compared(a: Tensor, b: Tensor) -> Comparison:
            ours, real = perceptual.features(a), perceptual.features(b)
            distance = perceptual.distance(ours, real)
            return (distance, chosen(ours), chosen(real)) if settings.adversarial_weight else (distance, [], [])

        if not settings.gradient_checkpointing:
            return compared(*crops)
        return cast(Comparison, checkpoint(compared, *crops, use_reentrant=False))

    def _place(self, batch: MicroBatch) -> tuple[int, int]:
        """Returns top and left of the crop that LPIPS sees: one place for the micro batch."""
        if not self.settings.lpips_shift:
            return 0, 0
        first = batch.indices[0]
        numbers = (2 * first, 2 * first + 1)
        top, left = sample_integers(self.settings.seed, "LPIPS shift", numbers, 0, self.settings.lpips_shift).tolist()
        return top, left

    def _distillation(self, teacher: Teacher, batch: MicroBatch, x0: Tensor, timestep: Tensor) -> Tensor:
        """Returns the loss of (timestep-aware) variational score distillation."""
        settings = self.settings
        t_v = distillation_timesteps(settings, timestep.cpu(), batch.indices).to(x0.device)
        noise = sample_noise(settings.seed, "distillation", batch.indices, tuple(x0.shape[1:])).to(x0.device)
        scores = (teacher, teacher.teach)
        return tavsd(x0, noise, t_v, *scores, batch.context, batch.negative, settings.guidance).loss.mean()
