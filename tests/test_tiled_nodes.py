"""The nodes in tiles, in a real ComfyUI: equal to the whole, short memory, broken tiles, crop preview, interrupts."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nearly import assert_nearly, differ
from PIL import Image
from random_weights import self_contained
from torch import Tensor, nn

from benchmarks.seams import seam_ratio
from benchmarks.suite_pictures import DRAWING, GRADIENT, LEFT, NIGHT
from benchmarks.suite_pictures import picture as shown_picture
from host.comfy_in_process import InProcessComfy
from host.node_pack import NO_BASE, Pack, load_pack, models_folder, picture
from tadsr.tiling import UnusableTileError
from tadsr.weights import save

RANDOM, BUNDLED = "random-tiled.safetensors", "tadsr-mini.safetensors"
TILES = {"tile": 96, "overlap": 32}  # pixels of the result; the pictures below are larger
LEVEL = 1 / 255
pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def pack(comfy_inprocess: InProcessComfy) -> Pack:
    save(models_folder(comfy_inprocess) / "tadsr" / RANDOM, self_contained())
    return load_pack(comfy_inprocess, RANDOM)


@pytest.fixture(scope="module")
def mini(comfy_inprocess: InProcessComfy) -> Pack:
    return load_pack(comfy_inprocess, BUNDLED)


def networks_of(pack: Pack) -> dict[str, nn.Module]:
    """Returns the modules that tiles go through, by stage."""
    return {
        "encode": pack.encoder.model,
        "predict": pack.model.model.diffusion_model,
        "decode": pack.vae.first_stage_model.decoder,
    }


@contextmanager
def before_each_call(module: nn.Module, action: Callable[[Tensor], None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _, inputs: action(inputs[0]))
    try:
        yield
    finally:
        handle.remove()


def sizes_seen(module: nn.Module, run: Callable[[], object]) -> list[tuple[int, ...]]:
    """Returns the shapes that a network is given during a run."""
    seen: list[tuple[int, ...]] = []
    with before_each_call(module, lambda x: seen.append(tuple(x.shape))):
        run()
    return seen


def mean_levels(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean() / LEVEL)


def test_a_picture_that_fits_runs_each_network_once(pack: Pack) -> None:
    image = picture(24, 40)
    for module in networks_of(pack).values():
        assert len(sizes_seen(module, lambda: pack.upscale(image))) == 1, "no statistics pass where nothing is cut"
    assert_nearly(pack.upscale(image), pack.upscale(image, tile=160), "a tile as large as the picture is no tile")


@pytest.mark.parametrize("color_match", ["adain", "wavelet", "none"])
def test_tiles_look_as_the_whole(mini: Pack, color_match: str) -> None:
    image = picture(40, 56)
    whole = mini.upscale(image, color_match=color_match)
    tiled = mini.upscale(image, color_match=color_match, **TILES)
    assert mean_levels(tiled, whole) < 1.0
    assert (tiled - whole).abs().max() < 0.1


def test_each_node_alone_in_tiles_is_as_whole(mini: Pack) -> None:
    image = picture(40, 56)
    (whole, _), (tiled, _) = mini.encode(image), mini.encode(image, **TILES)
    assert (tiled["samples"] - whole["samples"]).abs().mean() < 0.02 * whole["samples"].std()
    predicted, predicted_tiled = mini.one_step(whole)["samples"], mini.one_step(whole, **TILES)["samples"]
    assert (predicted_tiled - predicted).abs().mean() < 0.03 * predicted.std()
    assert differ(predicted_tiled, predicted), "the latent was not cut"


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (17, 51), (8, 160)])
def test_any_shape_runs_in_tiles(pack: Pack, size: tuple[int, int]) -> None:
    result = pack.upscale(picture(*size), tile=64, overlap=24)
    assert result.shape == (1, 4 * size[0], 4 * size[1], 3)
    assert result.isfinite().all() and result.min() >= 0 and result.max() <= 1


def part_of_sample(repository: Path) -> Tensor:
    """Returns a part of the sample photograph, (1, 128, 192, 3)."""
    photograph = Image.open(repository / "assets" / "sample.jpg").convert("RGB").resize((384, 256))
    return torch.from_numpy(np.array(photograph)[40:168, 100:292]).float()[None] / 255


@pytest.mark.parametrize("kind", [LEFT, GRADIENT, DRAWING, NIGHT])
def test_tiles_that_are_asked_for_are_as_the_whole(mini: Pack, kind: str) -> None:
    image = shown_picture(kind, 80)
    whole = mini.upscale(image, color_match="none")
    change = (mini.upscale(image, color_match="none", tile=128) - whole).abs() / LEVEL
    assert change.mean() <= 0.3 and change.max() <= 4  # measured: up to 0.19 (night sky) and 2.7 (photograph)


@pytest.mark.parametrize("kind", [GRADIENT, DRAWING, NIGHT])
def test_where_the_unet_alone_runs_in_tiles_flat_areas_agree(
    mini: Pack, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoder and decoder run whole, so that it is the UNet's context that counts: from a quarter of the pixels."""
    image = shown_picture(kind, 80)
    whole = mini.upscale(image, color_match="none")
    monkeypatch.setattr(mini.comfy.module("stages"), "UNET_LARGEST_SIDE", 224)
    seen = sizes_seen(networks_of(mini)["predict"], lambda: mini.upscale(image, color_match="none"))
    assert len(seen) == 5, "a copy and four tiles"
    change = (mini.upscale(image, color_match="none") - whole) / LEVEL
    assert change.abs().mean() < 0.8  # measured: up to 0.56
    flat = change[:, 150:210, 150:210]  # of one colour in the drawing; tiles begin and end here, at 192
    assert max(flat.diff(dim=1).abs().max(), flat.diff(dim=2).abs().max()) < 2.0  # measured: up to 1.74


