"""The networks of tadsr-mini: a Time-Aware Encoder, a UNet of the SD 2.1 kind and a decoder, all small.

Encoder and decoder start as the exact transform between patches of 4x4 pixels and their principal components
(`training.mini.patches`); the encoder's time layers make the latent fall with sqrt(alpha_bar_t). Everything of the
decoder happens at the latent's resolution: its last convolution gives the 48 numbers of a patch.

How a normalisation lets a picture pass as it is: channels come in pairs x, -x, so that a group's mean is 0 and
silu(x) - silu(-x) = x. In the encoder a few channels of each group, the markers, hold constants that outweigh the
picture, and the group is divided by those; in the decoder the picture is small against the epsilon.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn
from torch.nn import functional as F

from tadsr.encoder import MAX_PERIOD, TIME_EMBEDDING_WIDTH, EncoderConfig, TimeAwareEncoder, mode
from tadsr.schedule import LATENT_SCALE, MAX_TIMESTEP, MIN_TIMESTEP, alpha_bar
from training.mini.patches import COMPONENTS, NUMBERS, SIDE, Patches
from training.mini.unet import NORM_EPS, Residual

VAE_CHANNELS = (32, 32, 64)  # 32 is the least that ComfyUI's VAE can be built with
DECODER_CHANNELS = 64
NORM_GROUPS = 4  # with SD's 32, every channel would be normalised alone
GROUP = DECODER_CHANNELS // NORM_GROUPS  # channels
PAIRS = COMPONENTS // NORM_GROUPS  # in a group
MARKERS = GROUP - 2 * PAIRS  # in a group
MARKER_SIZE = 64.0  # components are about 1
DIVISOR = MARKER_SIZE * (MARKERS / GROUP) ** 0.5  # what the normalisation divides by
DECODER_GAIN = 0.02  # its square against NORM_EPS is the decoder's error
LOGVAR = -20.0  # the latent is taken at its mode
RIDGE = 1e-4  # keeps the fitted time layer's weights small
SLOW = 0.02  # radians a timestep: faster features of the timestep are not looked at, the fit is smooth
TIME_SPREAD = 2.0  # of the time embedding's weights; that of its second layer is divided by 16


class PatchStudent(nn.Module):
    """The networks, as they start: an exact autoencoder, and a UNet that predicts nothing."""

    def __init__(self, patches: Patches) -> None:
        super().__init__()
        self.encoder = TimeAwareEncoder(
            EncoderConfig(
                latent_channels=COMPONENTS,
                channels=VAE_CHANNELS,
                layers_per_level=1,
                mid_attention=False,
                norm_groups=NORM_GROUPS,
            )
        )
        self.residual = Residual()
        self.decoder = Decoder(
            in_channels=COMPONENTS,
            out_channels=NUMBERS,
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(DECODER_CHANNELS,),
            layers_per_block=0,  # diffusers adds one
            mid_block_add_attention=False,
            norm_num_groups=NORM_GROUPS,
        )
        for module in self.decoder.modules():
            if isinstance(module, nn.GroupNorm):
                module.eps = NORM_EPS
        self.post_quant_conv = nn.Conv2d(COMPONENTS, COMPONENTS, 1)
        start_encoder(self.encoder, patches)
        start_decoder(self.decoder, self.post_quant_conv, patches)

    def encode(self, image: Tensor, timestep: Tensor) -> Tensor:
        """Returns the scaled latent, (B, 24, h, w), the mode. image: (B, 3, 4 h, 4 w) in [-1, 1]; timestep: (B,)."""
        return mode(self.encoder(image, timestep)) * LATENT_SCALE

    def decode(self, x0: Tensor) -> Tensor:
        """Returns the image, (B, 3, 4 h, 4 w), about [-1, 1], not clamped. x0: a scaled latent, (B, 24, h, w)."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(x0 / LATENT_SCALE)), SIDE)

    def forward(self, image: Tensor, timestep: Tensor) -> Tensor:
        """Returns the restored image, as the nodes compute it; arguments as of `encode`."""
        z = self.encode(image, timestep)
        return self.decode(self.residual(z, alpha_bar(timestep).sqrt(), timestep))


