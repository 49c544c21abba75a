"""The discriminator on LPIPS's features: its losses, and whom its gradients reach."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nearly import assert_nearly

from training.config.train_config import SMALLEST_DISCRIMINATED
from training.metrics.lpips import LPIPS
from training.networks.discriminator import FEATURES, Discriminator, chosen, discriminator_loss, generator_loss


def test_losses_of_known_logits() -> None:
    ours = [torch.tensor([-2.0, 0.5]).view(2, 1, 1, 1), torch.tensor([[0.0, 1.0], [-3.0, -1.0]]).view(2, 1, 1, 2)]
    real = [torch.tensor([2.0, 0.0]).view(2, 1, 1, 1), torch.tensor([[1.0, 0.5], [4.0, 2.0]]).view(2, 1, 1, 2)]
    # The layers' means are -2 and 0.5, 0.5 and -2.
    torch.testing.assert_close(generator_loss(ours), torch.tensor([0.75, 0.75]))
    # First sample: 0 + 0 in the first layer; (0 + 1 + 0.5 + 2) / 2 in the second. Second: 1 + 1.5; 0.
    torch.testing.assert_close(discriminator_loss(real, ours), torch.tensor([0.875, 1.25]))


def test_the_smallest_picture_has_a_logit_in_every_layer(lpips_network: Callable[[str], LPIPS]) -> None:
    side = SMALLEST_DISCRIMINATED
    features = chosen(lpips_network("vgg").features(torch.zeros(1, 3, side, side)))
    assert [logits.shape[2] for logits in Discriminator()(features)] == [10, 4, 1]
    features = chosen(lpips_network("vgg").features(torch.zeros(1, 3, side - 1, side - 1)))
    with pytest.raises(RuntimeError):
        Discriminator()(features)


def test_the_discriminator_learns_to_tell_photographs_from_blurred_ones(lpips_network: Callable[[str], LPIPS]) -> None:
    torch.manual_seed(0)
    perceptual, discriminator = lpips_network("vgg"), Discriminator()
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-3)
    sharp = torch.rand(4, 3, 32, 32) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(sharp, 3, 1, 1)
    real, fake = (chosen(perceptual.features(picture)) for picture in (sharp, blurred))
    losses = []
    for _ in range(20):
        loss = discriminator_loss(discriminator(real), discriminator(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    assert (generator_loss(discriminator(real)) < generator_loss(discriminator(fake))).all()


def test_what_it_says_to_the_student_does_not_train_it() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator()
    features = [torch.randn(2, channels, 8, 8, requires_grad=True) for channels in FEATURES.values()]
    generator_loss(discriminator.frozen_logits(features)).sum().backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    gradient = features[0].grad
    assert gradient is not None and gradient.abs().max() > 0
    for logits, frozen in zip(discriminator(features), discriminator.frozen_logits(features), strict=True):
        assert_nearly(logits, frozen)
