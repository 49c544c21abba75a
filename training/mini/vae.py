"""Trains the autoencoder of tadsr-mini: `python -m training.mini.vae --data SHARDS --output DIR`.

Photographs go in and are to come out: L1, LPIPS on randomly shifted crops, and after the warm-up of `judge_from` a
discriminator on VGG's features. DIR/vae.safetensors is the VAE, with latents of deviation 1 at timestep 1, which fall
with sqrt(alpha_bar_t). `--decoder-of FILE` trains the decoder of such a file further; its latents stay what they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tadsr.architecture import is_time_layer
from tadsr.schedule import LATENT_SCALE, MAX_TIMESTEP, MIN_TIMESTEP, alpha_bar
from training.config.train_config import Count, Share
from training.data import open_validation_set
from training.metrics.lpips import LPIPS
from training.mini.networks import MiniStudent
from training.mini.pretraining import Losses, PretrainingConfig, Stage, pretrain, read_options
from training.mini.start import follow_timestep
from training.networks.discriminator import Discriminator, chosen, discriminator_loss, generator_loss
from training.objective.losses import shared_crop

VAE_FILE = "vae.safetensors"
NETWORKS = "networks."  # of the stage's parameters
DECODER_PARTS = ("decoder.", "post_quant_conv.")  # of MiniStudent
VAE_PARTS = ("encoder.", *DECODER_PARTS)
LPIPS_SHIFT = 7  # pixels; VGG has pooled 8-fold at its third compared layer, see `losses.shared_crop`
IN_BLOCK = re.compile(r"\.(conv1|conv2|norm1|norm2)\.")  # what residual blocks add to their shortcuts
MEASURED_PICTURES = 64


@dataclass(frozen=True, kw_only=True)
class VaeConfig(PretrainingConfig):
    """Settings of the autoencoder's training."""

    plain_share: Share = 1.0  # low-quality pictures are not looked at
    decoder_of: Path | None = None
    """A file that this training wrote, to train its decoder alone: its teacher and students go on with the result."""
    path_rate: float = 0.15
    """Share of the learning rate for the layers that carry the starting autoencoder."""
    l1_weight: float = 2.0
    lpips_weight: float = 1.0
    lpips_samples: Count = 2
    """Pictures of a batch that LPIPS and the discriminator see: VGG takes most of a step on a CPU."""
    lpips_precision: Literal["no", "bf16"] = "no"
    """Of VGG; "bf16" is three times as fast on a CPU that multiplies matrices in it."""
    realism_weight: float = 0.1
    judge_from: Share = 0.5
    """Share of the run after which the discriminator counts; it learns a little before."""
    judge_rate: float = 4e-4
    latent_weight: float = 1e-2
    """On the latent's mean square."""
    latent_noise: float = 0.05
    """Deviation of the noise that the decoder has to bear, of latents of about 1."""


def networks_to_train(config: VaeConfig) -> MiniStudent:
    """Returns the networks as the training starts with them."""
    return load_vae(config.decoder_of) if config.decoder_of else MiniStudent()


