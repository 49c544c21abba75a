"""Builds MODEL and VAE from a weights file that carries its own base, of any width and depth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any

import comfy.model_base
import comfy.model_detection
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor

from ...tadsr.architecture import PICTURE_CHANNELS, VAE_ATTENTION, VaeHalf, shapes_of
from ...tadsr.lora import check_keys
from ..compat import ensure_own_decoder

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

SD_CHANNELS = 320  # first width of the SD 2.1 UNet: ComfyUI's memory factors are for this
SD_VAE_CHANNELS = 128  # first width of the SD VAE: ComfyUI's memory formulas are for this
SD_DOWNSCALE = 8  # of the SD VAE
UNET_NORM = re.compile(r".*(in_layers|out_layers)\.0|out\.0")  # not those of transformers
DECODER_NORM = re.compile(r".*norm[12]|norm_out")


class StudentUNet(comfy.supported_models.SD20):
    """SD 2.x of any size: told from its file, not from a table, and never taken for v-prediction."""

    def model_type(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.EPS

    def inpaint_model(self) -> bool:
        return False  # ComfyUI takes more than 4 channels for a mask and a masked picture


@dataclass(frozen=True)
class Multiple:
    """A width as a multiple of the first width, exact where ComfyUI's integers are not (96 = 1.5 x 64)."""

    width: int

    def __mul__(self, first: int) -> int:
        return self.width

    __rmul__ = __mul__


class NoAttention(torch.nn.Module):
    """Stands in the middle of a VAE without attention."""

    def __init__(self, in_channels: int, conv_op: object = None) -> None:
        super().__init__()

    def forward(self, x: Tensor, **_: object) -> Tensor:
        return x


class PatchConv(comfy.ops.disable_weight_init.Conv2d):
    """The last convolution of a decoder that gives a square of pixels for each of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        numbers: Tensor = super().forward(*args, **kwargs)
        return torch.nn.functional.pixel_shuffle(numbers, isqrt(numbers.shape[1] // PICTURE_CHANNELS))


def build_unet(
    state: Mapping[str, Tensor],
    downscale: int,
    dtype: torch.dtype | None = None,
    *,
    norm_eps: float = 0.0,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """Returns the MODEL of a UNet of the SD 2.x kind. state: keys `diffusion_model.*`.

    downscale: image pixels per latent pixel. dtype: None for ComfyUI's choice. norm_eps: `Metadata.norm_eps`.
    disable_dynamic: without ComfyUI's dynamic VRAM. Raises WeightsError if tensors are missing or left over.
    """
    unet = {key.removeprefix("diffusion_model."): tensor for key, tensor in state.items()}
    config = StudentUNet(_unet_config(unet))
    load_device = mm.get_torch_device()
    supported = list(config.supported_inference_dtypes)
    chosen = dtype or mm.unet_dtype(
        model_params=comfy.utils.calculate_parameters(unet),
        supported_dtypes=supported,
        weight_dtype=comfy.utils.weight_dtype(unet),
    )
    config.set_inference_dtype(chosen, None if dtype else mm.unet_manual_cast(chosen, load_device, supported))
    config.memory_usage_factor *= config.unet_config["model_channels"] / SD_CHANNELS
    if downscale != SD_DOWNSCALE:
        _describe_own_latents(config, downscale)
    model = config.get_model(unet, "")
    _set_norm_eps(model.diffusion_model, UNET_NORM, norm_eps)
    check_keys("UNet", unet, set(model.diffusion_model.state_dict()))
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=load_device, offload_device=mm.unet_offload_device())
    model.load_model_weights(unet, "", assign=patcher.is_dynamic())
    return patcher


def _unet_config(unet: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns ComfyUI's configuration of the UNet, with exact widths."""
    config = comfy.model_detection.detect_unet_config(unet, "")
    step = config["num_res_blocks"][0] + 1
    levels = range(len(config["channel_mult"]))
    config["channel_mult"] = [
        Multiple(unet[f"input_blocks.{1 + level * step}.0.out_layers.3.weight"].shape[0]) for level in levels
    ]
    return config


def _describe_own_latents(config: StudentUNet, downscale: int) -> None:
    """Tells ComfyUI that the latents are not SD's: other size, and no preview decoder knows them."""
    config.latent_format.latent_channels = config.unet_config["in_channels"]
    config.latent_format.spacial_downscale_ratio = downscale
    config.latent_format.latent_rgb_factors = None
    config.latent_format.taesd_decoder_name = None


