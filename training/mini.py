"""The networks of tadsr-mini: a Time-Aware Encoder, a UNet of the SD 2.1 kind and a VAE decoder, all small.

Sizes: the VAE downsamples 4 times (a small 8x VAE loses too much detail) and has no attention, so that memory grows
with the pixels only; the UNet has attention at its lowest level and in the middle.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn
from torch.nn import functional as F

from tadsr.encoder import EncoderConfig, TimeAwareBlock, TimeAwareEncoder, sample
from tadsr.schedule import LATENT_SCALE, MAX_TIMESTEP, MIN_TIMESTEP, alpha_bar, x0_from_residual

VAE_CHANNELS = (32, 32, 64)  # 32 is the least that ComfyUI's VAE can be built with
VAE_NORM_GROUPS = 4  # with SD's 32, every channel would be normalised alone and lose its mean: no colours
UNET_CHANNELS = (64, 96, 192)
CONTEXT_TOKENS, CONTEXT_WIDTH = 8, 64  # the learned default prompt
HEAD_CHANNELS = 64  # as in SD 2.1
MARKERS = 4  # channels of each group that set the latent's size at the start, of 16
INITIAL_SPREAD = 0.2  # of the other channels, at the start; measured on the training crops
RIDGE = 1.0  # keeps the fitted time layer's weights small
INITIAL_LOGVAR = -6.0  # the latent's noise starts at 1 % of its spread


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
            attention_head_dim=tuple(c // HEAD_CHANNELS for c in UNET_CHANNELS),
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
        self.initialise_latent()
        start_linear(self.encoder)
        start_linear(self.decoder)
        shrink_with_timestep(self.encoder)

    @torch.no_grad()
    def initialise_latent(self) -> None:
        """Starts with latents of unit spread after scaling, hardly any latent noise, and a zero residual."""
        quant = self.encoder.quant_conv
        quant.weight.zero_()
        quant.weight[:4, :4, 0, 0] = torch.eye(4) / LATENT_SCALE
        quant.bias.zero_()
        quant.bias[4:] = INITIAL_LOGVAR
        self.encoder.encoder.conv_out.weight.mul_(3.5)
        self.post_quant_conv.weight[:, :, 0, 0] = torch.eye(4) * LATENT_SCALE
        self.post_quant_conv.bias.zero_()
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    def restore_latent(self, image: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns x0, the scaled latent. image: (B, 3, H, W) in [-1, 1]; timestep: (B,); noise: (B, 4, h, w)."""
        moments = self.encoder(image, timestep)
        latent = moments[:, :4] if noise is None else sample(moments, noise)
        z = latent * LATENT_SCALE
        context = self.prompt.expand(len(z), -1, -1)
        return x0_from_residual(z, self.unet(z, timestep, context, return_dict=False)[0], timestep)

    def decode(self, x0: Tensor) -> Tensor:
        """Returns the image, (B, 3, H, W), about [-1, 1], not clamped. x0: a scaled latent."""
        return self.decoder(self.post_quant_conv(x0 / LATENT_SCALE))

    def forward(self, image: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.decode(self.restore_latent(image, timestep, noise))


@torch.no_grad()
def start_linear(network: nn.Module) -> None:
    """Makes residual blocks start as their shortcuts, and resampling as plain averaging and repetition."""
    for name, module in network.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if name.endswith(".conv2"):
            nn.init.zeros_(module.weight)
        elif ".downsample" in name:
            nn.init.zeros_(module.weight)
            module.weight[:, :, :2, :2] = 0.25 * torch.eye(len(module.weight))[:, :, None, None]
        elif ".upsample" in name:
            nn.init.dirac_(module.weight)
        else:
            continue
        nn.init.zeros_(module.bias)


@torch.no_grad()
def shrink_with_timestep(encoder: TimeAwareEncoder) -> None:
    """Makes latents start in proportion to sqrt(alpha_bar_t), so that z / sqrt(alpha_bar_t) has one size at all t.

    Otherwise the UNet's residual starts too small by up to 15 times, and hardly learns. (In the paper too the
    latent's spread falls as t grows, figure 3.) The last block adds +-M(t) to a few channels of each group that
    carry nothing else; the normalisation after it then divides all others by about M(t) / 2.
    """
    config, block = encoder.config, encoder.encoder.mid.block_2
    assert isinstance(block, TimeAwareBlock)
    width = config.channels[-1]
    in_group = torch.arange(width) % (width // config.norm_groups)
    markers = in_group < MARKERS
    share = MARKERS * config.norm_groups / width
    timesteps = torch.arange(MIN_TIMESTEP, MAX_TIMESTEP + 1)
    size = INITIAL_SPREAD * ((1 / alpha_bar(timesteps) - 1) / share + 1e-4).sqrt()
    embedding = F.silu(encoder.encoder.time_embedding(timesteps, torch.float32))
    design = torch.cat([embedding, torch.ones(len(embedding), 1)], dim=1).double()
    target = inverse_silu(size.double())[:, None]
    ridge = RIDGE * torch.eye(design.shape[1], dtype=torch.float64)
    fit = torch.linalg.solve(design.T @ design + ridge, design.T @ target).float()
    block.time_emb_proj.weight.zero_()
    block.time_emb_proj.bias.zero_()
    block.time_emb_proj.bias[:width][markers] = -1.0  # scale: removes the picture from these channels
    block.time_emb_proj.weight[width:][markers] = fit[:-1, 0]
    block.time_emb_proj.bias[width:][markers] = fit[-1, 0]
    signs = torch.where(in_group % 2 == 0, 1.0, -1.0)
    block.conv2.weight[markers, markers, 1, 1] = signs[markers]
    keep_channels_empty(encoder, markers)


def inverse_silu(value: Tensor) -> Tensor:
    """Returns x with silu(x) = value, for value > 0, by Newton's method."""
    x = value.clone()
    for _ in range(50):
        s = torch.sigmoid(x)
        x = x - (x * s - value) / (s * (1 + x * (1 - s)))
    return x


def keep_channels_empty(encoder: TimeAwareEncoder, channels: Tensor) -> None:
    """Cuts the picture out of these channels of the last level, and them out of the latent. channels: mask."""
    last = encoder.encoder.down[-1].block[-1]
    last.nin_shortcut.weight[channels] = 0
    last.nin_shortcut.bias[channels] = 0
    encoder.encoder.conv_out.weight[:, channels] = 0
