"""The networks of tadsr-mini: a Time-Aware Encoder, a UNet of the SD 2.1 kind and a VAE decoder, all small.

Sizes: the VAE downsamples 4 times (a small 8x VAE loses too much detail) and has no attention, so that memory grows
with the pixels only; the UNet has attention at its lowest level and in the middle.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn

from tadsr.encoder import EncoderConfig, TimeAwareEncoder, sample
from tadsr.schedule import LATENT_SCALE, alpha_bar, x0_from_residual
from training.mini_start import start_as_autoencoder

VAE_CHANNELS = (32, 32, 64)  # 32 is the least that ComfyUI's VAE can be built with
VAE_NORM_GROUPS = 4  # with SD's 32, every channel would be normalised alone and lose its mean: no colours
UNET_CHANNELS = (96, 96, 128)  # most of the work at full latent resolution, attention only where it is cheap
CONTEXT_TOKENS, CONTEXT_WIDTH = 8, 64  # the learned default prompt
HEAD_CHANNELS = 64  # as in SD 2.1


class MiniStudent(nn.Module):
    """The whole student: enlarged low-quality image and timestep in, restored image out."""

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

    def restore_latent(self, image: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns x0, the scaled latent. image: (B, 3, H, W) in [-1, 1]; timestep: (B,); noise: (B, 4, h, w)."""
        moments = self.encoder(image, timestep)
        latent = moments[:, :4] if noise is None else sample(moments, noise)
        z = latent * LATENT_SCALE
        context = self.prompt.expand(len(z), -1, -1)
        prediction = self.unet(z, timestep, context, return_dict=False)[0]
        # Dividing by sqrt(alpha_bar) would make gradients up to 15 times larger at high timesteps.
        signal = alpha_bar(timestep).sqrt()[:, None, None, None]
        return x0_from_residual(scale_gradient(z, signal), prediction, timestep)

    def decode(self, x0: Tensor) -> Tensor:
        """Returns the image, (B, 3, H, W), about [-1, 1], not clamped. x0: a scaled latent."""
        return self.decoder(self.post_quant_conv(x0 / LATENT_SCALE))

    def forward(self, image: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.decode(self.restore_latent(image, timestep, noise))


def scale_gradient(x: Tensor, scale: Tensor) -> Tensor:
    """Returns x, whose gradient will be multiplied by `scale`."""
    scaled = x * scale
    return scaled + (x - scaled).detach()