class VaeStage(Stage):
    """Encoder and decoder of the small networks."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__(Discriminator(), config.judge_rate)
        self.config = config
        self.networks = networks_to_train(config)
        self.networks.requires_grad_(True)
        self.perceptual = LPIPS(net="vgg")

    def groups(self) -> list[dict[str, Any]]:
        parts = DECODER_PARTS if self.config.decoder_of else VAE_PARTS
        named = [(n, p) for n, p in self.networks.named_parameters() if n.startswith(parts) and not is_time_layer(n)]
        blocks = [parameter for name, parameter in named if IN_BLOCK.search(name)]
        path = [parameter for name, parameter in named if not IN_BLOCK.search(name)]
        return [{"params": blocks, "share": 1.0}, {"params": path, "share": self.config.path_rate}]

    def losses(self, lq: Tensor, hq: Tensor, progress: float) -> Losses:
        config = self.config
        with torch.set_grad_enabled(config.decoder_of is None):
            latent = self.networks.encode(hq, torch.ones(len(hq), device=hq.device))
        result = self.networks.decode(latent + config.latent_noise * torch.randn_like(latent))
        l1 = (result - hq).abs().mean()
        count = config.lpips_samples
        top, left = torch.randint(LPIPS_SHIFT + 1, (2,)).tolist()
        parts = shared_crop((result[:count], hq[:count]), top, left, LPIPS_SHIFT)
        with torch.autocast(hq.device.type, torch.bfloat16) if config.lpips_precision == "bf16" else nullcontext():
            ours, real = ([feature.float() for feature in self.perceptual.features(part)] for part in parts)
        lpips = self.perceptual.distance(ours, real).mean()
        size = latent.square().mean()
        loss = config.l1_weight * l1 + config.lpips_weight * lpips + config.latent_weight * size
        shown = {"l1": l1, "lpips": lpips, "latent": size}
        if progress < config.judge_from:
            return Losses(loss, None, shown)
        assert self.judge is not None
        ours, real = chosen(ours), chosen(real)
        realism = generator_loss(self.judge(ours)).mean()
        own = discriminator_loss(self.judge(real), self.judge([feature.detach() for feature in ours])).mean()
        loss = loss + config.realism_weight * realism
        return Losses(loss, own, shown | {"realism": realism, "judged": own})


@torch.no_grad()
def standardise(networks: MiniStudent, pictures: Tensor) -> None:
    """Gives the latents of `pictures`, (B, 3, H, W), deviation 1 in each channel, and no part that is always there.

    Pictures decode as before. The constant part is what does not fall with sqrt(alpha_bar_t): x0 would multiply it.
    """
    first, last = (
        networks.encode(pictures, torch.full((len(pictures),), timestep)) for timestep in (MIN_TIMESTEP, MAX_TIMESTEP)
    )
    share = (alpha_bar(MAX_TIMESTEP) / alpha_bar(MIN_TIMESTEP)) ** 0.5
    constant = (last.mean(dim=(0, 2, 3)) - share * first.mean(dim=(0, 2, 3))) / (1 - share)
    deviation = first.std(dim=(0, 2, 3))
    quant: Any = networks.encoder.quant_conv
    post: Any = networks.post_quant_conv
    quant.weight[:4] /= deviation[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - constant / LATENT_SCALE) / deviation
    post.bias += post.weight.flatten(1) @ (constant / LATENT_SCALE)
    post.weight *= deviation[None, :, None, None]


def load_vae(path: Path) -> MiniStudent:
    """Returns the networks with the VAE of a file that this training wrote; the others are new."""
    networks = MiniStudent()
    state = load_file(path)
    networks.load_state_dict({**networks.state_dict(), **state})
    return networks.eval().requires_grad_(False)


def _pictures(config: VaeConfig) -> Tensor:
    """Returns crops to measure latents on, (B, 3, crop, crop) in [-1, 1]."""
    data, _ = open_validation_set(
        config.data,
        data_format="auto",
        crop=config.crop,
        scale=4,
        prompts="fixed",
        prompt="",
        count=MEASURED_PICTURES,
        cache=config.output,
    )
    return torch.stack([data[index].hq for index in range(len(data))])


def write_vae(config: VaeConfig, average: Mapping[str, Tensor]) -> Path:
    """Writes vae.safetensors of the averaged weights of a VaeStage; returns its path."""
    networks = networks_to_train(config)
    trained = {name.removeprefix(NETWORKS): tensor for name, tensor in average.items() if name.startswith(NETWORKS)}
    networks.load_state_dict({**networks.state_dict(), **trained})
    networks.eval()
    if not config.decoder_of:
        follow_timestep(networks.encoder)
        standardise(networks, _pictures(config))
    state = {name: t.contiguous() for name, t in networks.state_dict().items() if name.startswith(VAE_PARTS)}
    save_file(state, config.output / VAE_FILE)
    return config.output / VAE_FILE


def main() -> None:
    config = read_options(VaeConfig, __doc__)
    torch.manual_seed(config.seed)
    print(write_vae(config, pretrain(VaeStage(config), config)))


if __name__ == "__main__":
    main()
