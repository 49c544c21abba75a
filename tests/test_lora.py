"""LoRA: the merge formula, strict grouping of tensors, and errors for another network."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tadsr.errors import WeightsError
from tadsr.lora import Adapter, adapters, merge, merged, same_shape


def test_linear_merge_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    down, up = torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0], [-1.0]])
    expected = torch.tensor([[3.0, 22.0], [1.0, -16.0]])  # W + 2 * [[1, 10], [-1, -10]]
    assert torch.equal(merge(weight, down, up, 2.0), expected)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_merged_convolution_equals_the_two_small_convolutions(kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    weight, down, up = torch.randn(6, 5, kernel, kernel), torch.randn(4, 5, kernel, kernel), torch.randn(6, 4, 1, 1)
    image = torch.randn(2, 5, 9, 7)
    expected = F.conv2d(image, weight, stride=stride) + 2 * F.conv2d(F.conv2d(image, down, stride=stride), up)
    result = F.conv2d(image, merge(weight, down, up, 2.0), stride=stride)
    assert (result - expected).abs().max() < 1e-4


def test_linear_adapter_fits_a_1x1_convolution() -> None:
    weight = torch.randn(6, 5, 1, 1)
    down, up = torch.randn(4, 5), torch.randn(6, 4)
    result = merged(
        {"q.weight": weight, "q.bias": torch.ones(6)},
        Adapter(down, up, 8.0).tensors("q"),
    )
    assert torch.allclose(result["q.weight"].flatten(1), weight.flatten(1) + 2 * up @ down)
    assert torch.equal(result["q.bias"], torch.ones(6))


def test_merge_keeps_the_dtype_but_computes_in_float32() -> None:
    weight = torch.full((1, 1), 1.0, dtype=torch.float16)
    down, up = torch.full((1, 1), 200.0), torch.full((1, 1), 2000.0)  # their product overflows float16
    result = merge(weight, down, up, 1e-5)
    assert result.dtype == torch.float16 and abs(result.item() - 5) < 1e-2


def test_scale_is_alpha_over_rank() -> None:
    assert Adapter(torch.zeros(4, 3), torch.zeros(3, 4), 8.0).scale == 2.0
    assert Adapter(torch.zeros(16, 3), torch.zeros(3, 16), 8.0).scale == 0.5


def test_merging_leaves_the_base_as_it_was() -> None:
    base = {"m.weight": torch.zeros(3, 3)}
    merged(base, Adapter(torch.ones(2, 3), torch.ones(3, 2), 2.0).tensors("m"))
    assert torch.equal(base["m.weight"], torch.zeros(3, 3))


@pytest.mark.parametrize("lost", [".lora_up.weight", ".alpha", ".lora_down.weight"])
def test_a_missing_tensor_is_named(lost: str) -> None:
    lora = Adapter(torch.ones(2, 3), torch.ones(3, 2), 2.0).tensors("block.conv1")
    del lora["block.conv1" + lost]
    with pytest.raises(WeightsError, match=r"block\.conv1"):
        adapters(lora)


def test_ranks_that_disagree_are_an_error() -> None:
    with pytest.raises(WeightsError, match="rank"):
        adapters(Adapter(torch.ones(2, 3), torch.ones(3, 4), 2.0).tensors("m"))


@pytest.mark.parametrize("base", [{"m.weight": torch.zeros(3, 5)}, {"other.weight": torch.zeros(3, 3)}])
def test_another_network_is_an_error_that_names_the_module(base: dict[str, torch.Tensor]) -> None:
    with pytest.raises(WeightsError, match=r"another base model: m needs .*\(3, 3\)"):
        merged(base, Adapter(torch.ones(2, 3), torch.ones(3, 2), 2.0).tensors("m"))


def test_shapes_compare_with_linear_as_1x1_convolution() -> None:
    assert same_shape(torch.Size((4, 3)), torch.Size((4, 3, 1, 1)))
    assert not same_shape(torch.Size((4, 3)), torch.Size((4, 3, 3, 3)))
