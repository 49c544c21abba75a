"""The base model that training starts from: Stable Diffusion 2.1-base, or any UNet and VAE of its kind.

All sizes of the networks are read from the shapes of tensors.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tadsr.architecture import MAX_LAYERS, MAX_LEVELS, VaeHalf, attention_levels, count, is_time_layer, shapes_of
from tadsr.encoder import EncoderConfig, TimeAwareEncoder
from tadsr.errors import WeightsError
from tadsr.keys import ldm_unet_to_diffusers, ldm_vae_to_diffusers
from tadsr.lora import check_keys, same_shape
from tadsr.schedule import LATENT_SCALE
from training.networks.base_files import ACCEPTED, LATENT_CHANNELS, read_tensors

NORM = re.compile(r"(.+\.)?(norm[12]|conv_norm_out)")  # in diffusers; transformers' group normalisation is `norm`
HEAD_CHANNELS = 64  # SD 2.x UNet config: channels per attention head


class LatentDecoder(nn.Module):
    """The VAE's decoder with `post_quant_conv`; patch: `VaeHalf.patch`."""

    def __init__(self, decoder: Decoder, latent_channels: int = LATENT_CHANNELS, patch: int = 1) -> None:
        super().__init__()
        self.decoder, self.patch = decoder, patch
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def forward(self, x0: Tensor) -> Tensor:
        """Returns the image (B, 3, H, W), about [-1, 1], not clamped. x0: (B, C, h, w), scaled, of any dtype."""
        latent = self.post_quant_conv((x0 / LATENT_SCALE).to(self.post_quant_conv.weight.dtype))
        return F.pixel_shuffle(self.decoder(latent), self.patch)

    def enable_checkpointing(self) -> None:
        """Makes the backward pass compute each block again instead of keeping its activations."""
        decoder: Any = self.decoder
        decoder.gradient_checkpointing = True
        decoder._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


@dataclass(frozen=True)
class Base:
    """A base model, float32, frozen, on the CPU."""

    unet: UNet2DConditionModel
    encoder: dict[str, Tensor]  # encoder.*, quant_conv.* under names of a single file; no time layers
    decoder: LatentDecoder
    norm_groups: int  # of every normalisation in the VAE
    encoder_time: dict[str, Tensor]  # trained time layers, if the base has them in itself
    prompt: Tensor | None  # (1, tokens, width): the default prompt's embedding, of a TADSR weights file
    name: str
    sha256: str  # of the tensors, so that a file and a folder of the same model agree


def load_base(path: Path) -> Base:
    """Returns the base model in a checkpoint, a diffusers folder or a self-contained TADSR weights file.

    A weights file with adapters gives the base under them; the time layers of one without belong to its base.
    Raises WeightsError for anything that is not of the Stable Diffusion 2.x kind, saying what it seems to be.
    """
    source = read_tensors(path)
    try:
        unet, vae = source.unet, source.vae
        return Base(
            unet=build_unet(unet),
            encoder=_encoder_part(vae),
            decoder=build_decoder(vae, source.norm_groups),
            norm_groups=source.norm_groups,
            encoder_time=source.encoder_time,
            prompt=source.prompt,
            name=source.name,
            sha256=_fingerprint(source.state),
        )
    except KeyError as error:
        raise WeightsError(f"{path} cannot be the base model: it has no tensor {error}; {ACCEPTED}") from error
    except WeightsError as error:
        raise WeightsError(f"{path} cannot be the base model: {error}") from error


def build_unet(state: Mapping[str, Tensor], norm_eps: float = 0.0) -> UNet2DConditionModel:
    """Returns a frozen float32 UNet. state: names of a single file, without prefix; raises WeightsError.

    norm_eps: `Metadata.norm_eps`.
    """
    named = {key: tensor.float() for key, tensor in ldm_unet_to_diffusers(state).items()}
    config = unet_config(named)
    with torch.device("meta"):  # the tensors are taken over, none is made
        network = UNet2DConditionModel(**config)
    load_strictly(network, named, "UNet")
    _set_norm_eps(network, norm_eps)
    return network.requires_grad_(False).eval()


