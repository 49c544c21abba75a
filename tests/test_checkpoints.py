"""Base checkpoints in Load TADSR Model: a broken or foreign one is named, and a file may change after it was read."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nearly import assert_nearly
from random_weights import adapters_for, sd_checkpoint, self_contained
from safetensors.torch import save_file
from torch import Tensor

from host.comfy_in_process import InProcessComfy
from host.node_pack import NO_BASE, load_pack, models_folder, picture
from tadsr.weights import BASE_UNET_PREFIX, BASE_VAE_PREFIX, save

ADAPTERS, MINI = "checkpoints-adapters.safetensors", "checkpoints-mini.safetensors"
TEXT = "cond_stage_model.model.transformer.resblocks"
Change = Callable[[dict[str, Tensor]], object]
pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Tensor]:
    return {key: tensor.half() for key, tensor in sd_checkpoint().items()}


@pytest.fixture(scope="module")
def models(comfy_inprocess: InProcessComfy) -> Path:
    models = models_folder(comfy_inprocess)
    save(models / "tadsr" / ADAPTERS, adapters_for(sd_checkpoint()))
    save(models / "tadsr" / MINI, self_contained())
    return models


def lose(part: str) -> Change:
    return lambda state: state.pop(part)


def put(key: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda state: state.update({key: change(state[key])})


def nan(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[0] = torch.nan
    return changed


def text_encoder(state: dict[str, Tensor]) -> None:
    """Two layers, of which the second lacks a tensor."""
    for key in ("0.ln_1.weight", "0.ln_1.bias", "1.ln_1.weight"):
        state[f"{TEXT}.{key}"] = torch.zeros(4)


DECODER, UNET = f"{BASE_VAE_PREFIX}decoder.up.1.block.0.conv1.weight", f"{BASE_UNET_PREFIX}out.2.weight"
BROKEN: dict[str, tuple[Change, str]] = {
    "a decoder without a tensor": (lose(DECODER), rf"lacks 1 tensors of its network \({DECODER}\)"),
    "a UNet without a tensor": (lose(UNET), rf"lacks 1 tensors of its network \({UNET}\)"),
    "integers": (put(UNET, lambda t: t.to(torch.int8)), f"{UNET} is of the type torch.int8; accepted are floating"),
    "NaN in the UNet": (put(UNET, nan), f"{UNET} holds NaN or infinity"),
    "NaN in the decoder": (put(DECODER, nan), f"{DECODER} holds NaN or infinity"),
    "a text encoder without a tensor": (text_encoder, r"layer 1 of its text encoder lacks 1 tensors \(ln_1.bias\)"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_checkpoint_is_refused(
    comfy_inprocess: InProcessComfy, models: Path, checkpoint: dict[str, Tensor], fault: str
) -> None:
    change, message = BROKEN[fault]
    state = dict(checkpoint)
    change(state)
    save_file(state, models / "checkpoints" / "broken.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        load_pack(comfy_inprocess, ADAPTERS, "broken.safetensors")
    assert "broken.safetensors" in str(caught.value)


def keys(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(4, 4) for name in names}


CROSS = f"{BASE_UNET_PREFIX}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FOREIGN: dict[str, tuple[dict[str, Tensor], str]] = {
    "Flux": (keys("model.diffusion_model.double_blocks.0.img_attn.qkv.weight"), "Flux"),
    "SD 3": (keys("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "Stable Diffusion 3"),
    "SDXL": (keys("model.diffusion_model.label_emb.0.0.weight"), "Stable Diffusion XL"),
    "SD 1.5": ({CROSS: torch.zeros(320, 768)}, "Stable Diffusion 1.x"),
    "inpainting": (
        {f"{BASE_UNET_PREFIX}input_blocks.0.0.weight": torch.zeros(320, 9, 3, 3)},
        r"an inpainting model \(its UNet takes 9 channels\)",
    ),
    "ControlNet": (keys("control_model.input_blocks.0.0.weight"), "a ControlNet"),
    "LoRA": (keys("lora_unet_down_blocks_0.lora_up.weight"), "a LoRA"),
    "VAE": (keys("encoder.conv_in.weight", "decoder.conv_in.weight"), "a VAE alone"),
    "diffusers": (keys("down_blocks.0.resnets.0.conv1.weight"), "a UNet in diffusers format"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_checkpoint_is_named(comfy_inprocess: InProcessComfy, models: Path, kind: str) -> None:
    state, what = FOREIGN[kind]
    save_file(state, models / "checkpoints" / "foreign.safetensors")
    message = rf"foreign.safetensors seems to be {what}.*accepted is Stable Diffusion 2.1-base"
    with pytest.raises(ValueError, match=message) as caught:
        load_pack(comfy_inprocess, ADAPTERS, "foreign.safetensors")
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(60), b"<html></html>", b"\x80\x02N."])
def test_a_damaged_checkpoint_is_one_sentence(comfy_inprocess: InProcessComfy, models: Path, content: bytes) -> None:
    for name in ("damaged.safetensors", "damaged.ckpt"):
        (models / "checkpoints" / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.*accepted is") as caught:
            load_pack(comfy_inprocess, ADAPTERS, name)
        assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


def test_extensions_are_taken_without_regard_to_case(
    comfy_inprocess: InProcessComfy, models: Path, checkpoint: dict[str, Tensor]
) -> None:
    import folder_paths

    adapters, base = "Shouted.SAFETENSORS", "Shouted.CKPT"
    save(models / "tadsr" / adapters, adapters_for(sd_checkpoint()))
    torch.save({"state_dict": checkpoint}, models / "checkpoints" / base)
    assert adapters in folder_paths.get_filename_list("tadsr")
    assert base in folder_paths.get_filename_list("checkpoints")
    assert load_pack(comfy_inprocess, adapters, base).upscale(picture(8, 8), 300).shape == (1, 32, 32, 3)


def mapped(path: Path) -> bool:
    """Returns whether a file is mapped into this process: what is read from it later would be its new content."""
    return str(path.resolve()) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("base", ["", "overwritten-sd.safetensors"])
def test_a_file_written_over_in_place_changes_nothing(
    comfy_inprocess: InProcessComfy, models: Path, checkpoint: dict[str, Tensor], base: str
) -> None:
    """As `cp`, `wget -O` and `rsync --inplace` do; a view of a file that became shorter would end the process."""
    weights = models / "tadsr" / "overwritten.safetensors"
    shutil.copy(models / "tadsr" / (ADAPTERS if base else MINI), weights)
    files = [weights]
    if base:
        files.append(models / "checkpoints" / base)
        save_file(checkpoint, files[1])
    pack = load_pack(comfy_inprocess, weights.name, base or NO_BASE)
    if sys.platform == "linux":
        assert not any(mapped(path) for path in files)
    before = pack.upscale(picture(16, 16), 300)
    for path in files:
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.write(os.urandom(size))
    assert_nearly(pack.upscale(picture(16, 16), 300), before)


def test_a_file_replaced_with_the_same_time_is_read_again(comfy_inprocess: InProcessComfy, models: Path) -> None:
    """As `cp -p` and restored archives do."""
    loader = comfy_inprocess.node("TADSRModelLoader")
    path, other = models / "tadsr" / "same-time.safetensors", models / "tadsr" / "same-time-2.safetensors"
    save(path, self_contained(1))
    save(other, self_contained(2))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    before, size = loader.fingerprint_inputs(path.name, NO_BASE), path.stat().st_size
    shutil.copy2(other, path)
    assert path.stat().st_mtime_ns == other.stat().st_mtime_ns and path.stat().st_size == size
    assert loader.fingerprint_inputs(path.name, NO_BASE) != before
