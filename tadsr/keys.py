"""Module names of Stable Diffusion, in the diffusers and in the single-file ("ldm") layout, as one table.

Only the number of levels, the layers per level and the place of the transformers decide the names, so the
tables hold for every UNet and VAE of the SD 2.x kind. A table maps prefixes of keys, diffusers -> ldm;
`inverse` turns it round.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from .architecture import UNetLayout, vae_layout
from .errors import WeightsError

Table = Mapping[str, str]

UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
VAE_ENDS = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    "encoder.time_embedding": "encoder.time_embedding",  # TADSR's; it has no ldm name of its own
    "encoder.conv_in": "encoder.conv_in",
    "encoder.conv_norm_out": "encoder.norm_out",
    "encoder.conv_out": "encoder.conv_out",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.conv_norm_out": "decoder.norm_out",
    "decoder.conv_out": "decoder.conv_out",
}
VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time_emb_proj": "time_emb_proj",  # TADSR's
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE_MIDDLE = {"resnets.0": "block_1", "attentions.0": "attn_1", "resnets.1": "block_2"}
VAE_OLD_ATTENTION = {  # names written by diffusers before 0.17, still in most published SD 2.1 folders
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
_OLD_ATTENTION_KEY = re.compile(r"(.*\.mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)")
_ATTENTION_WEIGHT = re.compile(r"(en|de)coder\.mid\.attn_1\.(q|k|v|proj_out)\.weight")


def unet_table(layout: UNetLayout) -> dict[str, str]:
    """Returns the UNet's table: diffusers prefix -> ldm prefix."""
    table = dict(UNET_ENDS)
    step = layout.layers_per_level + 1
    for level in range(layout.levels):
        down, up, last = f"down_blocks.{level}", f"up_blocks.{level}", level == layout.levels - 1
        for layer in range(layout.layers_per_level):
            block = f"input_blocks.{1 + level * step + layer}"
            table |= _joined(f"{down}.resnets.{layer}", f"{block}.0", UNET_RESNET)
            table[f"{down}.attentions.{layer}"] = f"{block}.1"
        for layer in range(step):
            block = f"output_blocks.{level * step + layer}"
            table |= _joined(f"{up}.resnets.{layer}", f"{block}.0", UNET_RESNET)
            if layout.up_attention[level]:
                table[f"{up}.attentions.{layer}"] = f"{block}.1"
        if not last:
            table[f"{down}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * step}.0.op"
            place = 2 if layout.up_attention[level] else 1
            table[f"{up}.upsamplers.0.conv"] = f"output_blocks.{(level + 1) * step - 1}.{place}.conv"
    for ours, theirs in UNET_MIDDLE.items():
        names = UNET_RESNET if ours.startswith("resnets") else {"": ""}
        table |= _joined(f"mid_block.{ours}", f"middle_block.{theirs}", names)
    return table


def vae_table(levels: int, layers_per_level: int) -> dict[str, str]:
    """Returns the table of the VAE and the Time-Aware Encoder: diffusers prefix -> ldm prefix.

    layers_per_level: of the encoder; the decoder has one more. Diffusers counts the decoder's levels from
    the lowest resolution, ldm from the highest.
    """
    table = dict(VAE_ENDS)
    for level in range(levels):
        up = f"decoder.up.{levels - 1 - level}"
        for layer in range(layers_per_level + 1):
            table |= _joined(f"decoder.up_blocks.{level}.resnets.{layer}", f"{up}.block.{layer}", VAE_RESNET)
        for layer in range(layers_per_level):
            down = f"encoder.down.{level}.block.{layer}"
            table |= _joined(f"encoder.down_blocks.{level}.resnets.{layer}", down, VAE_RESNET)
        if level < levels - 1:
            table[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
            table[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"{up}.upsample.conv"
    for half in ("encoder", "decoder"):
        for ours, theirs in VAE_MIDDLE.items():
            names = VAE_RESNET if ours.startswith("resnets") else VAE_ATTENTION
            table |= _joined(f"{half}.mid_block.{ours}", f"{half}.mid.{theirs}", names)
    return table


def vae_table_of(names: Iterable[str]) -> dict[str, str]:
    """Returns the table of a VAE with these keys or modules in either layout; half a VAE will do."""
    return vae_table(*vae_layout(names))


def inverse(table: Table) -> dict[str, str]:
    """Returns the table the other way round: ldm prefix -> diffusers prefix."""
    turned = {theirs: ours for ours, theirs in table.items()}
    assert len(turned) == len(table), "two modules share a name"
    return turned


def rename(key: str, table: Table) -> str:
    """Returns the key or module with its longest known prefix replaced; raises WeightsError without one."""
    prefix = key
    while prefix not in table:
        prefix, dot, _ = prefix.rpartition(".")
        if not dot:
            raise WeightsError(f"{key!r} is not part of a network of the Stable Diffusion 2.x kind")
    return table[prefix] + key[len(prefix) :]


def diffusers_unet_to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a diffusers UNet's tensors under ldm names (without `model.diffusion_model.`)."""
    table = unet_table(UNetLayout.from_diffusers(state))
    return {rename(key, table): tensor for key, tensor in state.items()}


def ldm_unet_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a single-file UNet's tensors (without `model.diffusion_model.`) under diffusers names."""
    table = inverse(unet_table(UNetLayout.from_ldm(state)))
    return {rename(key, table): tensor for key, tensor in state.items()}


def diffusers_vae_to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a diffusers VAE's tensors under ldm names (without `first_stage_model.`).

    The attention's linear projections become 1x1 convolutions. Half a VAE will do, with `encoder.` or
    `decoder.` on its keys; the time layers of a Time-Aware Encoder go through too.
    """
    state = {_modern(key): tensor for key, tensor in state.items()}
    table = vae_table_of(state)
    renamed = {rename(key, table): tensor for key, tensor in state.items()}
    return {key: t[:, :, None, None] if _is_linear(key, t) else t for key, t in renamed.items()}


def ldm_vae_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a single-file VAE's tensors (without `first_stage_model.`) under diffusers names.

    The attention's 1x1 convolutions become linear projections.
    """
    table = inverse(vae_table_of(state))
    return {
        rename(key, table): tensor.flatten(1) if _ATTENTION_WEIGHT.fullmatch(key) else tensor
        for key, tensor in state.items()
    }


def _joined(ours: str, theirs: str, names: Table) -> dict[str, str]:
    return {f"{ours}.{a}".rstrip("."): f"{theirs}.{b}".rstrip(".") for a, b in names.items()}


def _modern(key: str) -> str:
    match = _OLD_ATTENTION_KEY.fullmatch(key)
    return f"{match[1]}.{VAE_OLD_ATTENTION[match[2]]}.{match[3]}" if match else key


def _is_linear(ldm_key: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and _ATTENTION_WEIGHT.fullmatch(ldm_key) is not None
