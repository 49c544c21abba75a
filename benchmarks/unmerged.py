"""The student in diffusers modules with unmerged LoRA (peft): what `benchmarks.full_size` compares the nodes with.

    python -m benchmarks.unmerged WEIGHTS BASE

says with a line that it is ready, then reads the path of a picture from each line of its input, restores it, writes
the result beside it with the ending `.npy`, and answers with a line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import Encoder
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from torch import Tensor, nn

from tadsr import weights as tadsr_weights
from tadsr.architecture import UNetLayout
from tadsr.encoder import MIN_TIME_FEATURES, NORM_EPS, TIME_EMBEDDING_WIDTH
from tadsr.keys import inverse, ldm_vae_to_diffusers, rename, unet_table, vae_table_of
from tadsr.lora import Adapter, adapters
from tadsr.schedule import DEFAULT_TIMESTEP
from tadsr.weights import UNET_PREFIX, TadsrWeights
from training.images import to_picture, to_tensor
from training.networks.base import Base, load_base, load_strictly
from training.networks.inference import Restorer
from training.networks.lora import adapter_layers, add_adapters, load_adapters

SD_WIDTHS = (128, 256, 512, 512)  # SD VAE config
SD_NORM_GROUPS = 32  # SD VAE config
MOMENTS = 8  # mean and log-variance of four channels


class UnmergedEncoder(nn.Module):
    """The Time-Aware Encoder at SD's size, of diffusers' blocks."""

    downscale = 8

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(
            in_channels=3,
            out_channels=MOMENTS // 2,
            down_block_types=("DownEncoderBlock2D",) * len(SD_WIDTHS),
            block_out_channels=SD_WIDTHS,
            layers_per_block=2,
            norm_num_groups=SD_NORM_GROUPS,
        )
        blocks: list[Any] = [*self.encoder.down_blocks, self.encoder.mid_block]
        for block in blocks:
            block.resnets = nn.ModuleList(_with_time(resnet) for resnet in block.resnets)
        self.features = Timesteps(MIN_TIME_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.encoder.time_embedding = TimestepEmbedding(MIN_TIME_FEATURES, TIME_EMBEDDING_WIDTH)
        self.quant_conv = nn.Conv2d(MOMENTS, MOMENTS, 1)

    def forward(self, image: Tensor, timestep: Tensor) -> Tensor:
        """Returns the moments, (B, 8, H / 8, W / 8). image: (B, 3, H, W) in [-1, 1]; timestep: (B,)."""
        encoder: Any = self.encoder
        embedding = encoder.time_embedding(self.features(timestep))
        h = encoder.conv_in(image)
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                h = resnet(h, embedding)
            for downsample in block.downsamplers or ():
                h = downsample(h)
        h = encoder.mid_block(h, embedding)
        return self.quant_conv(encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(h))))


def _with_time(block: ResnetBlock2D) -> ResnetBlock2D:
    """Returns a block of the same widths that is scaled and shifted by the embedding."""
    return ResnetBlock2D(
        in_channels=block.in_channels,
        out_channels=block.out_channels,
        temb_channels=TIME_EMBEDDING_WIDTH,
        groups=SD_NORM_GROUPS,
        eps=NORM_EPS,
        time_embedding_norm="scale_shift",
    )


def load_unmerged(weights: TadsrWeights, base: Base) -> Restorer:
    """Returns the restorer whose UNet and encoder are `base` with the LoRA of `weights` beside it, at SD's size."""
    with torch.device("meta"):
        encoder = UnmergedEncoder()
    state = ldm_vae_to_diffusers({**base.encoder, **weights.encoder_time})
    load_strictly(encoder, state, "encoder")
    vae_names, unet_names = inverse(vae_table_of(base.encoder)), inverse(_unet_table(base))
    unet_lora = {module.removeprefix(UNET_PREFIX): adapter for module, adapter in adapters(weights.unet_lora).items()}
    _add_lora(encoder, {rename(module, vae_names): a for module, a in adapters(weights.encoder_lora).items()})
    _add_lora(base.unet, {rename(module, unet_names): a for module, a in unet_lora.items()})
    for key, tensor in weights.unet_full.items():
        module, _, part = rename(key.removeprefix(UNET_PREFIX), unet_names).rpartition(".")
        layer = adapter_layers(base.unet)[module].get_base_layer()
        layer.get_parameter(part).data = tensor
    untyped: Any = encoder.eval().requires_grad_(False)
    return Restorer(encoder=untyped, unet=base.unet, decoder=base.decoder, prompt=weights.prompt)


def _unet_table(base: Base) -> dict[str, str]:
    return unet_table(UNetLayout.from_diffusers(name for name, _ in base.unet.named_modules()))


def _add_lora(network: nn.Module, lora: dict[str, Adapter]) -> None:
    first = next(iter(lora.values()))
    add_adapters(network, list(lora), rank=first.rank, alpha=first.alpha, generator=torch.Generator())
    load_adapters(network, lora, type(network).__name__)
    network.requires_grad_(False)


@torch.inference_mode()
def main(arguments: list[str]) -> None:
    """Serves pictures until its input ends."""
    weights, base = map(Path, arguments)
    restorer = load_unmerged(tadsr_weights.load(weights), load_base(base))
    print("ready", flush=True)
    for line in sys.stdin:
        path = Path(line.strip())
        lq = to_tensor(np.asarray(Image.open(path).convert("RGB")))
        np.save(path.with_suffix(".npy"), np.asarray(to_picture(restorer(lq, DEFAULT_TIMESTEP))))
        print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
