"""Trains the UNet of tadsr-mini: `python -m training.mini.learn --samples DIR --output RUN`.

First in latent space: the target's latent is known, so a step needs neither encoder nor decoder, only L1 between
latents. Low timesteps learn the photograph, high ones the upscaler's picture, those between a mixture. Then, with
`--start RUN --lpips 0.3 --lattice 0.1`, in pixels too: LPIPS, the more the higher the timestep, and a loss on the
lattice of 4 pixels; `--adversarial 0.5` adds a discriminator on features of VGG16. The run's folder holds
`checkpoint.pt`, written every few minutes (the same command goes on from it), and `log.jsonl`.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tadsr.schedule import MAX_TIMESTEP, MIN_TIMESTEP, alpha_bar
from training.data.storage import write_atomically
from training.metrics.lpips import LPIPS
from training.metrics.reference import luma
from training.mini.batches import Batch, Batches
from training.mini.descent import follow, half_cosine
from training.mini.patches import SIDE, Patches
from training.mini.samples import PATCHES
from training.mini.unet import Residual
from training.networks.discriminator import Discriminator, chosen, discriminator_loss, generator_loss
from training.objective.losses import shared_crop

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
LEAST_RATE = 0.05  # of the peak, at the end of the cosine
LOGGED = 50  # steps in a line of the log
PHOTOGRAPH_TO, TEACHER_FROM = 100, 900  # timesteps
LPIPS_SHIFT = 7  # pixels: AlexNet's grid of 4 may lie anywhere on the patches'
WEAVE = 40.0  # its weight beside the shares
DISCRIMINATOR_RATE = 4e-4
NEIGHBOURS = 8  # patches along a side of the area in which a weave is looked for
TINY = 1e-12
FLAT = 1e-4  # of second differences: where there is nothing, there is no lattice either


def teacher_share(timestep: Tensor) -> Tensor:
    """Returns how much of the target is the upscaler's picture, 0..1. timestep: (B,)."""
    return ((timestep - PHOTOGRAPH_TO) / (TEACHER_FROM - PHOTOGRAPH_TO)).clamp(0, 1)


def draw_timesteps(count: int, faithful: float, rng: np.random.Generator) -> Tensor:
    """Returns `count` timesteps, uniform; a share `faithful` of them is drawn where the photograph alone is learned."""
    timesteps = rng.integers(MIN_TIMESTEP, MAX_TIMESTEP + 1, size=count)
    low = rng.integers(MIN_TIMESTEP, PHOTOGRAPH_TO + 1, size=count)
    return torch.from_numpy(np.where(rng.random(count) < faithful, low, timesteps))


def learning_rate(step: int, peak: float, warmup: int, progress: float) -> float:
    """Returns the rate of a step: a linear rise, and half a cosine to the end. progress: 0..1."""
    return peak * min(1.0, (step + 1) / warmup) * half_cosine(progress, LEAST_RATE)


