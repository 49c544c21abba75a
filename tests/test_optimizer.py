"""Updates of one trained network: sound ones, and gradients that are NaN."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from training_runs import accelerator

from training.config.train_config import PRESETS, load_config
from training.run.optimizer import TrainedNetwork, trained_network


class TwoLayers(nn.Module):
    """A layer under a name of the UNet's, one of the encoder's time layers, and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.ParameterDict({"lora": torch.ones(2)})
        self.encoder = nn.ModuleDict({"time_embedding": nn.ParameterDict({"bias": torch.ones(2)})})
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


@pytest.fixture
def network() -> TrainedNetwork[TwoLayers]:
    paths = {name: Path(name) for name in ("data", "base", "output")}
    config = load_config(PRESETS / "smoke.yaml", ["learning_rate=0.1", "weight_decay=0"], **paths)
    return trained_network("student", TwoLayers(), config.learning_rate, config, accelerator(config))


def give_gradients(network: TrainedNetwork[TwoLayers], value: float) -> None:
    for parameter in network.parameters.values():
        parameter.grad = torch.full_like(parameter, value)


def test_time_layers_have_a_learning_rate_of_their_own(network: TrainedNetwork[TwoLayers]) -> None:
    give_gradients(network, 5.0)
    assert network.update(True, 1.0)
    adapter, time = network.parameters.values()
    assert adapter.tolist() == pytest.approx([0.9, 0.9])  # Adam's first step is the learning rate
    assert time.tolist() == pytest.approx([1 - 1e-6] * 2, abs=1e-7)
    assert adapter.grad is None and network.module.frozen.tolist() == [1, 1]


def test_gradients_are_clipped_to_the_norm_of_all_together(network: TrainedNetwork[TwoLayers]) -> None:
    """Adam forgets the size of one gradient, but not how two steps' sizes differ: its mean is one of both."""
    give_gradients(network, 0.25)  # of norm 0.5, which stays
    network.update(True, 1.0)
    give_gradients(network, -100.0)  # of norm 200, which becomes 1: each -0.5
    network.update(True, 1.0)
    adapter = network.parameters["unet.lora"]
    mean = (0.9 * 0.1 * 0.25 + 0.1 * -0.5) / (1 - 0.9**2)
    square = (0.999 * 0.001 * 0.25**2 + 0.001 * 0.5**2) / (1 - 0.999**2)
    assert adapter.tolist() == pytest.approx([0.9 - 0.1 * mean / square**0.5] * 2, rel=1e-5)


@pytest.mark.parametrize(("losses_are_finite", "gradient"), [(False, 1.0), (True, float("nan")), (True, float("inf"))])
def test_a_step_that_is_not_finite_changes_nothing(
    network: TrainedNetwork[TwoLayers], losses_are_finite: bool, gradient: float
) -> None:
    give_gradients(network, gradient)
    assert not network.update(losses_are_finite, 1.0)
    assert all(parameter.tolist() == [1, 1] and parameter.grad is None for parameter in network.parameters.values())
    assert not network.optimizer.state


def in_half_precision(network: TrainedNetwork[TwoLayers]) -> TrainedNetwork[TwoLayers]:
    return replace(network, scaler=torch.amp.GradScaler("cpu", init_scale=4.0))


def test_a_loss_that_is_no_number_is_left_out_in_half_precision_too(network: TrainedNetwork[TwoLayers]) -> None:
    half = in_half_precision(network)
    half.scaler.scale(torch.ones(1))  # makes the scale
    give_gradients(half, 1.0)
    assert not half.update(False, 1.0) and all(p.tolist() == [1, 1] for p in half.parameters.values())
    give_gradients(half, 1.0)
    assert half.update(True, 1.0), "the scaler is not ready for the next step"


def test_gradients_that_overflow_in_half_precision_only_lower_the_scale(network: TrainedNetwork[TwoLayers]) -> None:
    half = in_half_precision(network)
    seen = []
    for _ in range(3):
        half.scaler.scale(torch.ones(1))  # makes the scale
        give_gradients(half, float("inf"))
        seen.append((half.update(True, 1.0), half.scaler.get_scale()))
    assert seen == [(True, 2.0), (True, 1.0), (False, 0.5)], "below a scale of 1 overflow is a fault"
    assert all(parameter.tolist() == [1, 1] for parameter in half.parameters.values())
