"""Trains the teacher of tadsr-mini: `python -m training.mini.teacher --data SHARDS --vae FILE --output DIR`.

A UNet of the SD 2.1 kind learns to predict the noise in the VAE's latents, of photographs under one learned prompt and
of degraded pictures under another, so that classifier-free guidance leads from the second to the first. DIR gets what
`training.train --base DIR/base.safetensors` needs: the base, and the two prompts in prompts.safetensors beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tadsr.schedule import NUM_TIMESTEPS, add_noise
from training.config.train_config import Count, Decay, Rate, Share
from training.mini.base import write_base
from training.mini.networks import CONTEXT_TOKENS, CONTEXT_WIDTH
from training.mini.pretraining import Losses, PretrainingConfig, Stage, pretrain, read_options
from training.mini.vae import load_vae

PHOTOGRAPH, DEGRADED = "photograph", "degraded"  # the prompts; training/presets/mini.yaml names them too
PROMPT_SPREAD = 0.5  # of a learned prompt's numbers at the start


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(PretrainingConfig):
    """Settings of the teacher's training."""

    vae: Path
    """The file that training.mini.vae wrote."""
    batch: Count = 6
    """Pairs in a step: so many photographs, and as many degraded pictures."""
    learning_rate: Rate = 4e-4
    average_decay: Decay = 0.999
    plain_share: Share = 0.1


class TeacherStage(Stage):
    """The UNet and the two prompts, with a frozen VAE."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.networks = load_vae(config.vae)
        self.networks.unet.requires_grad_(True)
        draw = lambda: nn.Parameter(PROMPT_SPREAD * torch.randn(CONTEXT_TOKENS, CONTEXT_WIDTH))  # noqa: E731
        self.prompts = nn.ParameterDict({PHOTOGRAPH: draw(), DEGRADED: draw()})

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [*self.networks.unet.parameters(), *self.prompts.parameters()], "share": 1.0}]

    def losses(self, lq: Tensor, hq: Tensor, progress: float) -> Losses:
        pictures = torch.cat([hq, lq])
        with torch.no_grad():
            latent = self.networks.encode(pictures, torch.ones(len(pictures), device=hq.device))
        timestep = torch.randint(NUM_TIMESTEPS, (len(latent),), device=hq.device)
        noise = torch.randn_like(latent)
        context = torch.stack([self.prompts[PHOTOGRAPH]] * len(hq) + [self.prompts[DEGRADED]] * len(lq))
        predicted = self.networks.unet(add_noise(latent, noise, timestep), timestep, context, return_dict=False)[0]
        error = (predicted - noise).square().mean(dim=(1, 2, 3))
        photographs, degraded = (part.mean() for part in error.chunk(2))
        return Losses(error.mean(), None, {PHOTOGRAPH: photographs, DEGRADED: degraded})


def write_teacher(stage: TeacherStage, folder: Path, steps: int) -> Path:
    """Writes base.safetensors and prompts.safetensors into `folder`; returns the path of the first."""
    prompts = {name: prompt.detach().clone() for name, prompt in stage.prompts.items()}
    with torch.no_grad():
        stage.networks.prompt.copy_(prompts[PHOTOGRAPH])
    return write_base(folder, stage.networks, prompts, steps)


def main() -> None:
    config = read_options(TeacherConfig, __doc__)
    torch.manual_seed(config.seed)
    stage = TeacherStage(config)
    average = pretrain(stage, config)
    stage.load_state_dict({**stage.cpu().state_dict(), **average})
    print(write_teacher(stage, config.output, config.steps))


if __name__ == "__main__":
    main()