def lattice_shares(image: Tensor) -> Tensor:
    """Returns squared second differences of luma by their phase modulo 4, over their mean: (B, 2, 4).

    image: (B, 3, H, W) in [-1, 1]. All are 1 in a photograph, nearly.
    """
    shares = []
    for values in (luma(image), luma(image).mT):
        second = values.float().diff(n=2, dim=3).square()
        whole = second[..., : second.shape[3] // SIDE * SIDE]
        energy = whole.unflatten(3, (-1, SIDE)).mean(dim=(1, 2, 3)) + FLAT
        shares.append(energy / energy.mean(dim=1, keepdim=True))
    return torch.stack(shares, dim=1)


def weave(difference: Tensor) -> Tensor:
    """Returns what of a difference repeats from patch to patch, as a mean magnitude: a 0-dimensional tensor.

    difference: (B, 3, H, W), sides at least 32. Over 8x8 neighbouring patches chance averages out, and a lattice stays,
    however weak it is beside the edges elsewhere in the picture.
    """
    patches = F.pixel_unshuffle(difference, SIDE).unflatten(1, (3, SIDE**2))
    patches = patches - patches.mean(dim=2, keepdim=True)
    return F.avg_pool2d(patches.flatten(1, 2), NEIGHBOURS, stride=NEIGHBOURS // 2).abs().mean()


class Adversary:
    """A discriminator on VGG16's features, and its optimizer."""

    def __init__(self, device: torch.device) -> None:
        self.backbone = LPIPS(net="vgg").to(device)
        self.discriminator = Discriminator().to(device)
        self.optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=DISCRIMINATOR_RATE, betas=(0.5, 0.99))

    def features(self, image: Tensor) -> list[Tensor]:
        """Returns what the discriminator looks at. image: (B, 3, H, W) in [-1, 1]."""
        return chosen(self.backbone.features(image))

    def learn(self, real: Tensor, fake: list[Tensor], weight: Tensor) -> Tensor:
        """Takes a step of the discriminator; returns its loss. fake: features; weight: (B,)."""
        with torch.no_grad():
            true = self.features(real)
        loss = discriminator_loss(self.discriminator(true), self.discriminator([each.detach() for each in fake]))
        loss = (weight * loss).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Objective:
    """The loss of a batch, and its parts by name."""

    def __init__(self, options: argparse.Namespace) -> None:
        device = options.device
        patches = Patches.load(options.samples / PATCHES)
        self.patches = Patches(patches.components.to(device), patches.deviations.to(device))
        weight = self.patches.deviations**options.detail
        self.weight = (weight * self.patches.deviations.sum() / weight.sum())[:, None, None]
        self.perceptual = LPIPS(net="alex").to(device) if options.lpips else None
        self.adversary = Adversary(device) if options.adversarial else None
        self.options = options

    def __call__(self, network: Residual, batch: Batch, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        options, device = self.options, self.options.device
        timestep = draw_timesteps(len(batch.lq), options.faithful, rng).to(device)
        share, taught = alpha_bar(timestep).sqrt(), teacher_share(timestep)
        mixed = taught[:, None, None, None]
        target = batch.photograph + mixed * (batch.teacher - batch.photograph)
        latent, clean = self.patches.encode(batch.lq), self.patches.encode(target)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.half):
            result = network(latent * share[:, None, None, None], share, timestep)
        l1 = self._l1(result, clean)
        parts = {"l1": l1, "without": self._l1(latent, clean)}
        if not (options.lpips or options.lattice):
            return l1, parts
        image = self.patches.decode(result)
        parts["lattice"] = (lattice_shares(image) - lattice_shares(target)).square().mean()
        parts["weave"] = weave(image - target)
        pixels = options.lattice * (parts["lattice"] + WEAVE * parts["weave"])
        top, left = (int(n) for n in rng.integers(0, LPIPS_SHIFT + 1, size=2))
        real = torch.from_numpy(rng.random(len(timestep)) < options.photograph).to(device)[:, None, None, None]
        sharp = torch.where(real, batch.photograph, batch.teacher)  # a mixture of both would be soft
        ours, theirs = shared_crop((image, sharp), top, left, LPIPS_SHIFT)
        if self.perceptual is not None:
            distance = self.perceptual(ours, theirs)
            parts["lpips"] = distance.mean()
            least = options.least_lpips
            pixels = pixels + options.lpips * (distance * (least + (1 - least) * taught)).mean()
        loss = l1 + pixels
        if self.adversary is not None:
            features = self.adversary.features(ours)
            adversarial = (taught * generator_loss(self.adversary.discriminator.frozen_logits(features))).mean()
            (pull,) = torch.autograd.grad(adversarial, image)
            ratio = _pull(pixels, image) / pull.norm().clamp_min(TINY)
            loss = loss + options.adversarial * (image * (ratio * pull)).sum()  # its gradient is what counts
            parts |= {"ratio": ratio, "discriminator": self.adversary.learn(theirs, features, taught)}
        return loss, parts

    def _l1(self, a: Tensor, b: Tensor) -> Tensor:
        return ((a - b).abs() * self.weight).mean()


def _pull(loss: Tensor, image: Tensor) -> Tensor:
    """Returns how strongly a loss pulls at an image: the norm of its gradient."""
    return torch.autograd.grad(loss, image, retain_graph=True)[0].norm()


class Run:
    """Network, averaged network and optimizer of a run's folder, as far as it has come."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.options, self.step, self.seconds = options, 0, 0.0
        self.network = Residual().to(options.device)
        if options.device.type != "cpu":
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=options.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        options.output.mkdir(parents=True, exist_ok=True)
        self.path = options.output / CHECKPOINT
        if self.path.is_file():
            self._load(torch.load(self.path, weights_only=True, map_location=options.device))
        elif options.start:
            state = torch.load(options.start / CHECKPOINT, weights_only=True, map_location=options.device)
            for network in (self.network, self.average):
                network.load_state_dict(state["average"])

    @property
    def progress(self) -> float:
        """0..1, by steps or, with a limit of minutes, by time."""
        options = self.options
        return self.seconds / 60 / options.minutes if options.minutes else self.step / options.steps

    def _load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state.get("seconds", 0.0)

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        state = {name: getattr(self, name).state_dict() for name in ("network", "average", "optimizer")}
        buffer = io.BytesIO()
        torch.save(state | {"step": self.step, "seconds": self.seconds}, buffer)
        write_atomically(self.path, buffer.getvalue())

    def learn(self, loss: Tensor) -> Tensor:
        """Takes one step; returns the gradient's norm."""
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, options.rate, options.warmup, self.progress)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), options.clip)
        self.optimizer.step()
        self.step += 1
        follow(self.average.parameters(), self.network.parameters(), self.step, options.decay)
        return norm


