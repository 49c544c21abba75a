"""Parameters and AdamW's state under names: exact round trips, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_learner import Learner, equal
from torch import nn

from training.run.checkpoint import Checkpoint, CheckpointError, Checkpoints, load_optimizer, load_parameters


def test_an_optimizer_that_was_saved_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, half = Learner(), Learner(folder=tmp_path)
    for number in range(20):
        whole.step(number)
    half.train(9)
    resumed = Learner(folder=tmp_path)
    resumed.train(20)
    assert equal(resumed.tensors()[0], whole.tensors()[0])
    assert resumed.tensors()[1] == {"steps": {"weight": 20, "bias": 20}}
    forgetful = Learner(folder=tmp_path / "other")  # the parameters alone are not enough
    load_parameters(forgetful.names, half.tensors()[0], "model.")
    for number in range(9, 20):
        forgetful.step(number)
    assert not equal(forgetful.tensors()[0], whole.tensors()[0])


def test_the_learning_rate_is_the_config_s_not_the_checkpoint_s() -> None:
    saved, resumed = Learner(), Learner()
    saved.step(0)
    resumed.optimizer.param_groups[0]["lr"] = 0.5
    resumed.load(*saved.tensors())
    assert resumed.optimizer.param_groups[0]["lr"] == 0.5
    before = saved.tensors()[0]["optimizer.weight.exp_avg"].clone()
    resumed.step(1)
    assert torch.equal(saved.tensors()[0]["optimizer.weight.exp_avg"], before), "the two share memory"


def lora(rank: int, **more: nn.Parameter) -> dict[str, nn.Parameter]:
    shapes = {f"unet.to_{part}.lora_{side}.default.weight": side for part in "qk" for side in "AB"}
    return {n: nn.Parameter(torch.ones((rank, 6) if s == "A" else (6, rank))) for n, s in shapes.items()} | more


def test_another_rank_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    saved = lora(8)
    path = Checkpoints(tmp_path, 1).save(1, {f"student.{name}": p for name, p in saved.items()}, {})
    model = lora(4)
    for parameter in model.values():
        nn.init.zeros_(parameter)
    checkpoint = Checkpoint(1, path)
    with pytest.raises(CheckpointError) as error:
        checkpoint.copy_into(model, checkpoint.tensors(), "student.")
    message = str(error.value)
    assert message.startswith(f"{path}: the checkpoint does not fit the model: student.unet.to_q.lora_A.default.weight")
    assert (
        "lora_A.default.weight is (8, 6) in the checkpoint, (4, 6) in the model: rank 8 in the checkpoint, 4 now"
        in message
    )
    assert (
        "lora_B.default.weight is (6, 8) in the checkpoint, (6, 4) in the model: rank 8 in the checkpoint, 4 now"
        in message
    )
    assert "; 1 more differ. Was the config changed?" in message
    assert all(parameter.abs().sum() == 0 for parameter in model.values())


def test_missing_unexpected_and_misshapen_parameters_are_named() -> None:
    zeros = nn.Parameter(torch.zeros(2))
    saved = {f"s.{name}": p.detach() for name, p in lora(4, old=zeros, bias=zeros, kind=zeros).items()}
    model = lora(4, new=zeros, bias=nn.Parameter(torch.zeros(3)), kind=nn.Parameter(torch.zeros(2).half()))
    with pytest.raises(CheckpointError) as error:
        load_parameters(model, saved | {"other.x": zeros}, "s.")
    assert str(error.value) == (
        "the checkpoint does not fit the model: the model has s.new, which the checkpoint has not; the checkpoint has "
        "s.old, which the model has not; s.bias is (2,) in the checkpoint, (3,) in the model; s.kind is torch.float32 "
        "in the checkpoint, torch.float16 in the model. Was the config changed?"
    )


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    saved, other = Learner(24), Learner(16)
    saved.step(0)
    tensors, state = saved.tensors()
    with pytest.raises(CheckpointError, match=r"optimizer.weight.exp_avg is \(24, 24\) in the .*, \(16, 16\) in the"):
        load_optimizer(other.optimizer, other.names, tensors, state, "optimizer.")
    with pytest.raises(CheckpointError, match="optimizer has bias, which the model does not train now"):
        load_optimizer(other.optimizer, {"weight": other.names["weight"]}, tensors, state, "optimizer.")
    del tensors["optimizer.bias.exp_avg_sq"]
    with pytest.raises(CheckpointError, match="the model has optimizer.bias.exp_avg_sq, which the checkpoint has not"):
        load_optimizer(saved.optimizer, saved.names, tensors, state, "optimizer.")
    assert not other.optimizer.state