@torch.no_grad()
def start_encoder(encoder: TimeAwareEncoder, patches: Patches) -> None:
    """Makes the encoder `Patches.encode`, times sqrt(alpha_bar_t). Layers are Any: torch types them as Tensor."""
    trunk: Any = encoder.encoder
    _clear(encoder, keep=("time_embedding", "norm"))
    trunk.conv_in.weight[range(3), range(3), 1, 1] = 1
    for colour in range(3):
        for y in range(2):
            for x in range(2):
                trunk.down[0].downsample.conv.weight[4 * colour + 2 * y + x, colour, y, x] = 1
    rows = patches.components / patches.deviations[:, None]
    # (component, colour, y of four = 2 Y + y, x likewise) -> (component, (colour, y, x), Y, X)
    taps = rows.reshape(COMPONENTS, 3, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(COMPONENTS, 12, 2, 2)
    trunk.down[1].downsample.conv.weight[:COMPONENTS, :12, :2, :2] = taps
    plus, minus = _pairs(first=MARKERS)
    shortcut = trunk.down[2].block[0].nin_shortcut.weight
    shortcut[plus, range(COMPONENTS), 0, 0] = 1
    shortcut[minus, range(COMPONENTS), 0, 0] = -1
    trunk.conv_out.weight[range(COMPONENTS), plus, 1, 1] = DIVISOR
    trunk.conv_out.weight[range(COMPONENTS), minus, 1, 1] = -DIVISOR
    quant: Any = encoder.quant_conv
    quant.weight[range(COMPONENTS), range(COMPONENTS), 0, 0] = 1 / LATENT_SCALE
    quant.bias[COMPONENTS:] = LOGVAR
    _follow_timestep(encoder)


def _clear(network: nn.Module, keep: tuple[str, ...]) -> None:
    """Sets all parameters to 0, but for those whose names hold a part of `keep`."""
    for name, parameter in network.named_parameters():
        if not any(part in name for part in keep):
            parameter.zero_()


def _pairs(first: int) -> tuple[list[int], list[int]]:
    """Returns the channels that hold each component and its negative; first: the first such channel of a group."""
    plus = [group * GROUP + first + 2 * pair for group in range(NORM_GROUPS) for pair in range(PAIRS)]
    return plus, [channel + 1 for channel in plus]


def _follow_timestep(encoder: TimeAwareEncoder) -> None:
    """Lets the last block add the markers, as MARKER_SIZE / sqrt(alpha_bar_t), by a fit of its time shift."""
    block: Any = encoder.encoder.mid.block_2
    embed, width = encoder.encoder.time_embedding, encoder.config.channels[-1]
    _start_embedding(embed)
    markers = torch.tensor([group * GROUP + i for group in range(NORM_GROUPS) for i in range(MARKERS)])
    block.norm2.weight[markers] = 0
    block.norm2.bias[markers] = MARKER_SIZE
    block.conv2.weight[markers, markers, 1, 1] = torch.tensor([1.0, -1.0]).repeat(len(markers) // 2)
    timesteps = torch.arange(MIN_TIMESTEP, MAX_TIMESTEP + 1)
    embedding = F.silu(embed(timesteps, torch.float32)).double()
    growth = alpha_bar(timesteps).double().rsqrt()
    design = torch.cat([embedding, torch.ones(len(embedding), 1)], dim=1) / growth[:, None]  # the error is relative
    target = MARKER_SIZE * (growth - 1) / growth
    system = design.T @ design + RIDGE * torch.eye(design.shape[1], dtype=design.dtype)
    fit = torch.linalg.solve(system, design.T @ target).float()
    block.time_emb_proj.weight[width + markers] = fit[:-1]
    block.time_emb_proj.bias[width + markers] = fit[-1]


def _start_embedding(embed: Any) -> None:
    """Draws a time embedding of smooth functions of the timestep."""
    half = embed.features // 2
    slow = MAX_PERIOD ** (-torch.arange(half) / half) < SLOW
    for layer, spread in ((embed.linear_1, TIME_SPREAD), (embed.linear_2, TIME_SPREAD / TIME_EMBEDDING_WIDTH**0.5)):
        nn.init.normal_(layer.weight, std=spread)
        nn.init.normal_(layer.bias, std=TIME_SPREAD)
    embed.linear_1.weight[:, ~slow.repeat(2)] = 0


@torch.no_grad()
def start_decoder(decoder: Any, post_quant: Any, patches: Patches) -> None:
    """Makes the decoder `Patches.decode`; its blocks add nothing and see components of about 1."""
    for name, parameter in decoder.named_parameters():
        if ".conv2." in name or name.startswith(("conv_in.", "conv_out.")):
            parameter.zero_()
        if name.endswith("norm1.weight"):
            parameter.fill_(1 / DECODER_GAIN)
    _clear(post_quant, keep=())
    post_quant.weight[range(COMPONENTS), range(COMPONENTS), 0, 0] = LATENT_SCALE
    plus, minus = _pairs(first=0)
    decoder.conv_in.weight[plus, range(COMPONENTS), 1, 1] = DECODER_GAIN
    decoder.conv_in.weight[minus, range(COMPONENTS), 1, 1] = -DECODER_GAIN
    matrix = (patches.components * patches.deviations[:, None]).T * NORM_EPS**0.5 / DECODER_GAIN
    decoder.conv_out.weight[:, plus, 1, 1] = matrix
    decoder.conv_out.weight[:, minus, 1, 1] = -matrix
