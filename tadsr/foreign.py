"""What a file is that is not what was expected, told from its keys and first bytes: for error messages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .architecture import Shapes

MAX_HEADER_BYTES = 100_000_000  # the safetensors format
CONVERT_HINT = "convert an official tadsr.pkl with: python -m tadsr.convert tadsr.pkl -o tadsr.safetensors"
SUPPORTED = "accepted are the weights of TADSR, OSEDiff, PiSA-SR, OMGSR-S and HYPIR"

FOREIGN_KEYS = (  # first match wins: pattern of a key, what such a file is, where it belongs
    (
        r"(base_model\.model\.|transformer\.)?transformer_blocks\.",
        "weights for Stable Diffusion 3, as TSD-SR's",
        f"not supported: another base model; {SUPPORTED}",
    ),
    (
        r"base_model\.model\..+\.lora_(A|B)\.weight",
        "adapters of peft without the folder around them",
        "keep each network's folder whole, with adapter_config.json, and both in one folder, as OMGSR has it",
    ),
    (
        r"(module\.)?body\.",
        "the network of AdcSR",
        f"not supported: it is another network, with its own node packs; {SUPPORTED}",
    ),
    (
        r"encoder_time\.encoder\.time_embedding\.",
        "a TADSR weights file",
        "choose it in Load TADSR Model",
    ),
    (
        r"visual_encoder\.layers\.|tagging_head\.",
        "a tagger (RAM or DAPE)",
        "choose the converted file in Prompt from Image (DAPE)",
    ),
    (
        r"model\.diffusion_model\.|first_stage_model\.",
        "a Stable Diffusion checkpoint",
        "put it in models/checkpoints and choose it as the base checkpoint",
    ),
    (
        r"lora_unet_|lora_te|.*\.lora_(A|B|up|down)\b",
        "a LoRA without a Time-Aware Encoder",
        "put it in models/loras",
    ),
    (
        r"(down|up)_blocks\.|mid_block\.",
        "a UNet in diffusers format",
        "give the folder above it to python -m tadsr.convert as --base",
    ),
    (r"(encoder|decoder|quant_conv)\.", "a VAE", "put it in models/vae"),
    (
        r"(text_model|vision_model|visual|text_projection|transformer\.resblocks)\b",
        "a CLIP model",
        "put it in models/text_encoders or models/clip_vision",
    ),
    (
        r"(layers\.\d+\.blocks|blocks\.\d+|stages\.\d+)\.",
        "another image classifier, such as WD14",
        "use the nodes made for it; any of them that gives a STRING can make the prompt",
    ),
)
FOREIGN_BYTES = (  # how a file begins, what it is, what to do (nothing: the hint that is given)
    (b"PK\x03\x04", "a PyTorch pickle (nothing in it was executed)", ""),
    (b"\x80", "a Python pickle (nothing in it was executed)", ""),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it with git lfs pull"),
    (b"<", "a web page", "download the file itself, not the page about it"),
)


FOREIGN_CONTENT: tuple[tuple[set[str], str, str], ...] = (  # entries of a pickle's dict, what it is, why not
    (
        {"state_dict_vae_de_mlp"},
        "the weights of S3Diff",
        "not supported: its adapters depend on each picture, by a second network",
    ),
    ({"state_dict_sft"}, "the weights of CODSR", "not supported: it changes the UNet's features by the picture itself"),
    (
        {"unet", "vae"},
        "the whole OSEDiff in one file, as AdcSR's page offers it",
        "not supported: get the osediff.pkl of 18 MB from OSEDiff's own repository, and Stable Diffusion 2.1-base",
    ),
    ({"state_dict"}, "a whole checkpoint", "put it in models/checkpoints and choose it as the base checkpoint"),
)
FOREIGN_MODELS = (  # pattern of a checkpoint's key, whose model it is
    (r"(model\.diffusion_model\.)?double_blocks\.", "Flux, or a model of its kind"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "Stable Diffusion 3"),
    (r"model\.diffusion_model\.label_emb\.|conditioner\.embedders\.1\.", "Stable Diffusion XL"),
    (r"(transformer\.)?transformer_blocks\.", "a transformer in diffusers format, as Stable Diffusion 3 or newer"),
    (r"(unet\.)?(down|up)_blocks\.", "a UNet in diffusers format; a checkpoint in one file is needed"),
    (r"control_model\.|controlnet_blocks\.|control_", "a ControlNet"),
    (r"lora_unet_|lora_te|.*\.lora_(A|B|up|down)\b", "a LoRA"),
    (r"(encoder|decoder)\.(conv_in|down|up|mid)", "a VAE alone"),
)
UNET_INPUTS = {5: "a depth-to-image model", 7: "an upscaler", 8: "an editing model", 9: "an inpainting model"}
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
CONTEXT_LAYER = re.compile(r"model\.diffusion_model\..*\.attn2\.to_k\.weight")


def describe_content(content: Mapping[str, Any]) -> str:
    """Returns what a dict from a pickle is, and why it is not supported; "" where it is not known."""
    for keys, what, cure in FOREIGN_CONTENT:
        if keys <= set(content):
            return f"it holds {what}: {cure}; {SUPPORTED}"
    names = [key for key in content if isinstance(key, str)]
    known = _first_match(FOREIGN_KEYS, names)
    if any(key.startswith("down_blocks.") for key in names) and not any(key.startswith("up_blocks.") for key in names):
        return f"it holds an encoder of its own, as InvSR's noise predictor: not supported; {SUPPORTED}"
    return "" if known is None else f"it is {known[0]}: {known[1]}"


def describe_model(shapes: Shapes) -> str:
    """Returns which model a checkpoint holds that is not Stable Diffusion 2.1-base; "" where its keys do not tell."""
    for pattern, what in FOREIGN_MODELS:
        if any(re.match(pattern, key) for key in shapes):
            return what
    inputs = shapes.get(FIRST_LAYER, (0, 0))[1]
    if inputs in UNET_INPUTS:
        return f"{UNET_INPUTS[inputs]} (its UNet takes {inputs} channels)"
    width = next((shape[-1] for key, shape in shapes.items() if CONTEXT_LAYER.fullmatch(key)), 0)
    return "Stable Diffusion 1.x" if width == 768 else ""


def _first_match(table: Iterable[tuple[str, str, str]], keys: Sequence[str]) -> tuple[str, str] | None:
    for pattern, what, cure in table:
        if any(re.match(pattern, key) for key in keys):
            return what, cure
    return None


def describe_keys(keys: Sequence[str], hint: str = CONVERT_HINT) -> str:
    """Returns what a safetensors file with these keys is, and where it belongs; `hint` where nothing is known."""
    known = _first_match(FOREIGN_KEYS, keys)
    if known:
        return f"{known[0]}: {known[1]}"
    return f"something else ({len(keys)} tensors: {', '.join(sorted(keys)[:3])}, ...): {hint}"


def describe_bytes(path: Path, hint: str = CONVERT_HINT) -> str:
    """Returns what a file that is no readable safetensors file seems to be, and what to do; `hint`: for a pickle."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(32)
        header_size = int.from_bytes(start[:8], "little")
        if start[8:9] == b"{" and header_size <= MAX_HEADER_BYTES:
            end = _data_end(file, header_size)
            needed = "" if end is None else f" of {8 + header_size + end}"
            return f"a damaged or incomplete safetensors file ({size}{needed} bytes): get it again"
    for magic, what, cure in FOREIGN_BYTES:
        if start.startswith(magic):
            return f"not a safetensors file but {what}: {cure or hint}"
    return f"not a safetensors file ({size} bytes): {hint}"


def _data_end(file: BinaryIO, header_size: int) -> int | None:
    """Returns where the last tensor ends, counted from the end of the header; None if unreadable."""
    file.seek(8)
    try:
        entries = json.loads(file.read(header_size))
        return max(e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
