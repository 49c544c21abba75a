"""Starting weights of tadsr-mini: an averaging autoencoder.

From random weights, a small network spends most of its training on reproducing colours. Started like this, it
encodes 4x4 averages of red, green and blue in three latent channels, and decodes them to a smooth enlargement; the
UNet predicts zero. All training goes into what is better than that.

The normalisations before the two output layers would divide by the picture's own contrast. A few channels of each
group, the markers, hold constants of both signs that outweigh the picture, so that they divide by a constant, which
`follow_timestep` makes grow with the timestep. Colours stand in pairs x, -x, because silu(x) - silu(-x) = x.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn
from torch.nn import functional as F

from tadsr.architecture import TIME_PROJECTION
from tadsr.encoder import TimeAwareBlock, TimeAwareEncoder
from tadsr.schedule import LATENT_SCALE, MAX_TIMESTEP, MIN_TIMESTEP, alpha_bar

COLOURS = 3
MARKER_SHARE = 4  # one channel in four is a marker
MARKER_SIZE = 4.0  # outweighs colours, whose root mean square is about 0.6
NORMALISER = MARKER_SIZE / MARKER_SHARE**0.5  # what the normalisation divides by, nearly
LATENT_GAIN = 2.0  # scaled latents of root mean square about 1
GROUP_WEIGHTS = (0.6, 0.4)  # two groups carry the colours, unequally, so that they learn different things
LOGVAR = -10.0  # the latent's noise is 0.1 % of its spread, 2 % at timestep 999, where the latent is small
RIDGE = 1e-4  # keeps the fitted time layer's weights small
SMOOTHING = torch.tensor([0.25, 0.5, 0.25])  # after repetition of pixels: linear interpolation
IDENTITY = torch.tensor([0.0, 1.0, 0.0])
SHARPENING = torch.tensor([-0.1, 1.2, -0.1])  # of the colours into the latent, and once more out of it
"""With these the start is bicubic enlargement to 47 dB (measured; tests/test_mini.py)."""


class Startable(Protocol):
    """The networks whose weights are set, as `training.mini.networks.MiniStudent` holds them."""

    encoder: TimeAwareEncoder
    decoder: Decoder
    unet: UNet2DConditionModel
    post_quant_conv: nn.Conv2d


@torch.no_grad()
def start_as_autoencoder(student: Startable, norm_groups: int) -> None:
    """Sets the starting weights of encoder, decoder, latent layers and the UNet's last layer.

    Layers are annotated as Any in this file: torch types the submodules of a network as Tensor or Module.
    """
    for network in (student.encoder, student.decoder):
        _start_blocks_as_shortcuts(network)
    _start_encoder(student.encoder, norm_groups)
    _start_decoder(student.decoder, norm_groups)
    _set(student.encoder.quant_conv, torch.eye(8) / LATENT_SCALE)
    quant: Any = student.encoder.quant_conv
    quant.weight[4:] = 0
    quant.bias[4:] = LOGVAR
    _set(student.post_quant_conv, torch.eye(4) * LATENT_SCALE)
    _set(student.unet.conv_out, torch.zeros(4, student.unet.conv_out.in_channels))


def _fit(design: Tensor, target: Tensor, penalty: float) -> Tensor:
    """Returns the weights, float32, with which `design` gives `target`, nearly; their squares cost `penalty`."""
    system = design.T @ design + penalty * torch.eye(design.shape[1], dtype=design.dtype)
    return torch.linalg.solve(system, design.T @ target).float()


def _set(layer: Any, matrix: Tensor) -> None:
    """Makes a convolution a product with `matrix` (out, in) at each pixel."""
    layer.weight[:] = 0
    layer.bias[:] = 0
    layer.weight[:, :, layer.weight.shape[2] // 2, layer.weight.shape[3] // 2] = matrix


def _start_blocks_as_shortcuts(network: nn.Module) -> None:
    """Makes residual blocks add nothing, their time layers too, and resampling average or interpolate."""
    for name, layer in network.named_modules():
        if name.endswith(f".{TIME_PROJECTION}"):
            layer.get_parameter("weight").zero_()
            layer.get_parameter("bias").zero_()
        if not isinstance(layer, nn.Conv2d):
            continue
        identity = torch.eye(*layer.weight.shape[:2])
        if name.endswith(".conv2"):
            _set(layer, 0 * identity)
        elif ".downsample" in name:
            _set(layer, identity)
            layer.weight[:] = 0
            layer.weight[:, :, :2, :2] = identity[:, :, None, None] / 4
        elif ".upsample" in name:
            _set(layer, identity)
            layer.weight[:] = identity[:, :, None, None] * torch.outer(SMOOTHING, SMOOTHING)


def _pairs() -> Tensor:
    """Returns the matrix (6, 3) that makes R, -R, G, -G, B, -B of R, G, B."""
    return torch.eye(COLOURS).repeat_interleave(2, dim=0) * torch.tensor([1.0, -1.0]).repeat(COLOURS)[:, None]


def _layout(width: int, norm_groups: int) -> tuple[Tensor, list[Tensor]]:
    """Returns the mask of markers, and for each colour group the indices of its six colour channels."""
    size = width // norm_groups
    markers = torch.arange(width) % size < size // MARKER_SHARE
    first = size // MARKER_SHARE
    return markers, [g * size + first + torch.arange(2 * COLOURS) for g in range(len(GROUP_WEIGHTS))]


def _read_colours(layer: Any, width: int, norm_groups: int, gain: float, line: Tensor) -> None:
    """Makes the first three outputs of `layer` `gain` times the colours, from pairs after silu, filtered by `line`."""
    kernel = torch.outer(line, line)
    markers, groups = _layout(width, norm_groups)
    layer.weight[:, markers] = 0
    layer.weight[:COLOURS] = 0
    layer.bias[:COLOURS] = 0
    for channels, share in zip(groups, GROUP_WEIGHTS, strict=True):
        colours = share * gain * NORMALISER * _pairs().T
        layer.weight[:COLOURS, channels] = colours[:, :, None, None] * kernel


def _route_pairs(layer: Any, norm_groups: int) -> None:
    """Makes `layer` copy its first six inputs, the pairs, to the colour channels of its output."""
    markers, groups = _layout(layer.weight.shape[0], norm_groups)
    layer.weight[markers] = 0
    layer.bias[markers] = 0
    for channels in groups:
        layer.weight[channels] = 0
        layer.bias[channels] = 0
        layer.weight[channels, torch.arange(2 * COLOURS)] = 1


def _start_encoder(encoder: TimeAwareEncoder, norm_groups: int) -> None:
    trunk: Any = encoder.encoder
    width = encoder.config.channels[-1]
    trunk.conv_in.weight[: 2 * COLOURS] = 0
    trunk.conv_in.bias[: 2 * COLOURS] = 0
    trunk.conv_in.weight[: 2 * COLOURS, :, 1, 1] = _pairs()
    _route_pairs(trunk.down[-1].block[-1].nin_shortcut, norm_groups)
    _start_markers(trunk.mid.block_2, _layout(width, norm_groups)[0])
    _read_colours(trunk.conv_out, width, norm_groups, LATENT_GAIN, SHARPENING)


def _start_markers(block: TimeAwareBlock, markers: Tensor) -> None:
    """Makes the block add +-MARKER_SIZE to the markers; silu(x) is x, nearly, for x >= 4."""
    for layer, value in ((block.norm2.weight, 0.0), (block.norm2.bias, MARKER_SIZE)):
        layer[markers] = value
    block.conv2.weight[markers, markers, 1, 1] = _signs(int(markers.sum()))


@torch.no_grad()
def follow_timestep(encoder: TimeAwareEncoder) -> None:
    """Makes latents fall with sqrt(alpha_bar_t), nearly, so that z / sqrt(alpha_bar_t) has one size.

    The last block's time shift, fitted, makes the markers grow as 1 / sqrt(alpha_bar_t), and the output
    normalisation divides by them. The encoder is one whose time layers do nothing yet.
    """
    block, embed = encoder.encoder.mid.block_2, encoder.encoder.time_embedding
    width, timesteps = encoder.config.channels[-1], torch.arange(MIN_TIMESTEP, MAX_TIMESTEP + 1)
    markers, _ = _layout(width, encoder.config.norm_groups)
    embedding = F.silu(embed(timesteps, torch.float32))
    growth = 1 / alpha_bar(timesteps).double().sqrt()
    design = torch.cat([embedding, torch.ones(len(embedding), 1)], dim=1).double()
    fit = _fit(design / growth[:, None], MARKER_SIZE * (growth - 1) / growth, RIDGE)  # the error is relative
    projection: Any = block.time_emb_proj
    projection.weight[width:][markers] = fit[:-1]
    projection.bias[width:][markers] = fit[-1]


def _signs(count: int) -> Tensor:
    return torch.tensor([1.0, -1.0]).repeat(count // 2)


def _start_decoder(decoder: Any, norm_groups: int) -> None:
    width = decoder.conv_norm_out.weight.shape[0]
    sharpen = torch.outer(SHARPENING, SHARPENING)
    decoder.conv_in.weight[: 2 * COLOURS] = 0
    decoder.conv_in.bias[: 2 * COLOURS] = 0
    decoder.conv_in.weight[: 2 * COLOURS, :COLOURS] = _pairs()[:, :, None, None] * sharpen / LATENT_GAIN
    _route_pairs(decoder.up_blocks[-2].resnets[0].conv_shortcut, norm_groups)
    markers, _ = _layout(width, norm_groups)
    last_upsampling = decoder.up_blocks[-2].upsamplers[0].conv
    last_upsampling.weight[markers] = 0
    last_upsampling.bias[markers] = MARKER_SIZE * _signs(int(markers.sum()))
    _read_colours(decoder.conv_out, width, norm_groups, 1.0, IDENTITY)
