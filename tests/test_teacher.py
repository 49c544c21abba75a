"""The teacher and its fake score: one UNet, adapters on or off. Numbers of the official code: test_losses.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import UNet2DConditionModel
from nearly import ROUNDING, assert_nearly
from safetensors.torch import load_file
from torch import Tensor

from tadsr.lora import Adapter
from training.networks.base import load_base
from training.networks.lora import cast_frozen, load_adapters, plain_state
from training.networks.teacher import Teacher

TOLERANCE = 1e-4  # relative error to the official implementation in float32
CONTEXT_WIDTH = 16
INPUT = torch.randn(2, 4, 8, 8), torch.tensor([20, 900]), torch.randn(2, 3, CONTEXT_WIDTH)


def relative_error(result: Tensor | None, expected: Tensor) -> float:
    """Returns the norm of the difference over the norm of what is expected."""
    assert result is not None, "there is no gradient"
    return ((result.reshape(expected.shape) - expected).norm() / expected.norm()).item()


def one_adapter(key: str) -> str:
    """Returns a key of the official code, which has three adapters, with our one adapter's name."""
    return re.sub(r"\.default_\w+\.", ".default.", key)


def reference_teacher(reference: Path, adapters: Literal["all", "middle"]) -> Teacher:
    """Returns the recorded teacher with the recorded fake score's adapters, of alpha 8."""
    teacher = Teacher(load_base(reference / "sd_original.safetensors").unet, adapters=adapters)
    state = {one_adapter(key): t for key, t in load_file(reference / "reg_lora_S64.safetensors").items()}
    modules = [key.partition(".lora_A.")[0] for key in state if ".lora_A." in key]
    sides = [f".lora_{side}.default.weight" for side in "AB"]
    found = {module: Adapter(state[module + sides[0]], state[module + sides[1]], 8.0) for module in modules}
    assert len(found) == 257
    chosen = {name: a for name, a in found.items() if adapters == "all" or name.startswith("mid_block.")}
    load_adapters(teacher.unet, chosen, "fake score")
    return teacher


def tiny_unet() -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(1, 1),  # type: ignore[arg-type]
            cross_attention_dim=CONTEXT_WIDTH,
            use_linear_projection=True,
        )


def trained_teacher() -> Teacher:
    """Returns a teacher whose adapters matter."""
    teacher = Teacher(tiny_unet())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in teacher.trainable().items():
        if ".lora_B." in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return teacher


def test_the_teacher_is_the_frozen_unet_and_the_fake_score_starts_as_it() -> None:
    unet, expected = tiny_unet(), tiny_unet()
    teacher = Teacher(unet)
    with torch.no_grad():
        before = expected(*INPUT, return_dict=False)[0]
        assert_nearly(teacher.teach(*INPUT), before)
        assert_nearly(teacher(*INPUT), before)
    assert all(torch.equal(t, expected.state_dict()[key]) for key, t in plain_state(unet).items())
    assert plain_state(unet).keys() == expected.state_dict().keys()


def test_teaching_leaves_the_fake_score_as_it_was() -> None:
    teacher = trained_teacher()
    names = set(teacher.trainable())
    fake = teacher(*INPUT)
    taught = teacher.teach(*INPUT)
    assert not taught.requires_grad and (fake - taught).abs().max() > 1e-3
    assert_nearly(teacher(*INPUT), fake)
    assert set(teacher.trainable()) == names
    fake.square().mean().backward()
    assert all(parameter.grad is not None for parameter in teacher.trainable().values())


def test_the_adapters_come_back_after_an_error() -> None:
    teacher = trained_teacher()
    fake = teacher(*INPUT)
    with pytest.raises(RuntimeError):
        teacher.teach(torch.zeros(1, 5, 8, 8), *INPUT[1:])
    assert_nearly(teacher(*INPUT), fake)


def test_only_adapters_are_trained_in_float32_and_one_unet_is_held() -> None:
    unet = tiny_unet()
    torch.nn.Module.to(unet, torch.bfloat16)
    weight = unet.conv_out.weight
    teacher = Teacher(unet, rank=2)
    trained = teacher.trainable()
    assert all(".lora_" in name and parameter.dtype == torch.float32 for name, parameter in trained.items())
    assert any(parameter is weight for parameter in teacher.parameters()), "the UNet was copied"
    assert not any("time_emb" in name for name in trained)
    assert {p.shape[0] for name, p in trained.items() if ".lora_A." in name} == {2}


def test_the_middle_block_alone_can_be_adapted() -> None:
    teacher = Teacher(tiny_unet(), adapters="middle")
    assert len(teacher.trainable()) == 2 * 16  # down and up of 16 modules, as the paper's code has them
    assert all(name.startswith("unet.mid_block.") for name in teacher.trainable())


def test_equal_seeds_give_equal_adapters_whatever_the_global_state() -> None:
    torch.manual_seed(5)
    first = Teacher(tiny_unet(), seed=3).trainable()
    torch.manual_seed(6)
    second, other = Teacher(tiny_unet(), seed=3).trainable(), Teacher(tiny_unet(), seed=4).trainable()
    assert all(torch.equal(p, second[name]) for name, p in first.items())
    assert any(not torch.equal(p, other[name]) for name, p in first.items())
    down = torch.cat([p.flatten() for name, p in first.items() if ".lora_A." in name])
    assert down.std().item() == pytest.approx(1 / 4, rel=0.02)  # Gaussian, deviation 1 / rank


@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_gradient(frozen: torch.dtype) -> None:
    gradients = []
    for checkpointing in (False, True):
        teacher = trained_teacher()
        cast_frozen(teacher, frozen)
        if checkpointing:
            teacher.enable_checkpointing()
        with torch.autocast("cpu", torch.bfloat16, enabled=frozen != torch.float32):
            teacher(*INPUT).float().square().mean().backward()
        gradients.append({name: p.grad for name, p in teacher.trainable().items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.isfinite().all() and gradient.dtype == torch.float32
        within = ROUNDING if frozen == torch.float32 else 2e-2  # bfloat16 has 8 bits
        assert_nearly(gradient, gradients[1][name], name, within=within)
