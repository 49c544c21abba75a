"""GroupNorm and attention that know the whole picture: against it, and with weights that are cast."""

from __future__ import annotations

import pytest
import torch
from nearly import assert_nearly
from torch import Tensor, nn
from torch.nn import functional as F

from tadsr import shared_context
from tadsr.encoder import Attention, attend
from tadsr.shared_context import SharedContext, pooled_statistics

TOLERANCE = 2e-5  # float32


class CastingNorm(nn.GroupNorm):
    """Casts its weights to the input at each call, as ComfyUI's GroupNorm does."""

    def forward(self, input: Tensor) -> Tensor:
        return F.group_norm(input, self.num_groups, self.weight.to(input), self.bias.to(input), self.eps)


def network(norm: type[nn.GroupNorm] = nn.GroupNorm) -> nn.Sequential:
    """Works on each pixel alone but for its normalisations, so that tiles with shared ones equal the whole."""
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), norm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 1), norm(2, 8, eps=1e-3))
    generator = torch.Generator().manual_seed(0)
    for parameter in layers.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return layers.requires_grad_(False)


def attentive_network() -> nn.Sequential:
    """Works on each pixel alone but for one normalisation and an attention over all pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(3, 8, 1), Attention(8, 2, attend, nn), nn.Conv2d(8, 2, 1))
    return layers.requires_grad_(False)


class SelfAttention(nn.Module):
    """As those of UNets are called: (B, pixels, C), and a context in place of the picture's own pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return F.scaled_dot_product_attention(x, self.to_k(context), context)


class TransformerNetwork(nn.Module):
    """Works on each pixel alone but for one normalisation and a self-attention."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv_in, self.norm, self.attn1 = nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), SelfAttention()

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.conv_in(image))
        return x + self.attn1(x.movedim(1, -1).flatten(1, 2)).unflatten(1, x.shape[2:]).movedim(-1, 1)


def picture(*shape: int) -> Tensor:
    """Bright on the left and dark on the right, so that the halves have other statistics than the whole."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) + torch.linspace(3, -3, shape[-1])


def test_halves_with_the_statistics_of_the_whole_equal_it() -> None:
    layers, image = network(), picture(1, 3, 8, 16)
    with SharedContext.gather(layers) as context:
        whole = layers(image)
    assert torch.allclose(whole, layers(image), atol=TOLERANCE), "gathering must not change a single picture"
    halves = image.split(8, dim=-1)
    with context.applied():
        shared = torch.cat([layers(half) for half in halves], dim=-1)
    assert torch.allclose(shared, whole, atol=TOLERANCE)
    alone = torch.cat([layers(half) for half in halves], dim=-1)
    assert (alone - whole).abs().max() > 0.1, "without shared statistics the halves must differ, or this tests nothing"


def test_a_batch_is_one_picture_while_gathering() -> None:
    layers, image = network(), picture(1, 3, 8, 16)
    batch = torch.cat(image.split(4, dim=-1))
    with SharedContext.gather(layers) as context:
        results = layers(batch)
    assert torch.allclose(torch.cat(results.split(1), dim=-1), layers(image), atol=TOLERANCE)
    assert [len(mean) for mean, _ in context.statistics] == [4, 2]


@pytest.mark.parametrize("at_a_time", [shared_context.MOST_PRODUCTS, 1000], ids=["at once", "in parts"])
def test_halves_that_attend_to_the_whole_equal_it(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_context, "MOST_PRODUCTS", at_a_time)
    layers, image = attentive_network(), picture(1, 3, 8, 16)
    with SharedContext.gather(layers) as context:
        whole = layers(image)
    assert torch.allclose(whole, layers(image), atol=TOLERANCE), "gathering must not change a single picture"
    halves = torch.cat(image.split(8, dim=-1))
    with context.applied():
        shared = torch.cat(layers(halves).split(1), dim=-1)
    assert torch.allclose(shared, whole, atol=TOLERANCE)
    alone = torch.cat(layers(halves).split(1), dim=-1)
    assert (alone - whole).abs().max() > 0.1, "without the whole's keys the halves must differ, or this tests nothing"


