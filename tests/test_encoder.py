from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tadsr.encoder import EncoderConfig, TimeAwareBlock, TimeAwareEncoder, mode, sample, timestep_features

TINY = EncoderConfig(channels=(32, 32, 64), layers_per_level=1, mid_attention=False, norm_groups=4)
SD_SHAPED = EncoderConfig(channels=(32, 64, 64, 64))


def tiny_encoder(config: EncoderConfig = TINY) -> TimeAwareEncoder:
    torch.manual_seed(0)
    return TimeAwareEncoder(config).eval()


def test_timestep_features_put_the_cosine_first() -> None:
    features = timestep_features(torch.tensor([0, 3]), 8)
    assert features[0].tolist() == [1.0] * 4 + [0.0] * 4
    expected = torch.cos(torch.tensor(3.0) * torch.tensor([1.0, 0.1, 0.01, 0.001]))
    assert torch.allclose(features[1, :4], expected, atol=1e-6)


@pytest.mark.parametrize("config", [TINY, SD_SHAPED])
def test_config_is_read_from_shapes(config: EncoderConfig) -> None:
    state = tiny_encoder(config).state_dict()
    assert EncoderConfig.from_state_dict(state, config.norm_groups) == config


def test_full_size_has_the_paper_s_time_layers() -> None:
    encoder = TimeAwareEncoder(EncoderConfig(), device="meta")
    time = sum(p.numel() for name, p in encoder.named_parameters() if "time_" in name)
    assert time == 2_072_576  # as the released weights have them
    assert encoder.downscale == 8


@pytest.mark.parametrize(("height", "width"), [(8, 8), (24, 40), (64, 12)])
def test_moments_have_the_latent_s_size(height: int, width: int) -> None:
    encoder = tiny_encoder()
    moments = encoder(torch.zeros(2, 3, height, width), torch.tensor([1, 999]))
    assert moments.shape == (2, 8, height // encoder.downscale, width // encoder.downscale)


@torch.inference_mode()
def test_a_batch_of_timesteps_equals_single_calls() -> None:
    encoder = tiny_encoder()
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    together = encoder(image, torch.tensor([100, 900]))
    alone = [encoder(image[i : i + 1], torch.tensor([t])) for i, t in enumerate((100, 900))]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert not torch.allclose(together[:1], encoder(image[:1], torch.tensor([900])), atol=1e-3)


def test_sampling_by_hand() -> None:
    moments = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), math.log(4.0))], 1)
    assert torch.equal(mode(moments), torch.full((1, 4, 2, 2), 3.0))
    assert torch.allclose(sample(moments, torch.ones(1, 4, 2, 2)), torch.full((1, 4, 2, 2), 5.0))


def test_memory_estimate_grows_with_the_pixels() -> None:
    encoder = tiny_encoder()
    small, large = encoder.memory_used((1, 3, 64, 64), 4), encoder.memory_used((2, 3, 128, 64), 4)
    assert large == 4 * small > 0


def test_blocks_computed_in_place_have_the_formula_s_result_and_gradient() -> None:
    torch.manual_seed(1)
    block = TimeAwareBlock(32, 64, 4, nn).double()
    x = torch.randn(2, 32, 6, 5, dtype=torch.float64, requires_grad=True)
    embedding = torch.randn(2, 256, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()

    scale, shift = block.time_emb_proj(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
    h = block.norm2(block.conv1(F.silu(block.norm1(x)))) * (1 + scale) + shift
    assert block.nin_shortcut is not None
    expected = block.conv2(F.silu(h)) + block.nin_shortcut(x)

    result = block(x, embedding)
    inputs = [x, embedding, *block.parameters()]
    assert torch.allclose(result, expected) and torch.equal(x, before)
    pairs = zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (result, expected)), strict=True)
    assert all(torch.allclose(ours, formula) for ours, formula in pairs)


def test_attention_can_be_given() -> None:
    """As ComfyUI's is; it gets and returns (B, C, H, W)."""
    shapes = []

    def other(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shapes.append(q.shape)
        weights = (q.flatten(2).transpose(1, 2) @ k.flatten(2) / q.shape[1] ** 0.5).softmax(dim=-1)
        return (weights @ v.flatten(2).transpose(1, 2)).transpose(1, 2).reshape_as(q)

    config = EncoderConfig(channels=(32, 64), layers_per_level=1, mid_attention=True)
    torch.manual_seed(0)
    usual = TimeAwareEncoder(config)
    given = TimeAwareEncoder(config, attention=other)
    given.load_state_dict(usual.state_dict())
    image, timestep = torch.rand(2, 3, 16, 24), torch.tensor([300])
    with torch.no_grad():
        assert torch.allclose(given(image, timestep), usual(image, timestep), atol=1e-5)
    assert shapes == [(2, 64, 8, 12)]
