"""Random weights in which every part matters: self-contained ones, and adapters with a checkpoint for them."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn

from tadsr.architecture import is_time_layer
from tadsr.encoder import EncoderConfig, TimeAwareEncoder
from tadsr.keys import diffusers_unet_to_ldm, diffusers_vae_to_ldm
from tadsr.lora import Adapter
from tadsr.weights import BASE_UNET_PREFIX, BASE_VAE_PREFIX, Metadata, TadsrWeights
from training.mini import MiniStudent
from training.mini.export import weights_from_student

SD_CONTEXT_WIDTH = 1024
ADAPTED = ("input_blocks.0.0", "input_blocks.1.1.transformer_blocks.0.attn2.to_k", "middle_block.0.out_layers.3")
ADAPTED_ENCODER = ("encoder.conv_in", "encoder.mid.attn_1.q", "quant_conv")
RANK, ALPHA = 4, 8.0
PARTS = ("weight", "bias")


def random_student(seed: int = 0) -> MiniStudent:
    """Returns the bundled model's networks with noise in every convolution that training starts at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = MiniStudent().eval()
        for name, parameter in student.named_parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.5 / parameter[0].numel() ** 0.5)
            elif "time_emb_proj" in name:
                nn.init.normal_(parameter, std=0.1)
    return student


def self_contained(seed: int = 0) -> TadsrWeights:
    """Returns the random student as a weights file's content; equal seeds give equal weights."""
    return weights_from_student(random_student(seed), source_sha256="", steps=0, dtype=torch.float32)


def sd_unet() -> UNet2DConditionModel:
    """Returns a UNet of SD 2.1's widths, with one level of one block."""
    return UNet2DConditionModel(
        block_out_channels=(320,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=(5,),
        cross_attention_dim=SD_CONTEXT_WIDTH,
        use_linear_projection=True,
    )


def sd_checkpoint() -> dict[str, Tensor]:
    """Returns a checkpoint that ComfyUI takes for Stable Diffusion 2.1: its widths, one level of one block.

    No text encoder. The VAE has the size of SD's, which ComfyUI takes for granted.
    """
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = sd_unet()
        encoder = TimeAwareEncoder(EncoderConfig())
        decoder = Decoder(
            in_channels=4,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        post = nn.Conv2d(4, 4, 1)
    vae = {key: tensor for key, tensor in encoder.state_dict().items() if not is_time_layer(key)}
    vae |= diffusers_vae_to_ldm({f"decoder.{key}": tensor for key, tensor in decoder.state_dict().items()})
    vae |= {f"post_quant_conv.{key}": tensor for key, tensor in post.state_dict().items()}
    state = {BASE_UNET_PREFIX + key: tensor for key, tensor in diffusers_unet_to_ldm(unet.state_dict()).items()}
    return state | {BASE_VAE_PREFIX + key: tensor for key, tensor in vae.items()}


def adapters_for(checkpoint: dict[str, Tensor], context_width: int = SD_CONTEXT_WIDTH) -> TadsrWeights:
    """Returns TADSR weights without a base, made for the checkpoint."""
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> Tensor:
        return 0.05 * torch.randn(shape, generator=generator)

    def adapt(module: str, weight: Tensor) -> dict[str, Tensor]:
        up = (len(weight), RANK, 1, 1) if weight.ndim == 4 else (len(weight), RANK)
        return Adapter(noise(RANK, *weight.shape[1:]), noise(*up), ALPHA).tensors(module)

    unet_lora, encoder_lora = {}, {}
    for module in ADAPTED:
        unet_lora |= adapt(f"diffusion_model.{module}", checkpoint[f"{BASE_UNET_PREFIX}{module}.weight"])
    for module in ADAPTED_ENCODER:
        encoder_lora |= adapt(module, checkpoint[f"{BASE_VAE_PREFIX}{module}.weight"])
    conv_in = {f"input_blocks.0.0.{part}": checkpoint[f"{BASE_UNET_PREFIX}input_blocks.0.0.{part}"] for part in PARTS}
    encoder = TimeAwareEncoder(EncoderConfig()).state_dict()
    return TadsrWeights(
        unet_lora=unet_lora,
        unet_full={f"diffusion_model.{key}": noise(*tensor.shape) for key, tensor in conv_in.items()},
        encoder_lora=encoder_lora,
        encoder_time={key: noise(*tensor.shape) for key, tensor in encoder.items() if is_time_layer(key)},
        prompt=noise(1, 8, context_width),
        base={},
        metadata=Metadata(name="random adapters", rank=RANK, alpha=ALPHA),
    )