class Log:
    """Means of what each step tells, a line every LOGGED steps; only then the device is waited for."""

    def __init__(self, path: Path) -> None:
        self.path, self.parts, self.began = path, list[dict[str, Tensor]](), time.monotonic()

    def add(self, step: int, parts: dict[str, Tensor]) -> None:
        """Takes a step's parts, 0-dimensional."""
        self.parts.append({name: part.detach() for name, part in parts.items()})
        if step % LOGGED:
            return
        means = {name: torch.stack([each[name] for each in self.parts]).mean().item() for name in parts}
        line = {"step": step} | means | {"seconds": (time.monotonic() - self.began) / len(self.parts)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: round(value, 5) for name, value in line.items()}) + "\n")
        self.parts, self.began = [], time.monotonic()


def train(options: argparse.Namespace, stop: Callable[[int], bool] = lambda _: False) -> Run:
    """Trains to the end of `options`, or until `stop` says so of a step; returns the run, which is saved."""
    run, log, objective = Run(options), Log(options.output / LOG), Objective(options)
    shares = options.other_scale, options.shifted, options.untaught
    batches = Batches(options.samples, options.crop, *shares, options.device)
    saved = last = time.monotonic()
    while run.progress < 1 and not stop(run.step):
        rng = np.random.default_rng((options.seed, run.step))
        loss, parts = objective(run.network, batches.draw(options.batch, rng), rng)
        log.add(run.step + 1, parts | {"norm": run.learn(loss)})
        now = time.monotonic()
        run.seconds, last = run.seconds + now - last, now
        if now - saved > options.save_every:
            run.save()
            saved = now
    run.save()
    return run


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--samples", type=Path, required=True, help="folder that training.mini.samples writes")
    add("-o", "--output", type=Path, required=True, help="folder of the run")
    add("--start", type=Path, help="folder of a run whose averaged weights are the start")
    add("--steps", type=int, default=20_000)
    add("--minutes", type=float, default=0.0, help="the run's length instead of steps")
    add("--batch", type=int, default=4)
    add("--crop", type=int, default=128, help="side in pixels, a multiple of 16")
    add("--rate", type=float, default=8e-4, help="learning rate at its peak")
    add("--warmup", type=int, default=200, help="steps")
    add("--decay", type=float, default=0.998, help="of the averaged weights")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--detail", type=float, default=0.7, help="a component weighs its deviation to this power; 1: error in pixels")
    add("--lpips", type=float, default=0.0, help="weight at the highest timesteps")
    add("--least-lpips", type=float, default=0.2, help="share of that weight at the lowest timesteps")
    add(
        "--photograph",
        type=float,
        default=0.5,
        help="share of samples that LPIPS compares with the photograph",
    )
    add("--faithful", type=float, default=0.2, help="share of samples drawn at timesteps up to 100 besides")
    add("--lattice", type=float, default=0.0, help="weight")
    add("--adversarial", type=float, default=0.0, help="its pull at the image, in those of LPIPS and the lattice")
    add("--other-scale", type=float, default=0.1, help="share of samples that were shrunk by less than 4")
    add("--shifted", type=float, default=0.2, help="share of samples whose grid is shifted by 0 to 3 pixels")
    add("--untaught", type=float, default=0.3, help="share drawn from all samples, with a teacher or not")
    add("--save-every", type=float, default=180, help="seconds")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--half", action="store_true", help="the network in bfloat16, weights and losses in single precision")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    return result


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    train(options)


if __name__ == "__main__":
    main()