def _set_norm_eps(network: nn.Module, eps: float) -> None:
    """Sets the epsilon of residual blocks' and last normalisations; 0 leaves SD's."""
    for name, module in network.named_modules():
        if eps and isinstance(module, nn.GroupNorm) and NORM.fullmatch(name):
            module.eps = eps


def build_decoder(vae: Mapping[str, Tensor], norm_groups: int, norm_eps: float = 0.0) -> LatentDecoder:
    """Returns a frozen float32 decoder. vae: names of a single file; `encoder.*` is left out.

    norm_eps: `Metadata.norm_eps`.
    """
    half = {key: tensor for key, tensor in vae.items() if key.startswith(("decoder.", "post_quant_conv."))}
    sizes = VaeHalf.of_decoder(shapes_of(half))
    with torch.device("meta"):
        network = LatentDecoder(
            Decoder(
                in_channels=sizes.in_channels,
                out_channels=sizes.out_channels,
                up_block_types=("UpDecoderBlock2D",) * len(sizes.channels),
                block_out_channels=sizes.channels,
                layers_per_block=sizes.blocks - 1,  # diffusers adds one
                norm_num_groups=norm_groups,
                mid_block_add_attention=sizes.mid_attention,
            ),
            sizes.in_channels,
            sizes.patch,
        )
    named = {key: tensor.float() for key, tensor in ldm_vae_to_diffusers(half).items()}
    load_strictly(network, named, "VAE decoder")
    _set_norm_eps(network, norm_eps)
    return network.requires_grad_(False).eval()


def unet_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the arguments of UNet2DConditionModel for tensors in diffusers names, from their shapes."""
    levels = count(state, r"down_blocks\.(\d+)\.", MAX_LEVELS)
    channels = tuple(state[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels))
    down, up = (attention_levels(state, path, levels) for path in ("down_blocks", "up_blocks"))
    context = next((t.shape[1] for key, t in state.items() if key.endswith(".attn2.to_k.weight")), None)
    if context is None:
        raise WeightsError(f"its UNet has no cross-attention; {ACCEPTED}")
    return {
        "in_channels": state["conv_in.weight"].shape[1],
        "out_channels": state["conv_out.weight"].shape[0],
        "block_out_channels": channels,
        "layers_per_block": count(state, r"down_blocks\.0\.resnets\.(\d+)\.", MAX_LAYERS),
        "down_block_types": tuple("CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in down),
        "up_block_types": tuple("CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in up),
        "attention_head_dim": tuple(max(1, width // HEAD_CHANNELS) for width in channels),  # it counts heads
        "transformer_layers_per_block": count(
            state, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.", MAX_LAYERS
        ),
        "cross_attention_dim": context,
        "use_linear_projection": True,
    }


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Makes the tensors the network's own, without a copy; raises WeightsError unless keys and shapes agree."""
    expected = {key: tensor.shape for key, tensor in network.state_dict().items()}
    check_shapes(what, state, expected)
    network.load_state_dict(dict(state), assign=True)


def check_shapes(what: str, state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raises WeightsError, naming the first that differs, unless the tensors have these keys and shapes."""
    check_keys(what, state, set(expected))
    for key, shape in expected.items():
        if not same_shape(state[key].shape, shape):
            raise WeightsError(
                f"{what}: {key} is {tuple(state[key].shape)}; with its other tensors goes {tuple(shape)}"
            )


def _encoder_part(vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the encoder and `quant_conv`, float32, checked to be whole."""
    part = {key: tensor.float() for key, tensor in vae.items() if key.startswith(("encoder.", "quant_conv."))}
    shapes = TimeAwareEncoder(EncoderConfig.from_state_dict(part), device="meta").state_dict()
    expected = {key: tensor.shape for key, tensor in shapes.items() if not is_time_layer(key)}
    check_shapes("VAE encoder", part, expected)
    return {key: tensor.reshape(expected[key]) for key, tensor in part.items()}


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].contiguous()
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
