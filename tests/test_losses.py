from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.losses import blur, blur_sigma, blur_size, blurred_mse


def test_kernel_grows_with_the_timestep() -> None:
    assert [blur_size(t) for t in (1, 199, 200, 500, 999)] == [5, 5, 9, 13, 21]
    assert blur_sigma(999) == pytest.approx(5.995)


def test_blur_keeps_a_constant_and_loses_to_identity_nowhere() -> None:
    image = torch.full((2, 3, 24, 30), 0.25)
    assert torch.allclose(blur(image, torch.tensor([1, 999])), image, atol=1e-6)


def test_blurred_mse_matches_the_official_numbers(shared_reference: Path) -> None:
    reference = load_file(shared_reference / "losses_S64.safetensors")
    result = reference["blur.pred"].clone().requires_grad_()
    loss = blurred_mse(result, reference["blur.tgt"], reference["blur.timesteps"]).mean()
    loss.backward()
    assert loss.item() == pytest.approx(reference["blur.loss"].item(), rel=1e-5)
    assert result.grad is not None
    assert torch.allclose(result.grad, reference["blur.grad_pred"], atol=1e-8, rtol=1e-4)
    blurred = blur(reference["blur.pred"], reference["blur.timesteps"])
    assert torch.allclose(blurred, reference["blur.pred_blur"], atol=1e-6)