def _set_norm_eps(network: torch.nn.Module, names: re.Pattern[str], eps: float) -> None:
    """Sets the epsilon of the normalisations with these names; 0 leaves SD's."""
    for name, module in network.named_modules():
        if eps and isinstance(module, torch.nn.GroupNorm) and names.fullmatch(name):
            module.eps = eps


def build_vae(
    state: Mapping[str, Tensor], norm_groups: int, dtype: torch.dtype | None = None, norm_eps: float = 0.0
) -> comfy.sd.VAE:
    """Returns the VAE for tensors `encoder.*`, `decoder.*`, `quant_conv.*`, `post_quant_conv.*` of any width.

    Attention in the middle of encoder and decoder may be absent. Raises WeightsError if tensors are missing.
    norm_groups: groups of every normalisation; ComfyUI builds all VAEs with 32. dtype: None for ComfyUI's choice.
    norm_eps: `Metadata.norm_eps`, of the decoder.
    """
    encoder, decoder = _half_config(state, "encoder"), _half_config(state, "decoder")
    if not any(key.startswith(f"decoder.{VAE_ATTENTION}") for key in state):
        decoder["attn_op"] = NoAttention
    sizes = VaeHalf.of_decoder(shapes_of(state))
    if sizes.patch > 1:
        decoder["conv_out_op"] = PatchConv
    state = {**state, **_absent_encoder_attention(state)}
    params = {
        "ddconfig": encoder,
        "decoder_ddconfig": decoder,
        "embed_dim": state["post_quant_conv.weight"].shape[1],
    }
    vae = comfy.sd.VAE(sd=dict(state), config={"params": params}, dtype=dtype)
    ensure_own_decoder(vae, decoder, state)
    check_keys("VAE", state, set(vae.first_stage_model.state_dict()))
    for module in vae.first_stage_model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = norm_groups
    _set_norm_eps(vae.first_stage_model.decoder, DECODER_NORM, norm_eps)
    vae.latent_channels = decoder["z_channels"]
    _set_size(vae, sizes.upscale, encoder["ch"], decoder["ch"] / sizes.patch**2)
    return vae


def _half_config(state: Mapping[str, Tensor], half: str) -> dict[str, Any]:
    """Returns ComfyUI's configuration of an encoder or decoder, read from shapes."""
    shapes = shapes_of(state)
    sizes = VaeHalf.of_encoder(shapes) if half == "encoder" else VaeHalf.of_decoder(shapes)
    return {
        "double_z": True,
        "z_channels": shapes["decoder.conv_in.weight"][1],
        "resolution": 256,  # decides nothing without attn_resolutions
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_ch": shapes["decoder.conv_out.weight"][0],
        "ch": sizes.channels[0],
        "ch_mult": [Multiple(width) for width in sizes.channels],
        "num_res_blocks": sizes.blocks if half == "encoder" else sizes.blocks - 1,  # the decoder has one more
        "attn_resolutions": [],
        "dropout": 0.0,
    }


def _absent_encoder_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns an attention that adds nothing, if the encoder has none: ComfyUI's always has one."""
    prefix = f"encoder.{VAE_ATTENTION}"
    if any(key.startswith(prefix) for key in state):
        return {}
    width = state["encoder.conv_out.weight"].shape[1]
    tensors = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    for projection in ("q", "k", "v", "proj_out"):
        tensors[f"{projection}.weight"] = torch.zeros(width, width, 1, 1)
        tensors[f"{projection}.bias"] = torch.zeros(width)
    return {f"{prefix}{key}": tensor for key, tensor in tensors.items()}


def _set_size(vae: comfy.sd.VAE, downscale: int, encoder: float, decoder: float) -> None:
    """Tells the VAE its downscale, and scales ComfyUI's formulas by its halves' numbers per pixel.

    The decoder's counts latent pixels, which for SD stand for SD_DOWNSCALE pixels along each side.
    """
    encode_share = encoder / SD_VAE_CHANNELS
    decode_share = decoder / SD_VAE_CHANNELS * (downscale / SD_DOWNSCALE) ** 2
    encode_memory, decode_memory = vae.memory_used_encode, vae.memory_used_decode
    vae.memory_used_encode = lambda shape, dtype: encode_share * encode_memory(shape, dtype)
    vae.memory_used_decode = lambda shape, dtype: decode_share * decode_memory(shape, dtype)
    vae.downscale_ratio = vae.upscale_ratio = downscale