@pytest.mark.parametrize("shown", ["photograph", "gradient", DRAWING, NIGHT])
@pytest.mark.parametrize("small_thumbnail", [False, True])
def test_no_seam_shows(
    mini: Pack, repository: Path, shown: str, small_thumbnail: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture has edges of its own where tiles happen to meet: it is compared with the one made whole."""
    if shown == "photograph":
        image = part_of_sample(repository)
    elif shown in (DRAWING, NIGHT):
        image = shown_picture(shown, 192)[:, :128]
    else:
        image = torch.linspace(0.2, 0.8, 128)[:, None, None].expand(128, 192, 3)[None].clone()
    tiles = {"tile": 256, "overlap": 64}
    whole = mini.upscale(image).movedim(-1, 1)
    if small_thumbnail:
        cap_thumbnail(mini, monkeypatch, 384)
    result = mini.upscale(image, **tiles).movedim(-1, 1)
    plan = mini.comfy.module("plan")
    stages = mini.comfy.module("stages")
    for stage in (stages.encoder_stage(mini.encoder), stages.decoder_stage(mini.vae)):
        planned = plan.plan_stage(stage, 128, 192, **tiles)
        assert len(planned.tiles.tiles) > 4
        assert seam_ratio(result, planned.tiles, 4) <= 1.05 * seam_ratio(whole, planned.tiles, 4)


def test_a_batch_of_mixed_alpha_equals_its_pictures_one_by_one(pack: Pack) -> None:
    batch = picture(24, 40, channels=4, batch=3)
    batch[1, ..., 3], batch[2, ..., 3] = 0.0, 1.0
    together = pack.upscale(batch, **TILES)
    assert torch.equal(together[1, ..., 3], torch.zeros_like(together[1, ..., 3]))
    apart = torch.cat([pack.upscale(one.unsqueeze(0), **TILES) for one in batch])
    assert (together - apart).abs().max() < 1e-5


@pytest.mark.parametrize("small_thumbnail", [False, True])
@pytest.mark.parametrize("color_match", ["adain", "wavelet", "none"])
@pytest.mark.parametrize("side", [1, 40, 1000])
def test_the_crop_preview_is_the_centre_of_the_result(
    mini: Pack, color_match: str, side: int, small_thumbnail: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_thumbnail:
        cap_thumbnail(mini, monkeypatch)
    image = picture(40, 63, channels=4)
    result = mini.upscale(image, color_match=color_match, **TILES)
    preview = mini.upscale(image, color_match=color_match, preview_size=side, **TILES)
    height, width = min(side, 160), min(side, 252)
    top, left = (160 - height) // 2, (252 - width) // 2
    assert preview.shape == (1, height, width, 4)
    error = (preview - result[:, top : top + height, left : left + width]).abs().max() / LEVEL
    assert error < 1.0, f"the preview is {error:.2f} of 255 away from what the result will be"


def test_the_crop_preview_runs_only_the_tiles_that_it_needs(pack: Pack) -> None:
    image = picture(32, 160)
    for stage, module in networks_of(pack).items():
        full = sizes_seen(module, lambda: pack.upscale(image, **TILES))
        part = sizes_seen(module, lambda: pack.upscale(image, preview_size=32, **TILES))
        assert sum(shape[0] for shape in part) < sum(shape[0] for shape in full), stage


def test_the_crop_preview_of_a_whole_picture_is_cut_from_it(pack: Pack) -> None:
    image = picture(24, 40)
    assert_nearly(pack.upscale(image, preview_size=50), pack.upscale(image)[:, 23:73, 55:105])


def cap_thumbnail(mini: Pack, monkeypatch: pytest.MonkeyPatch, side: int = 96) -> None:
    """Makes the copies that statistics come from smaller than the test's pictures, as they are of large ones."""
    for name in ("VAE_LARGEST_SIDE", "UNET_LARGEST_SIDE"):
        monkeypatch.setattr(mini.comfy.module("stages"), name, side)


def test_tiles_look_as_the_whole_with_the_statistics_of_a_small_copy(
    mini: Pack, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = part_of_sample(repository)
    whole = mini.upscale(image)
    cap_thumbnail(mini, monkeypatch, 384)
    assert mean_levels(mini.upscale(image), whole) < 2.0  # measured: 1.3


def test_a_prompt_for_a_part_of_the_picture_stays_in_its_place(mini: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The area lies outside the small copy, which must not go through the UNet with it."""
    image = picture(40, 63)
    cap_thumbnail(mini, monkeypatch)
    prompt = mini.prompt[0][0]
    areas = [[prompt, {"area": (16, 16, 20, 44), "strength": 1.0, "set_area_to_bounds": False}], [prompt, {}]]
    assert mean_levels(mini.upscale(image, conditioning=areas), mini.upscale(image)) < 4.0


@contextmanager
def short_memory(module: nn.Module, limit: int) -> Iterator[list[tuple[int, ...]]]:
    """Makes a network run out of memory above so many pixels of its input; gives the shapes that did fit."""
    import comfy.model_management as mm

    fitted: list[tuple[int, ...]] = []

    def check(x: Tensor) -> None:
        if x.shape[0] * x.shape[2] * x.shape[3] > limit:
            raise mm.OOM_EXCEPTION("a test's limit")
        fitted.append(tuple(x.shape))

    with before_each_call(module, check):
        yield fitted


@pytest.mark.parametrize("stage", ["encode", "predict", "decode"])
def test_short_memory_gives_smaller_tiles_and_nearly_the_same_picture(
    mini: Pack, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    image = picture(40, 56)
    whole = mini.upscale(image)
    limit = 25 * 25 * (16 if stage == "encode" else 1)  # of 40 x 56 latent pixels, or of the pixels that they stand for
    with caplog.at_level(logging.WARNING), short_memory(networks_of(mini)[stage], limit) as fitted:
        result = mini.upscale(image, overlap=16)
    assert mean_levels(result, whole) < 4.0  # measured: 2.6 for the decoder, whose statistics come from a small latent
    assert len(fitted) > 4
    assert f"out of memory; {stage} goes on in tiles of at most" in caplog.text


def test_later_pictures_start_with_the_tiles_that_fitted(pack: Pack, caplog: pytest.LogCaptureFixture) -> None:
    batch = picture(32, 32, batch=3)
    with caplog.at_level(logging.WARNING), short_memory(networks_of(pack)["decode"], 20 * 20):
        pack.upscale(batch, overlap=16)
    assert caplog.text.count("out of memory") == 1, "each picture ran into the limit again"


def test_memory_for_no_tile_at_all_is_a_clear_error(pack: Pack) -> None:
    with short_memory(networks_of(pack)["decode"], 10), pytest.raises(MemoryError) as caught:
        pack.upscale(picture(32, 32))
    message = str(caught.value)
    assert all(word in message for word in ("to decode", "64x64 pixels", "needs about", "MB free")), message
    assert pack.upscale(picture(8, 8)).shape == (1, 32, 32, 3), "the next run must work"


def test_tiles_at_a_time_fall_before_their_size_does(mini: Pack, caplog: pytest.LogCaptureFixture) -> None:
    module = mini.comfy.module
    latent = mini.encode(picture(32, 64))[0]["samples"]
    plan = module("plan").plan_stage(module("stages").decoder_stage(mini.vae), 32, 64, tile=64, overlap=16)

    def decoded(at_once: int) -> Tensor:
        planned = replace(plan, batch=at_once, thumbnail_area=2 * 16 * 16)
        data, run = module("pictures").StageData(latent), module("run")
        return run.StageRun(planned, run.tiler_for(planned), data)(lambda *_: None).full

    one_by_one = decoded(1)
    with caplog.at_level(logging.WARNING), short_memory(networks_of(mini)["decode"], 2 * 20 * 20):
        result = decoded(8)
    assert "goes on with fewer tiles at a time" in caplog.text and "in tiles of" not in caplog.text
    assert torch.allclose(result, one_by_one, atol=1e-4)


@pytest.mark.parametrize("entries", [{}, {"mask": torch.ones(1, 32, 64)}])
def test_a_conditioning_that_is_no_plain_prompt_keeps_the_network_whole(pack: Pack, entries: dict[str, Any]) -> None:
    prompts = [[pack.prompt[0][0], entries]] + ([] if entries else pack.prompt)
    module = networks_of(pack)["predict"]
    seen = sizes_seen(module, lambda: pack.upscale(picture(32, 64), conditioning=prompts, **TILES))
    assert {shape[2:] for shape in seen} == {(32, 64)}


@pytest.fixture(scope="module")
def half(comfy_inprocess: InProcessComfy, pack: Pack) -> Pack:
    """The random networks in bfloat16."""
    loaded = comfy_inprocess.node("TADSRModelLoader").execute(RANDOM, NO_BASE, "bf16")
    return Pack(comfy_inprocess, *loaded.result)


@pytest.mark.parametrize(
    ("stage", "wrong"),
    [
        *((stage, float("nan")) for stage in ("encode", "predict", "decode")),
        *(("decode", float("inf")), ("decode", 0.0)),
    ],
)
def test_a_broken_tile_is_made_again_in_float32(
    half: Pack, stage: str, wrong: float, caplog: pytest.LogCaptureFixture
) -> None:
    module = networks_of(half)[stage]
    image = picture(24, 40)
    good = half.upscale(image, **TILES)
    calls: list[torch.dtype] = []

    def break_second(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        calls.append(inputs[0].dtype)
        if len(calls) != 2:  # the first gathers statistics
            return output
        return torch.zeros_like(output) if wrong == 0 else output.index_fill(1, torch.tensor(1), wrong)

    handle = module.register_forward_hook(break_second)
    try:
        with caplog.at_level(logging.WARNING):
            result = half.upscale(image, **TILES)
    finally:
        handle.remove()
    assert calls[1] == torch.bfloat16 and torch.float32 in calls[2:]
    assert "1 tiles came out unusable and were made again in float32" in caplog.text
    assert result.isfinite().all() and mean_levels(result, good) < 2.0


@contextmanager
def all_results(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("name", "words", "wrong"),
    [("pack", "values: ", float("-inf")), ("half", "values in full precision too: ", float("nan"))],
)
def test_a_tile_that_float32_does_not_save_is_an_error(
    name: str, words: str, wrong: float, request: pytest.FixtureRequest
) -> None:
    pack: Pack = request.getfixturevalue(name)
    with (
        all_results(networks_of(pack)["decode"], lambda output: torch.full_like(output, wrong)),
        pytest.raises(Exception, match=f"NaN or infinite {words}") as caught,
    ):
        pack.upscale(picture(8, 8))
    assert type(caught.value).__name__ == UnusableTileError.__name__


def test_a_tile_that_stays_flat_is_kept(half: Pack, caplog: pytest.LogCaptureFixture) -> None:
    """A sky may be clamped to white in full precision too."""
    with (
        caplog.at_level(logging.WARNING),
        all_results(networks_of(half)["decode"], torch.ones_like),
    ):
        result = half.upscale(picture(8, 8), color_match="none")
    assert torch.equal(result, torch.ones_like(result))
    assert "1 tiles came out unusable and were made again in float32" in caplog.text


def test_another_error_of_a_network_is_not_taken_for_short_memory(pack: Pack) -> None:
    def broken(_: Tensor) -> None:
        raise RuntimeError("shapes do not fit")

    with (
        before_each_call(networks_of(pack)["predict"], broken),
        pytest.raises(RuntimeError, match="shapes do not fit"),
    ):
        pack.upscale(picture(48, 64), **TILES)


def test_an_interrupt_ends_the_run_within_one_tile(pack: Pack) -> None:
    import comfy.model_management as mm

    seen: list[Tensor] = []

    def interrupt(x: Tensor) -> None:
        seen.append(x)
        if len(seen) == 2:
            mm.interrupt_current_processing(True)

    try:
        with before_each_call(networks_of(pack)["encode"], interrupt), pytest.raises(mm.InterruptProcessingException):
            pack.upscale(picture(48, 64), tile=64, overlap=16)
    finally:
        mm.interrupt_current_processing(False)
    assert len(seen) == 2, f"{len(seen) - 2} more tiles were run"


def test_progress_rises_to_its_end_and_shows_the_picture(pack: Pack) -> None:
    import comfy.utils

    events: list[tuple[int, int, Any]] = []
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview=None, **_: events.append((value, total, preview))
    )
    try:
        pack.upscale(picture(32, 64, batch=2), **TILES)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    values = [value for value, _, _ in events]
    assert values == sorted(values) and values[-1] == events[-1][1]
    previews = [preview for _, _, preview in events if preview]
    assert previews, "no preview was shown"
    kind, image, _ = previews[0]
    assert kind == "JPEG" and image.size == (256, 128)


@pytest.mark.parametrize(
    ("flags", "method", "shown"),
    [
        ([], "NoPreviews", True),  # nobody has chosen
        (["--preview-method", "none"], "NoPreviews", False),
        (["--preview-method=none"], "NoPreviews", False),
        (["--preview-method", "auto"], "Auto", True),
    ],
)
def test_live_previews_follow_the_flag(
    pack: Pack, monkeypatch: pytest.MonkeyPatch, flags: list[str], method: str, shown: bool
) -> None:
    import comfy.utils
    import latent_preview

    monkeypatch.setattr(sys, "argv", ["main.py", *flags])
    monkeypatch.setattr(latent_preview, "default_preview_method", latent_preview.LatentPreviewMethod[method])
    previews: list[Any] = []
    comfy.utils.set_progress_bar_global_hook(lambda _, __, preview=None, **___: previews.append(preview))
    try:
        pack.upscale(picture(16, 16))
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert previews and any(previews) is shown


def test_fifty_runs_leave_nothing_behind(pack: Pack) -> None:
    image = picture(16, 24)

    def tensors_alive() -> int:
        gc.collect()
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    for _ in range(3):
        pack.upscale(image, tile=64, overlap=16)
    before = tensors_alive()
    for run in range(50):
        pack.upscale(image, tile=64 if run % 2 else 0, overlap=16)
    assert tensors_alive() <= before, "tensors of finished runs are still referenced"
