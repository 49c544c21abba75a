"""Losses of TADSR, each a small function: reconstruction of images in [-1, 1], distillation of scaled latents.

Each is per sample, (B,). A score is a network that predicts the noise (B, 4, h, w) in a noisy latent, given the
latent, the timesteps (B,) and the context (B, tokens, width).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tadsr.schedule import add_noise, x0_from_noise

BLUR_STEP = 200  # paper, equation 14: the kernel grows every 200 timesteps
GUIDANCE_STEP = 200  # behaviour of the official code: 1 more every 200 timesteps
WEIGHT_FLOOR = 1e-6  # keeps a student that equals its teacher from a division by 0; latents are about 1

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def blur_size(timestep: int) -> int:
    """Returns the kernel size 5 + 4 floor(t / 200) (paper, equation 14)."""
    return 5 + 4 * (timestep // BLUR_STEP)


def blur_sigma(timestep: int) -> float:
    """Returns the kernel's standard deviation 1 + t / 200, in pixels (paper, equation 14)."""
    return 1 + timestep / BLUR_STEP


def gaussian_kernel(size: int, sigma: float) -> Tensor:
    """Returns a normalised one-dimensional Gaussian, (size,) float32, size odd."""
    x = torch.arange(size, dtype=torch.float32) - size // 2
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    return kernel / kernel.sum()


def blur(image: Tensor, timestep: Tensor) -> Tensor:
    """Returns each image blurred by its timestep's kernel, with reflected borders.

    image: (B, C, H, W), H and W greater than half the largest kernel (10); timestep: (B,), 0..999.
    """
    batch, channels, height, width = image.shape
    steps = [int(t) for t in timestep]
    largest = max(blur_size(t) for t in steps)
    half = largest // 2
    kernels = torch.stack(
        [F.pad(gaussian_kernel(blur_size(t), blur_sigma(t)), [half - blur_size(t) // 2] * 2) for t in steps]
    ).to(image)
    kernels = kernels.repeat_interleave(channels, dim=0)[:, None, None, :]
    flat = F.pad(image, [half] * 4, mode="reflect").reshape(1, batch * channels, height + 2 * half, -1)
    flat = F.conv2d(flat, kernels, groups=batch * channels)
    flat = F.conv2d(flat, kernels.transpose(2, 3), groups=batch * channels)
    return flat.reshape(batch, channels, height, width)


def blurred_mse(result: Tensor, target: Tensor, timestep: Tensor) -> Tensor:
    """Returns the mean squared difference of the blurred images, per sample (B,) (paper, equation 7).

    Blurring is linear, so the difference is blurred once. result, target: (B, 3, H, W) in [-1, 1].
    """
    return blur(result - target, timestep).square().mean(dim=(1, 2, 3))


def mse(result: Tensor, target: Tensor) -> Tensor:
    """Returns the mean squared difference, per sample (B,). result, target: (B, 3, H, W) in [-1, 1]."""
    return (result - target).square().mean(dim=(1, 2, 3))


def guidance_scale(teacher_timestep: Tensor, guidance: float) -> Tensor:
    """Returns the scale of classifier-free guidance, guidance + t_v / 200, per sample (B,)."""
    return guidance + teacher_timestep / GUIDANCE_STEP


@dataclass(frozen=True)
class Tavsd:
    """The distillation loss of a batch, and what it was made of."""

    loss: Tensor  # (B,): mean(g^2); its gradient with respect to z0 is 2 g / n, n the numbers of one latent
    gradient: Tensor  # g, (B, 4, h, w)
    weight: Tensor  # (B,): mean |z0 - x0_real|
    x0_real: Tensor  # (B, 4, h, w): the clean latent that the guided teacher sees
    x0_fake: Tensor  # (B, 4, h, w): the one that the fake score sees


def tavsd(
    z0: Tensor,
    noise: Tensor,
    teacher_timestep: Tensor,
    fake_score: Score,
    teacher: Score,
    context: Tensor,
    negative: Tensor,
    guidance: float,
) -> Tavsd:
    """Returns the time-aware variational score distillation of the student's latents (paper, equations 3 and 6).

    With random teacher timesteps it is plain VSD. z0: (B, 4, h, w), the student's scaled x0, the only
    argument that gets a gradient. noise: (B, 4, h, w). teacher_timestep: (B,), `tadsr.schedule.teacher_timestep` of the
    student's. context, negative: (B, tokens, width), the embeddings of the prompt and the negative prompt. guidance: of
    the teacher at timestep 0.
    """
    with torch.no_grad():
        z_t = add_noise(z0, noise, teacher_timestep)
        x0_fake = x0_from_noise(z_t, fake_score(z_t, teacher_timestep, context), teacher_timestep)
        guided_noise = guided(
            teacher, z_t, teacher_timestep, context, negative, guidance_scale(teacher_timestep, guidance)
        )
        x0_real = x0_from_noise(z_t, guided_noise, teacher_timestep)
        weight = (z0 - x0_real).abs().mean(dim=(1, 2, 3)).clamp(min=WEIGHT_FLOOR)
        gradient = (x0_fake - x0_real) / weight[:, None, None, None]
    target_distance = z0 - z0.detach() + gradient  # g, with the gradient of z0
    return Tavsd(target_distance.square().mean(dim=(1, 2, 3)), gradient, weight, x0_real, x0_fake)


def guided(teacher: Score, z_t: Tensor, timestep: Tensor, context: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
    """Returns the teacher's noise under classifier-free guidance of `scale`, (B,), in the latent's dtype."""
    twice = (torch.cat([z_t, z_t]), torch.cat([timestep, timestep]), torch.cat([negative, context]))
    unconditional, conditional = teacher(*twice).to(z_t.dtype).chunk(2)
    return unconditional + scale[:, None, None, None].to(z_t.device) * (conditional - unconditional)


def diffusion_loss(fake_score: Score, z0: Tensor, noise: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    """Returns the fake score's squared error on the student's latents, per sample (B,) (paper, equation 10).

    z0: (B, 4, h, w), scaled, gets no gradient; noise: (B, 4, h, w); timestep: (B,), uniform in 0..999.
    """
    z_t = add_noise(z0.detach(), noise, timestep)
    return (fake_score(z_t, timestep, context) - noise).square().mean(dim=(1, 2, 3))


def shared_crop(images: Sequence[Tensor], top: int, left: int, room: int) -> list[Tensor]:
    """Returns the part of each image, (B, C, H, W), that begins at (top, left), `room` pixels less high and wide.

    With top and left drawn from 0..room, a perceptual network's pooling grid lies anywhere on the decoder's. Where
    it always lies alike, small students answer with a regular pattern.
    """
    height, width = (side - room for side in images[0].shape[2:])
    return [image[:, :, top : top + height, left : left + width] for image in images]
