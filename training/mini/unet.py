"""The UNet of tadsr-mini, and the residual it predicts."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from training.mini.patches import COMPONENTS

CHANNELS = (64, 64, 128)  # most of the work at full latent resolution, attention only where it is cheap
BLOCKS = 2  # a level
NORM_EPS = (
    1.0  # of features of about 1: a normalisation by their contrast would give flat areas as much detail as others
)
HEAD_CHANNELS = 64  # as in SD 2.1
CONTEXT_TOKENS, CONTEXT_WIDTH = 8, 64  # of a learned prompt


class Residual(nn.Module):
    """The UNet and its one prompt: from a latent, z / sqrt(alpha_bar_t), to the clean one."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            in_channels=COMPONENTS,
            out_channels=COMPONENTS,
            block_out_channels=CHANNELS,
            layers_per_block=BLOCKS,
            down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            attention_head_dim=tuple(c // HEAD_CHANNELS for c in CHANNELS),  # type: ignore[arg-type]
            cross_attention_dim=CONTEXT_WIDTH,
            use_linear_projection=True,
            norm_eps=NORM_EPS,
        )
        self.prompt = nn.Parameter(0.5 * torch.randn(1, CONTEXT_TOKENS, CONTEXT_WIDTH))
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Makes residual blocks add nothing and the UNet predict nothing."""
        for name, layer in self.unet.named_modules():
            if name.endswith(".conv2") or name == "conv_out":
                layer.get_parameter("weight").zero_()
                layer.get_parameter("bias").zero_()

    def forward(self, z: Tensor, share: Tensor, timestep: Tensor) -> Tensor:
        """Returns x0. z: (B, C, h, w), latents times share; share: (B,), sqrt(alpha_bar_t); timestep: (B,)."""
        context = self.prompt.expand(len(z), -1, -1)
        return z / share[:, None, None, None] - self.unet(z, timestep, context, return_dict=False)[0]
