"""Trains tadsr-mini by reconstruction: `python -m training.train_mini --crops FILE --output DIR`.

Degraded crops go in at random timesteps; the loss is the blurred MSE of the timestep, a plain L1 and LPIPS. The
weight of LPIPS grows with the timestep and that of L1 falls, so that the timestep trades fidelity for sharpness.
Running the same command again resumes from the last checkpoint. With `--weights FILE`, a run starts from a weights file
of this model instead of from nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from tadsr.color import match_adain
from tadsr.geometry import enlarge
from tadsr.schedule import MAX_TIMESTEP, MIN_TIMESTEP
from tadsr.weights import load
from training.data.storage import write_whole
from training.degradation import FULL, LIGHT, degrade
from training.discriminator import Discriminator, hinge_loss, realism_loss
from training.export_mini import student_from_weights
from training.images import to_tensor
from training.losses import blurred_mse, gaussian_kernel
from training.lpips import LPIPS
from training.mini import MiniStudent

SCALE = 4  # the degradation's factor
SHARPENING_SIZE, SHARPENING_SIGMA = 9, 1.5  # of the unsharp mask's Gaussian, in pixels
FAITHFUL_UNTIL = 400  # up to this timestep only pixels count, above it likeness to photographs more and more
LPIPS_SHIFT = 7  # pixels; VGG has pooled 8-fold at its third compared layer, see `shifted`
FITTED = ("encoder.encoder.time_embedding.", "encoder.encoder.mid.block_2.")  # see training/mini_start.py
IN_BLOCK = re.compile(r"\.(conv1|conv2|norm1|norm2|time_emb_proj)\.")  # what residual blocks add to their shortcuts


@dataclass(frozen=True, kw_only=True)
class MiniConfig:
    """Settings of one run; all of them are saved beside the checkpoint."""

    steps: int = 5000
    batch: int = 6
    crop: int = 64  # pixels of a high-quality crop's side
    learning_rate: float = 5e-4
    warmup_steps: int = 200
    ema_decay: float = 0.998
    clip_norm: float = 1.0
    light_share: float = 0.7  # samples with the light degradation
    validation_crops: int = 64  # the last crops of the file, from pictures of their own
    lpips_samples: int = 3  # VGG is costly on a CPU: LPIPS sees this many, those of the highest timesteps
    mse_weight: float = 10.0
    l1_weight: float = 3.0  # up to timestep FAITHFUL_UNTIL, then falls linearly
    l1_floor: float = 0.2  # to this at timestep 1000
    lpips_weight: float = 4.0  # at timestep 1000; rises from 0 at FAITHFUL_UNTIL, quadratically
    realism_weight: float = 0.3  # of the discriminator's verdict, rises likewise
    discriminator_rate: float = 4e-4
    sharpening: float = 1.0  # of the target at timestep 1000, falls linearly to 0 at 500
    colour_weight: float = 1.0  # on the distance of the decoded picture from its own colour match
    latent_weight: float = 1e-2  # on the square of x0, which the decoder's normalisation leaves free
    unet_rate: float = 0.4  # share of the learning rate for the UNet: with all of it, its features grow without end
    path_rate: float = 0.15  # and for the layers that carry the starting autoencoder
    fitted_rate: float = 0.002  # and for those fitted to the timestep, whose inputs are large
    seed: int = 0


class DegradedCrops(IterableDataset):
    """Endless (low-quality enlarged, high-quality) pairs, both (3, crop, crop) in [-1, 1], from disjoint crops."""

    def __init__(self, crops: np.ndarray, config: MiniConfig, start: int) -> None:
        self.crops, self.config, self.start = crops, config, start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        index = self.start
        while True:
            yield make_pair(self.crops, self.config, index)
            index += 1


def make_pair(crops: np.ndarray, config: MiniConfig, index: int) -> tuple[Tensor, Tensor]:
    """Returns the pair of sample `index`; the same index gives the same pair."""
    rng = np.random.default_rng((config.seed, index))
    picture = crops[rng.integers(len(crops))]
    top, left = rng.integers(0, picture.shape[0] - config.crop + 1, size=2)
    hq = picture[top : top + config.crop, left : left + config.crop]
    if rng.random() < 0.5:
        hq = hq[:, ::-1]
    hq = np.ascontiguousarray(hq, dtype=np.float32) / 255
    lq = degrade(hq, rng, LIGHT if rng.random() < config.light_share else FULL)
    return enlarge_lq(lq), torch.from_numpy(hq).permute(2, 0, 1) * 2 - 1


def enlarge_lq(lq: np.ndarray) -> Tensor:
    """Returns an image of uint8 (h, w, 3) enlarged as the nodes do it, (3, 4 h, 4 w) in [-1, 1]."""
    return enlarge(to_tensor(lq), (SCALE * lq.shape[0], SCALE * lq.shape[1]))[0] * 2 - 1


def learning_rate(config: MiniConfig, step: int) -> float:
    """Returns the rate at a step: linear warm-up, then half a cosine to 2 % of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(student: MiniStudent, config: MiniConfig) -> list[dict[str, Any]]:
    """Returns the optimiser's groups: parameters, and their share of the learning rate."""
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in student.named_parameters():
        if name.startswith("unet."):
            share = config.unet_rate
        elif name.startswith(FITTED):
            share = config.fitted_rate
        else:
            share = 1.0 if IN_BLOCK.search(name) else config.path_rate
        groups.setdefault(share, []).append(parameter)
    return [{"params": parameters, "share": share} for share, parameters in groups.items()]