def test_halves_whose_self_attention_looks_at_the_whole_equal_it() -> None:
    layers, image = TransformerNetwork().requires_grad_(False), picture(1, 3, 8, 16)
    with SharedContext.gather(layers) as context:
        whole = layers(image)
    assert torch.allclose(whole, layers(image), atol=TOLERANCE), "gathering must not change a single picture"
    halves = torch.cat(image.split(8, dim=-1))
    for _ in range(2):
        with context.applied():
            shared = torch.cat(layers(halves).split(1), dim=-1)
        assert torch.allclose(shared, whole, atol=TOLERANCE)
    alone = torch.cat(layers(halves).split(1), dim=-1)
    assert (alone - whole).abs().max() > 0.1, "without the whole's pixels the halves must differ, or this tests nothing"


def test_pooled_statistics_are_those_of_all_pixels() -> None:
    x = picture(3, 4, 5, 6)
    mean, variance = pooled_statistics(x, groups=2)
    pixels = x.movedim(0, 1).reshape(2, -1)
    assert torch.allclose(mean, pixels.mean(dim=1))
    assert torch.allclose(variance, pixels.var(dim=1, correction=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_cast_after_gathering(dtype: torch.dtype) -> None:
    layers, image = network(CastingNorm), picture(1, 3, 8, 16)
    with SharedContext.gather(layers) as context:
        whole = layers(image)
    layers.to(dtype)
    with context.applied():
        result = layers(image.to(dtype))
    assert result.dtype is dtype
    assert (result.float() - whole).abs().mean() < 0.02, "half precision, but the same statistics"


def test_large_half_precision_activations_keep_their_variance() -> None:
    """Their variance, 10^6, is no number that float16 can hold."""
    norm, x = nn.GroupNorm(1, 4).half().requires_grad_(False), 1000 * torch.randn(1, 4, 16, 16, dtype=torch.float16)
    with SharedContext.gather(norm):
        result = norm(x)
    assert result.float().std() == pytest.approx(1.0, abs=0.01)


def test_modules_are_as_before_whatever_happens() -> None:
    layers, image = network(), picture(1, 3, 8, 16)
    expected = layers(image)
    with pytest.raises(ZeroDivisionError), SharedContext.gather(layers):
        raise ZeroDivisionError
    with SharedContext.gather(layers) as context:
        layers(image * 5)
    with pytest.raises(ZeroDivisionError), context.applied():
        layers[1](layers[0](image))  # half a call, as when memory runs out
        raise ZeroDivisionError
    assert_nearly(layers(image), expected)
    attentive = attentive_network()
    with pytest.raises(ZeroDivisionError), SharedContext.gather(attentive):
        raise ZeroDivisionError
    assert attentive[1].optimized_attention is attend
    with context.applied():
        assert_nearly(layers(image), layers(image), "each call must start with the first statistics")


def test_a_function_of_two_calls_has_a_context_for_each() -> None:
    """As PiSA-SR's two dials, which run the network with other weights the second time."""
    layers, image, other = attentive_network(), picture(1, 3, 8, 16), picture(1, 3, 8, 16).flip(-1)
    expected = layers(image), layers(other)
    with SharedContext.gather(layers) as context:
        layers(image)
        layers(other)
    with context.applied():
        for _ in range(2):
            results = layers(image), layers(other)
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(results, expected, strict=True))


def test_half_a_call_or_none_is_an_error() -> None:
    layers, image = network(), picture(1, 3, 8, 16)
    with pytest.raises(RuntimeError, match="3 calls .* 2 of the network"), SharedContext.gather(layers):
        layers(image)
        layers[1](layers[0](image))
    with pytest.raises(RuntimeError, match="0 calls"), SharedContext.gather(layers):
        pass
    with SharedContext.gather(layers) as context:
        layers(image)
    with pytest.raises(RuntimeError, match="1 calls"), context.applied():
        layers[1](layers[0](image))
