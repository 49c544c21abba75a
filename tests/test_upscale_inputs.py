"""Sizes, colours and the crop preview's place, in the nodes: what they give, what they refuse, what runs again."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from nearly import assert_nearly, differ
from random_weights import self_contained
from torch import Tensor

from host.comfy_in_process import InProcessComfy
from host.node_pack import Pack, load_pack, models_folder, picture
from tadsr.color import COLOR_MATCHES
from tadsr.weights import save

RANDOM = "random-inputs.safetensors"
TILES = {"tile": 96, "overlap": 32}
LEVEL = 1 / 255
pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def pack(comfy_inprocess: InProcessComfy) -> Pack:
    save(models_folder(comfy_inprocess) / "tadsr" / RANDOM, self_contained())
    return load_pack(comfy_inprocess, RANDOM)


@pytest.mark.parametrize("own", ["adain", "wavelet"])
def test_the_automatic_colour_match_is_the_weights_own(comfy_inprocess: InProcessComfy, own: str) -> None:
    weights = self_contained()
    name = f"random-{own}.safetensors"
    metadata = replace(weights.metadata, color_match=own)
    save(models_folder(comfy_inprocess) / "tadsr" / name, replace(weights, metadata=metadata))
    pack, image = load_pack(comfy_inprocess, name), picture(24, 31)
    automatic = pack.upscale(image)
    for match in COLOR_MATCHES:
        assert differ(automatic, pack.upscale(image, color_match=match)) == (match != own)


def calls_of(pack: Pack, run: Any) -> int:
    """Returns how often the UNet is called during a run."""
    seen = []
    handle = pack.model.model.diffusion_model.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        run()
    finally:
        handle.remove()
    return len(seen)


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        ({"longest_side": 120}, (80, 120)),
        ({"shortest_side": 50}, (50, 75)),
        ({"megapixels": 0.0096}, (80, 120)),
        ({"scale": 2.0, "longest_side": 91}, (61, 91)),
    ],
)
def test_sizes_in_the_inputs_proportions(pack: Pack, inputs: dict[str, Any], size: tuple[int, int]) -> None:
    image = picture(16, 24)
    assert pack.upscale(image, **inputs).shape == (1, *size, 3)
    assert pack.encode(image, **inputs)[1].shape == (1, *size, 3)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"longest_side": 100, "width": 90}, ("longest_side 100", "width 90", "one of them")),
        ({"longest_side": 100, "megapixels": 1.0}, ("longest_side 100", "megapixels 1", "one of them")),
        ({"shortest_side": 20000}, ("16384", "smaller")),
        ({"megapixels": float("nan")}, ("megapixels", "nan")),
        ({"color_match": "sepia"}, ("color_match is 'sepia'", "adain", "lab")),
        ({"color_strength": 1.5}, ("color_strength is 1.5", "0 (none) to 1 (all)")),
        ({"preview_size": 16, "preview_x": 1.2}, ("preview_x is 1.2", "0 (left, top)")),
        ({"preview_mask": torch.zeros(1, 8, 8)}, ("preview_mask is empty",)),
        ({"preview_mask": torch.full((1, 8, 8), torch.nan)}, ("preview_mask", "NaN")),
    ],
)
def test_what_is_refused(pack: Pack, inputs: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        pack.upscale(picture(8, 8), **inputs)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("tiles", [{}, TILES])
@pytest.mark.parametrize("color_match", ["adain", "lab", "wavelet"])
def test_the_strength_goes_from_the_plain_result_to_the_match(
    pack: Pack, color_match: str, tiles: dict[str, int]
) -> None:
    image = picture(40, 63)

    def upscale(strength: float) -> Tensor:
        return pack.upscale(image, color_match=color_match, color_strength=strength, **tiles)

    plain = pack.upscale(image, color_match="none", **tiles)
    assert (upscale(0.0) - plain).abs().max() < 1e-6
    middle, inside = plain.lerp(upscale(1.0), 0.5), (upscale(1.0) > 0) & (upscale(1.0) < 1) & (plain > 0) & (plain < 1)
    assert ((upscale(0.5) - middle).abs() * inside).max() < 1e-5
    assert differ(upscale(1.0), plain)


def test_only_colours_are_made_again_when_only_they_change(pack: Pack) -> None:
    image, other = picture(20, 30, batch=2), picture(20, 30, seed=1)
    assert calls_of(pack, lambda: pack.upscale_kept(image, 500)) == 2
    for method in COLOR_MATCHES:
        assert calls_of(pack, lambda m=method: pack.upscale_kept(image, 500, color_match=m, color_strength=0.5)) == 0
    fresh = load_pack(pack.comfy, RANDOM)
    for method in COLOR_MATCHES:
        again = fresh.upscale(image, 500, color_match=method)
        assert_nearly(pack.upscale_kept(image, 500, color_match=method), again, method)
    assert calls_of(pack, lambda: pack.upscale_kept(image, 501)) == 2, "another timestep is another run"
    assert calls_of(pack, lambda: pack.upscale_kept(image, 501, conditioning=pack.prompt)) == 2
    assert calls_of(pack, lambda: pack.upscale_kept(image.clone(), 501)) == 2, "another picture is another run"
    assert calls_of(pack, lambda: pack.upscale_kept(other, 501)) == 1
    assert calls_of(pack, lambda: pack.upscale_kept(image, 501)) == 2, "one run is kept"


def test_nothing_large_is_kept_and_nothing_after_the_model(
    comfy_inprocess: InProcessComfy, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = comfy_inprocess.module("kept")
    own = load_pack(comfy_inprocess, RANDOM)
    image = picture(20, 30, batch=2)
    own.upscale(image)
    assert len(kept._kept) == 1
    monkeypatch.setattr(kept, "MOST_BYTES", 100_000)
    own.upscale(image, 400)
    assert len(kept._kept) == 0, "two pictures of 115 kB are above the bound"
    own.upscale(image[:1], 400)
    assert len(kept._kept) == 0
    monkeypatch.undo()
    own.upscale(image)
    del own
    gc.collect()
    assert len(kept._kept) == 0, "the pictures must go with the model"


@pytest.mark.parametrize("tiles", [{}, TILES])
@pytest.mark.parametrize("color_match", ["adain", "lab", "wavelet", "none"])
@pytest.mark.parametrize(("x", "y", "left", "top"), [(0.0, 0.0, 0, 0), (1.0, 1.0, 204, 112), (0.3, 0.75, 52, 96)])
def test_the_preview_is_where_it_is_wanted(
    pack: Pack, x: float, y: float, left: int, top: int, color_match: str, tiles: dict[str, int]
) -> None:
    image = picture(40, 63)
    whole = pack.upscale(image, color_match=color_match, **tiles)
    preview = pack.upscale(image, color_match=color_match, preview_size=48, preview_x=x, preview_y=y, **tiles)
    assert preview.shape == (1, 48, 48, 3)
    error = (preview - whole[:, top : top + 48, left : left + 48]).abs().max() / LEVEL
    assert error < 1.0, f"the preview is {error:.2f} of 255 away from what the result will be"


def test_a_mask_says_what_the_preview_shows(pack: Pack) -> None:
    image = picture(40, 63)
    mask = torch.zeros(1, 40, 63)
    mask[:, 10:20, 30:50] = 1.0
    whole = pack.upscale(image)
    box = pack.upscale(image, preview_mask=mask)
    assert_nearly(box, whole[:, 40:80, 120:200])
    square = pack.upscale(image, preview_mask=mask, preview_size=32)
    assert_nearly(square, whole[:, 44:76, 144:176])