def match_colours(decoded: Tensor, lq: Tensor) -> Tensor:
    """Returns the decoded pictures after AdaIN, as the nodes give them; all (B, 3, H, W) in [-1, 1]."""
    return match_adain(decoded / 2 + 0.5, lq / 2 + 0.5) * 2 - 1


def draw_timesteps(count: int) -> Tensor:
    """Returns `count` timesteps, ascending: one drawn uniformly from each of as many equal parts of the range."""
    position = (torch.arange(count) + torch.rand(count)) / count
    return MIN_TIMESTEP + (position * (MAX_TIMESTEP + 1 - MIN_TIMESTEP)).long().clamp(max=MAX_TIMESTEP - MIN_TIMESTEP)


def sharpen(image: Tensor, amount: Tensor) -> Tensor:
    """Returns each image with `amount`, (B,), times its unsharp mask added; images (B, 3, H, W) in [-1, 1].

    Real-ESRGAN (arXiv 2107.10833, section 4.1) trains on such targets, for visibly sharper results.
    """
    line = gaussian_kernel(SHARPENING_SIZE, SHARPENING_SIGMA)
    kernel = torch.outer(line, line).expand(image.shape[1], 1, -1, -1)
    blurred = F.conv2d(F.pad(image, [SHARPENING_SIZE // 2] * 4, mode="reflect"), kernel, groups=image.shape[1])
    return (image + amount[:, None, None, None] * (image - blurred)).clamp(-1, 1)


def shifted(*images: Tensor) -> list[Tensor]:
    """Returns the same random part of all images, (B, 3, H, W), LPIPS_SHIFT pixels less high and wide.

    Otherwise VGG's pooling grid would always lie in the same way on the decoder's, which answers with a dotted texture.
    """
    top, left = torch.randint(LPIPS_SHIFT + 1, (2,)).tolist()
    height, width = (side - LPIPS_SHIFT for side in images[0].shape[2:])
    return [image[:, :, top : top + height, left : left + width] for image in images]


def training_loss(
    config: MiniConfig, perceptual: LPIPS, judge: Discriminator, result: Tensor, target: Tensor, timestep: Tensor
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Returns the student's loss, the discriminator's, and the parts of the first: means over the batch.

    result, target: (B, 3, H, W); timestep: (B,), ascending.
    """
    fraction = timestep.float() / 1000
    mse = blurred_mse(result, target, timestep)
    target = sharpen(target, config.sharpening * (2 * fraction - 1).clamp(min=0))
    l1 = (result - target).abs().mean(dim=(1, 2, 3))
    freedom = ((timestep - FAITHFUL_UNTIL) / (1000 - FAITHFUL_UNTIL)).clamp(min=0)
    l1_weight = config.l1_weight + freedom * (config.l1_floor - config.l1_weight)
    loss = (config.mse_weight * mse + l1_weight * l1).mean()
    count = config.lpips_samples
    ours, real = (perceptual.features(part) for part in shifted(result[-count:], target[-count:]))
    lpips = perceptual.distance(ours, real)
    realism = realism_loss(judge(ours))
    likeness = config.lpips_weight * lpips + config.realism_weight * realism
    loss = loss + (freedom[-count:].square() * likeness).sum() / len(result)
    judged = hinge_loss(judge(real), judge([feature.detach() for feature in ours]))
    parts = {"mse": mse, "l1": l1, "lpips": lpips, "realism": realism, "judged": judged}
    return loss, judged, {name: part.mean().item() for name, part in parts.items()}


@torch.no_grad()
def update_average(average: MiniStudent, student: MiniStudent, decay: float) -> None:
    """Moves the averaged weights towards the student's."""
    torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - decay)


def save_checkpoint(path: Path, state: dict[str, object]) -> None:
    """Writes a checkpoint whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def train(
    config: MiniConfig,
    crops_path: Path,
    output: Path,
    save_every: int,
    log_every: int,
    stop_after: int | None = None,
    weights: Path | None = None,
) -> None:
    """Runs the loop from the last checkpoint in `output`, or from `weights`, or from nothing, to `config.steps`.

    stop_after: a step to stop at earlier, with the learning rate of the whole run.
    """
    stop = min(config.steps, stop_after or config.steps)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").write_text(json.dumps(asdict(config), indent=1))
    crops = np.load(crops_path, mmap_mode="r")[: -config.validation_crops]
    torch.manual_seed(config.seed)
    student, average = MiniStudent(), MiniStudent()
    earlier_steps = 0
    if weights is not None:
        start = load(weights)
        student.load_state_dict(student_from_weights(start).state_dict())
        earlier_steps = int(start.metadata.extra["steps"])
    average.load_state_dict(student.state_dict())
    groups = parameter_groups(student, config)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.999), fused=True)
    perceptual, judge = LPIPS(net="vgg"), Discriminator()
    judge_optimizer = torch.optim.AdamW(judge.parameters(), lr=config.discriminator_rate, betas=(0.5, 0.99))
    step, checkpoint = 0, output / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        step, earlier_steps = state["step"], state["earlier_steps"]
        student.load_state_dict(state["student"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        judge.load_state_dict(state["judge"])
        judge_optimizer.load_state_dict(state["judge_optimizer"])
        print(f"resumed at step {step}", flush=True)
    data = DegradedCrops(crops, config, step * config.batch)
    batches = iter(DataLoader(data, batch_size=config.batch))
    started, first = time.time(), step
    while step < stop:
        torch.manual_seed(config.seed * 1_000_003 + step)
        lq, hq = next(batches)
        timestep = draw_timesteps(len(lq))
        down = student.encoder.downscale
        noise = torch.randn(len(lq), 4, config.crop // down, config.crop // down)
        x0 = student.restore_latent(lq, timestep, noise)
        decoded = student.decode(x0)
        result = match_colours(decoded, lq)
        loss, judged, parts = training_loss(config, perceptual, judge, result, hq, timestep)
        loss = loss + config.colour_weight * (decoded - result.detach()).square().mean()
        loss = loss + config.latent_weight * x0.square().mean()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step) * group["share"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip_norm)
        if torch.isfinite(norm):
            optimizer.step()
        judge_optimizer.zero_grad(set_to_none=True)
        judged.backward(inputs=list(judge.parameters()))
        judge_optimizer.step()
        step += 1
        update_average(average, student, min(config.ema_decay, (1 + step) / (10 + step)))
        if step % log_every == 0:
            record = {"step": step, "loss": loss.item(), "norm": norm.item(), **parts}
            record["seconds_per_step"] = (time.time() - started) / (step - first)
            with (output / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            print({k: round(v, 4) for k, v in record.items()}, flush=True)
        if step % save_every == 0 or step == stop:
            save_checkpoint(
                checkpoint,
                {
                    "step": step,
                    "earlier_steps": earlier_steps,
                    "config": asdict(config),
                    "student": student.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "judge": judge.state_dict(),
                    "judge_optimizer": judge_optimizer.state_dict(),
                },
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--crops", type=Path, required=True, help="the .npy file that scripts/fetch_photos.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint and the log")
    parser.add_argument("--weights", type=Path, help="a weights file of this model to start from")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--log-every", type=int, default=20)
    defaults = MiniConfig()
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    run = {name: arguments.pop(name) for name in ("save_every", "log_every", "weights")}
    crops, output = arguments.pop("crops"), arguments.pop("output")
    train(MiniConfig(**arguments), crops, output, **run)


if __name__ == "__main__":
    main()
