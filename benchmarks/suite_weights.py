"""Random weights in the shape of SD 2.1 at a fraction of its widths, in one self-contained file."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from torch import nn

from tadsr.architecture import is_time_layer
from tadsr.encoder import EncoderConfig, TimeAwareEncoder
from tadsr.keys import diffusers_unet_to_ldm, diffusers_vae_to_ldm
from tadsr.weights import BASE_UNET_PREFIX, BASE_VAE_PREFIX, Metadata, TadsrWeights, save

VAE_WIDTHS, VAE_GROUPS = (32, 64, 128, 128), 8  # a quarter of SD's: a sixteenth of the time
CONTEXT_WIDTH, TOKENS, LATENT_CHANNELS = 64, 77, 4
UNET = {  # a fifth of SD's widths; heads of 64 channels as there
    "block_out_channels": (64, 128, 256, 256),
    "attention_head_dim": (1, 2, 4, 4),
    "cross_attention_dim": CONTEXT_WIDTH,
    "use_linear_projection": True,
}


def write_random_weights(path: Path, seed: int = 0) -> None:
    """Writes weights with SD 2.1's levels, blocks and attention. They say nothing about quality."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**UNET)
    encoder = TimeAwareEncoder(EncoderConfig(channels=VAE_WIDTHS, norm_groups=VAE_GROUPS)).state_dict()
    decoder = Decoder(
        in_channels=LATENT_CHANNELS,
        out_channels=3,
        up_block_types=("UpDecoderBlock2D",) * len(VAE_WIDTHS),
        block_out_channels=VAE_WIDTHS,
        layers_per_block=2,
        norm_num_groups=VAE_GROUPS,
    )
    post = nn.Conv2d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
    vae = {key: tensor for key, tensor in encoder.items() if not is_time_layer(key)}
    vae |= diffusers_vae_to_ldm({f"decoder.{key}": tensor for key, tensor in decoder.state_dict().items()})
    vae |= {f"post_quant_conv.{key}": tensor for key, tensor in post.state_dict().items()}
    base = {BASE_UNET_PREFIX + key: tensor for key, tensor in diffusers_unet_to_ldm(unet.state_dict()).items()}
    base |= {BASE_VAE_PREFIX + key: tensor for key, tensor in vae.items()}
    weights = TadsrWeights(
        unet_lora={},
        unet_full={},
        encoder_lora={},
        encoder_time={key: tensor for key, tensor in encoder.items() if is_time_layer(key)},
        prompt=torch.randn(1, TOKENS, CONTEXT_WIDTH),
        base=base,
        metadata=Metadata(name="random", vae_norm_groups=VAE_GROUPS),
    )
    save(path, weights)
