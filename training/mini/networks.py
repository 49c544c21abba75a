"""The networks of tadsr-mini: a Time-Aware Encoder, a UNet of the SD 2.1 kind and a VAE decoder, all small.

Sizes: the VAE downsamples 4 times (a small 8x VAE loses too much detail) and has no attention, so that memory grows
with the pixels only; the UNet has attention at its lowest level and in the middle.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn

from tadsr.encoder import EncoderConfig, TimeAwareEncoder, mode
from tadsr.schedule import LATENT_SCALE, x0_from_residual
from training.mini.start import start_as_autoencoder

VAE_CHANNELS = (32, 32, 64)  # 32 is the least that ComfyUI's VAE can be built with
VAE_NORM_GROUPS = 4  # with SD's 32, every channel would be normalised alone and lose its mean: no colours
UNET_CHANNELS = (96, 96, 128)  # most of the work at full latent resolution, attention only where it is cheap
CONTEXT_TOKENS, CONTEXT_WIDTH = 8, 64  # of a learned prompt
HEAD_CHANNELS = 64  # as in SD 2.1


class MiniStudent(nn.Module):
    """The networks, as they start: the autoencoder averages and interpolates, the UNet predicts zero."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = TimeAwareEncoder(
            EncoderConfig(channels=VAE_CHANNELS, layers_per_level=1, mid_attention=False, norm_groups=VAE_NORM_GROUPS)
        )
        self.unet = UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            block_out_channels=UNET_CHANNELS,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            attention_head_dim=tuple(c // HEAD_CHANNELS for c in UNET_CHANNELS),  # type: ignore[arg-type]
            cross_attention_dim=CONTEXT_WIDTH,
            use_linear_projection=True,
        )
        self.decoder = Decoder(
            in_channels=4,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * len(VAE_CHANNELS),
            block_out_channels=VAE_CHANNELS,
            layers_per_block=0,  # the decoder adds one: a single block per level keeps full resolution cheap
            mid_block_add_attention=False,
            norm_num_groups=VAE_NORM_GROUPS,
        )
        self.post_quant_conv = nn.Conv2d(4, 4, 1)
        self.prompt = nn.Parameter(0.5 * torch.randn(1, CONTEXT_TOKENS, CONTEXT_WIDTH))
        start_as_autoencoder(self, VAE_NORM_GROUPS)

    def encode(self, image: Tensor, timestep: Tensor) -> Tensor:
        """Returns the scaled latent, (B, 4, h, w), the mode. image: (B, 3, H, W) in [-1, 1]; timestep: (B,)."""
        return mode(self.encoder(image, timestep)) * LATENT_SCALE

    def decode(self, x0: Tensor) -> Tensor:
        """Returns the image, (B, 3, H, W), about [-1, 1], not clamped. x0: a scaled latent."""
        return self.decoder(self.post_quant_conv(x0 / LATENT_SCALE))

    def forward(self, image: Tensor, timestep: Tensor) -> Tensor:
        """Returns the restored image, as the nodes compute it; arguments as of `encode`."""
        z = self.encode(image, timestep)
        prediction = self.unet(z, timestep, self.prompt.expand(len(z), -1, -1), return_dict=False)[0]
        return self.decode(x0_from_residual(z, prediction, timestep))
