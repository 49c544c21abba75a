"""The estimate is the run's own plan, time and memory, told before it runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from random_weights import self_contained
from torch import Tensor, nn

from host.comfy_in_process import InProcessComfy, PromptError
from host.node_pack import Pack, load_pack, models_folder, node, picture
from tadsr.weights import save

MINI = "estimate-mini.safetensors"
SIZE = (320, 256)  # (height, width) of the result
TILE = 128
NO_MEMORY_BYTES = 2**60  # more than any machine has
GPU_BYTES = 8 * 2**30
STAGE_SECONDS = 4  # of each stage, by the test's clock


@dataclass(frozen=True)
class Estimated:
    """The outputs of the node."""

    report: str
    width: int
    height: int
    tiles: int
    memory: float
    seconds: float


@pytest.fixture(scope="module")
def mini(comfy_inprocess: InProcessComfy) -> Iterator[Pack]:
    save(models_folder(comfy_inprocess) / "tadsr" / MINI, self_contained())
    with torch.inference_mode():
        yield load_pack(comfy_inprocess, MINI)


class Source:
    """A node that gives what a test holds: the loaded networks and a picture."""

    values: tuple[Any, ...] = ()
    RETURN_TYPES = ("MODEL", "TADSR_ENCODER", "VAE", "IMAGE")
    FUNCTION = "give"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def give(self) -> tuple[Any, ...]:
        return self.values


class Sink:
    """A node that keeps what it is given."""

    values: list[Any] = []
    RETURN_TYPES = ()
    FUNCTION = "take"
    CATEGORY = "testing"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {f"value{index}": ("*",) for index in range(6)}}

    def take(self, **values: Any) -> tuple[()]:
        Sink.values = [values[f"value{index}"] for index in range(6)]
        return ()


def estimate(pack: Pack, image: Tensor, **inputs: Any) -> tuple[Estimated, str]:
    """Returns the node's outputs and the text it shows, through ComfyUI's executor."""
    import nodes

    nodes.NODE_CLASS_MAPPINGS |= {"TADSRTestNetworks": Source, "TADSRTestSink": Sink}
    Source.values = (pack.model, pack.encoder, pack.vae, image)
    names = ("model", "encoder", "vae", "image")
    links = {name: ["source", index] for index, name in enumerate(names)}
    outputs = pack.comfy.run(
        {
            "source": node("TADSRTestNetworks"),
            "estimate": node("TADSREstimate", **links, **{"scale": 4.0, **inputs}),
            "sink": node("TADSRTestSink", **{f"value{index}": ["estimate", index] for index in range(6)}),
        }
    )
    return Estimated(*Sink.values), outputs["estimate"]["text"][0]


def forget_times(pack: Pack) -> None:
    pack.comfy.module("progress")._seconds_per_pixel.clear()


def test_says_size_plan_and_memory_and_runs_no_network(mini: Pack) -> None:
    forget_times(mini)
    calls = []
    networks = (mini.model.model.diffusion_model, mini.encoder.model, mini.vae.first_stage_model.decoder)
    hooks = [network.register_forward_hook(lambda *_: calls.append(1)) for network in networks]
    estimated, shown = estimate(mini, picture(80, 64), tile=TILE, overlap=32)
    for hook in hooks:
        hook.remove()
    assert not calls, "an estimate must cost nothing"
    assert shown == estimated.report
    assert (estimated.height, estimated.width) == SIZE
    assert "256x320 pixels" in shown and "tiles of" in shown and "Warning" not in shown
    weights = max(patcher.model_size() for patcher in (mini.model, mini.encoder.patcher, mini.vae.patcher)) / 1e6
    assert weights < estimated.memory < weights + 10_000


def test_time_is_not_known_before_a_run(mini: Pack) -> None:
    forget_times(mini)
    estimated, _ = estimate(mini, picture(16, 16))
    assert estimated.seconds == 0
    assert "not known yet. Run Upscale with TADSR once" in estimated.report


@pytest.mark.parametrize("tile", [0, TILE])
def test_tiles_are_those_that_the_run_gives_to_the_networks(mini: Pack, tile: int) -> None:
    estimated, _ = estimate(mini, picture(80, 64), tile=tile, overlap=32)
    given = [
        tiles_given(network, mini, tile)
        for network in (mini.encoder.model, mini.model.model.diffusion_model, mini.vae.first_stage_model.decoder)
    ]
    assert estimated.tiles == sum(given)
    assert (estimated.tiles > 3) == (tile > 0)
    for stage, count in zip(("Encode", "Predict", "Decode"), given, strict=True):
        assert f"{stage}: " + (f"{count} tiles of " if tile else "the whole picture at once") in estimated.report


def tiles_given(network: nn.Module, pack: Pack, tile: int) -> int:
    """Returns how many tiles a network was given in a run, the thumbnail for its statistics not counted."""
    batches: list[int] = []
    hook = network.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    pack.upscale(picture(80, 64), tile=tile, overlap=32)
    hook.remove()
    return sum(batches[1:] if tile else batches)


def test_time_after_a_run_is_that_of_the_next(mini: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_times(mini)
    clock = itertools.count(step=STAGE_SECONDS)  # read before and after each stage
    monkeypatch.setattr(mini.comfy.module("progress"), "perf_counter", lambda: next(clock))
    image = picture(32, 48)
    mini.upscale(image)
    once, shown = estimate(mini, image)
    assert once.seconds == pytest.approx(3 * STAGE_SECONDS)
    assert shown.splitlines()[:2] == ["Result: 192x128 pixels, 0.025 megapixels", "Time: about 12.0 seconds"]
    batch, shown_of_batch = estimate(mini, image.expand(3, -1, -1, -1))
    assert batch.seconds == pytest.approx(3 * once.seconds)
    assert "3 pictures, one after the other" in shown_of_batch
    twice_as_large, _ = estimate(mini, picture(64, 48))
    assert twice_as_large.seconds == pytest.approx(2 * once.seconds)


def test_more_pixels_take_more(mini: Pack) -> None:
    small, _ = estimate(mini, picture(16, 16))
    large, _ = estimate(mini, picture(64, 64))
    assert large.memory > small.memory
    tiled, _ = estimate(mini, picture(64, 64), width=2048, height=2048, tile=TILE)
    assert tiled.tiles > 3 * 16**2 and (tiled.width, tiled.height) == (2048, 2048)


def test_warns_where_memory_is_too_short_even_for_the_smallest_tiles(
    mini: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm

    monkeypatch.setattr(mm, "EXTRA_RESERVED_VRAM", NO_MEMORY_BYTES)  # what --reserve-vram sets
    estimated, _ = estimate(mini, picture(80, 64))
    warnings = [line for line in estimated.report.splitlines() if line.startswith("Warning")]
    assert len(warnings) == 3
    for stage, line in zip(("encode", "predict", "decode"), warnings, strict=True):
        assert f"To {stage} needs about" in line and "0 MB free" in line and "start ComfyUI with --cpu" in line


def test_a_batch_that_main_memory_cannot_hold_is_told_and_refused_before_it_runs(
    mini: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm
    import psutil

    one = picture(8, 8)
    batch = one.expand(3000, -1, -1, -1)  # of a picture that is there once
    memory = mini.comfy.module("batch").BatchMemory((16384, 16384), len(batch), 3)
    assert memory.result_bytes == 3000 * 16384**2 * 3 * 4 < memory.bytes
    assert memory.bytes > psutil.virtual_memory().total + psutil.swap_memory().total, "a test for a smaller machine"
    runs: list[int] = []
    hook = mini.encoder.model.register_forward_hook(lambda *_: runs.append(1))
    with pytest.raises(MemoryError, match="3000 pictures of 16384x16384 pixels, takes 969.* MB of main memory"):
        mini.upscale_kept(batch, width=16384)
    hook.remove()
    assert not runs
    assert "Main memory: " in estimate(mini, one)[0].report and "Warning" not in estimate(mini, one)[0].report
    monkeypatch.setattr(mm, "get_free_memory", lambda *_: 1000)
    assert "Warning: the result, 3 pictures of 32x32 pixels" in estimate(mini, one.expand(3, -1, -1, -1))[0].report


def test_warns_of_a_tile_that_is_too_large(mini: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management as mm

    free = mm.get_free_memory(mini.vae.patcher.load_device)
    monkeypatch.setattr(mm, "EXTRA_RESERVED_VRAM", free - 300e6)
    large = {"width": 8192, "height": 8192}
    assert "Choose a smaller tile" in estimate(mini, picture(8, 8), tile=8192, **large)[0].report
    assert "Warning" not in estimate(mini, picture(8, 8), tile=64, overlap=32, width=512, height=512)[0].report


@pytest.mark.parametrize("dynamic", [False, True])
def test_no_byte_of_memory_counts_twice(mini: Pack, monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> None:
    import comfy.memory_management
    import comfy.model_management as mm
    import comfy_aimdo.model_vbar
    from comfy.model_patcher import ModelPatcher

    memory = mini.comfy.module("memory")
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    own, other = (ModelPatcher(nn.Linear(1000, width), gpu, cpu) for width in (3000, 5000))
    own.model.model_loaded_weight_memory = own.model_size() // 2
    other.model.model_loaded_weight_memory = other.model_size()
    held = own.loaded_size() + other.loaded_size()
    monkeypatch.setattr(mm, "current_loaded_models", [mm.LoadedModel(own), mm.LoadedModel(other)])
    monkeypatch.setattr(mm, "get_free_memory", lambda *_: GPU_BYTES - held)
    # Under dynamic VRAM a patcher counts what weights hold as free, too.
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", dynamic)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbars_analyze", lambda *_: held)
    assert own.get_free_memory(gpu) == GPU_BYTES - (0 if dynamic else held)

    for_activations = GPU_BYTES - mm.extra_reserved_memory() - own.model_size()
    assert memory.free_if_all_unloaded(own) == for_activations
    assert memory.free_for_activations(own) == for_activations - other.model_size()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12.34, "12.3 seconds"),
        (59.96, "60.0 seconds"),
        (119.7, "2 min 0 s"),
        (3599.0, "59 min 59 s"),
        (5400.0, "1 h 30 min"),
        (12869 * 60 + 32.0, "8 days 22 h"),
    ],
)
def test_times_are_told_in_the_units_of_their_size(mini: Pack, seconds: float, text: str) -> None:
    assert mini.comfy.module("forecast")._duration(seconds) == f"about {text}"


def test_bad_inputs_are_refused_as_by_the_run(mini: Pack) -> None:
    with pytest.raises(PromptError, match="overlaps up to half the tile"):
        estimate(mini, picture(16, 16), tile=64, overlap=64)
    with pytest.raises(PromptError, match="accepted are 1 .grey., 3"):
        estimate(mini, torch.zeros(1, 8, 8, 2))
