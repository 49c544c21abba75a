"""Looks at a base model: `python -m benchmarks.teacher --base DIR/base.safetensors`.

Prints how well its VAE reconstructs the 24 Kodak crops, which is the ceiling of any student with this decoder, and
writes three sheets: `reconstructions.png`; `predictions.png`, the clean picture that the teacher sees in a noisy latent
of a degraded one at several timesteps, with and without guidance; and `samples.png`, pictures drawn from noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from benchmarks.quality import BORDER
from benchmarks.testset import load_test_set
from host.cache import cache_directory
from tadsr.geometry import enlarge
from tadsr.schedule import BETA_END, BETA_START, MIN_TIMESTEP, NUM_TIMESTEPS, add_noise, x0_from_noise
from training.config.train_config import PRESETS
from training.data.prompts import PromptBook
from training.images import to_picture, to_tensor
from training.metrics.lpips import LPIPS
from training.metrics.reference import Reference
from training.mini.teacher import DEGRADED, PHOTOGRAPH
from training.networks.inference import Restorer
from training.objective.losses import Score, guidance_scale, guided

PREDICTED = (100, 300, 600)  # paper, figure 1 (b)
SAMPLE_STEPS, SAMPLE_GUIDANCE, SAMPLE_SIDE = 50, (1.0, 3.0), 64  # a side of latents
GAP = 8  # pixels between the pictures of a sheet


def reconstruct(base: Restorer, picture: Tensor) -> Tensor:
    """Returns the picture through the VAE, (1, 3, H, W) in [0, 1]."""
    return base.decode(base.latent(picture, MIN_TIMESTEP, scale=1))


def ceiling(base: Restorer, pictures: list[Tensor]) -> str:
    """Returns the means of PSNR-Y, SSIM and LPIPS of reconstructions, as text."""
    networks = [LPIPS(net=net) for net in ("alex", "vgg")]
    scores = [Reference(picture, networks, BORDER).score(reconstruct(base, picture)) for picture in pictures]
    rows = torch.tensor([[s.psnr_y, s.ssim, *s.lpips.values()] for s in scores])
    means = rows.mean(dim=0).tolist()
    return "PSNR-Y {:.2f}, SSIM {:.4f}, LPIPS (Alex) {:.4f}, LPIPS (VGG) {:.4f}".format(*means)


def teacher_of(base: Restorer) -> Score:
    """Returns the base's UNet as a score: what it takes for the noise in a latent."""
    return lambda latent, timestep, context: base.unet(latent, timestep, context, return_dict=False)[0]


@torch.no_grad()
def predictions(
    base: Restorer, prompts: PromptBook, picture: Tensor, guidance: float, generator: torch.Generator
) -> list[Tensor]:
    """Returns, for each timestep, the noisy picture, the teacher's clean one, and that under guidance."""
    score = teacher_of(base)
    clean = base.latent(picture, MIN_TIMESTEP, scale=1)
    noise = torch.randn(clean.shape, generator=generator)
    context, negative = (prompts.batch([text]) for text in (PHOTOGRAPH, DEGRADED))
    shown = []
    for timestep in PREDICTED:
        steps = torch.tensor([timestep])
        noisy = add_noise(clean, noise, steps)
        plain = score(noisy, steps, context)
        led = guided(score, noisy, steps, context, negative, guidance_scale(steps, guidance))
        shown += [base.decode(latent) for latent in (noisy, *(x0_from_noise(noisy, e, steps) for e in (plain, led)))]
    return shown


@torch.no_grad()
def draw(base: Restorer, prompts: PromptBook, text: str, guidance: float, generator: torch.Generator) -> Tensor:
    """Returns a picture drawn from noise with DDIM under a prompt."""
    scheduler = DDIMScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    scheduler.set_timesteps(SAMPLE_STEPS)
    latent = torch.randn((1, 4, SAMPLE_SIDE, SAMPLE_SIDE), generator=generator)
    context, negative = (prompts.batch([t]) for t in (text, DEGRADED if text == PHOTOGRAPH else PHOTOGRAPH))
    score = teacher_of(base)
    for timestep in scheduler.timesteps:
        steps = timestep[None]
        noise = guided(score, latent, steps, context, negative, torch.tensor([guidance]))
        latent = scheduler.step(noise, int(timestep), latent, return_dict=False)[0]
    return base.decode(latent)


def write_sheet(path: Path, rows: list[list[Tensor]]) -> None:
    """Writes rows of pictures, (1, 3, H, W) in [0, 1], all of one size."""
    height, width = rows[0][0].shape[2:]
    sheet = Image.new("RGB", (len(rows[0]) * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet.paste(to_picture(picture), (j * (width + GAP), i * (height + GAP)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="what training.mini.teacher wrote, or the like")
    parser.add_argument("--output", type=Path, default=cache_directory() / "teacher", help="folder of the sheets")
    parser.add_argument("--pictures", type=int, default=3, help="shown on the sheets")
    parser.add_argument(
        "--guidance",
        type=float,
        default=yaml.safe_load((PRESETS / "mini.yaml").read_text(encoding="utf-8"))["guidance"],
        help="of the predictions, at timestep 0 (default: %(default)s, as training/presets/mini.yaml)",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    base = Restorer.load(options.base)
    prompts = PromptBook.build([PHOTOGRAPH, DEGRADED], options.base, None, cache_directory() / "training")
    samples = load_test_set("realesrgan")
    pictures = [to_tensor(sample.hq) for sample in samples]
    print(f"VAE, mean of {len(pictures)}: {ceiling(base, pictures)}")
    generator = torch.Generator().manual_seed(options.seed)
    shown = samples[: options.pictures]
    originals = [to_tensor(sample.hq) for sample in shown]
    write_sheet(options.output / "reconstructions.png", [[o, reconstruct(base, o)] for o in originals])
    degraded = [enlarge(to_tensor(s.lq), (s.hq.shape[0], s.hq.shape[1])) for s in shown]
    rows = [[picture, *predictions(base, prompts, picture, options.guidance, generator)] for picture in degraded]
    write_sheet(options.output / "predictions.png", rows)
    settings = [(text, guidance) for text in (PHOTOGRAPH, DEGRADED) for guidance in SAMPLE_GUIDANCE]
    drawn = [[draw(base, prompts, *s, generator) for _ in range(options.pictures)] for s in settings]
    write_sheet(options.output / "samples.png", drawn)
    print(f"sheets: {options.output}")


if __name__ == "__main__":
    main()
