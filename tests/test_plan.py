"""Which tiles are chosen for a size and the memory that is free, with the bundled model's real costs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from host.comfy_in_process import InProcessComfy
from host.node_pack import Pack, load_pack

MEGABYTE = 1e6


@pytest.fixture(scope="module")
def pack(comfy_inprocess: InProcessComfy) -> Pack:
    return load_pack(comfy_inprocess, "tadsr-mini.safetensors")


@pytest.fixture
def plan(comfy_inprocess: InProcessComfy) -> ModuleType:
    return comfy_inprocess.module("plan")


def planned(pack: Pack, size: tuple[int, int], **options: int) -> Any:
    return pack.comfy.module("plan").plan_upscale(stages_of(pack), size, **options)


def stages_of(pack: Pack) -> Any:
    """Returns encoder, student and decoder."""
    return pack.comfy.module("stages").upscale_stages(pack.model, pack.encoder, pack.vae, pack.prompt)


def give_memory(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    """Makes ComfyUI see so many free bytes beside what it reserves."""
    import comfy.model_management as mm

    monkeypatch.setattr(mm, "get_free_memory", lambda *_, **__: free + mm.extra_reserved_memory())


def test_whole_where_it_fits_and_tiles_that_fit_where_not(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    give_memory(monkeypatch, 1e12)
    assert all(stage.tiles.is_whole for stage in planned(pack, (1024, 1024)).stages)
    for free in (2000 * MEGABYTE, 500 * MEGABYTE, 100 * MEGABYTE):
        give_memory(monkeypatch, free)
        stages = planned(pack, (1024, 1024)).stages
        assert all(stage.bytes <= free for stage in stages), f"{free / MEGABYTE:.0f} MB free"
    assert not stages[2].tiles.is_whole


def test_less_memory_never_gives_larger_tiles(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []
    for free in (1e10, 1e9, 3e8, 1e8, 0.0):
        give_memory(monkeypatch, free)
        sides.append(planned(pack, (1536, 1024)).stages[2].tiles.tile_height)
    assert sides == sorted(sides, reverse=True) and sides[-1] < sides[0]


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (340, 6800), (9792, 13056), (16384, 16384)])
def test_every_size_is_covered_within_memory(
    pack: Pack, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """9792x13056: 8 megapixels, four times enlarged."""
    give_memory(monkeypatch, 4e9)
    upscale = planned(pack, size)
    for planned_stage in upscale.stages:
        tiles, downscale = planned_stage.tiles, planned_stage.stage.downscale
        last = tiles.tiles[-1]
        assert (last.bottom, last.right) == (tiles.height, tiles.width)
        assert tiles.height * downscale >= size[0] and tiles.width * downscale >= size[1]
        assert planned_stage.bytes <= 4e9
        assert planned_stage.work < 1.6 * tiles.height * tiles.width, "too much of the time goes into overlaps"
    assert upscale.thumbnail_pixels <= 1.05 * min(stage.area for stage in upscale.stages), "too large a thumbnail"


@pytest.mark.parametrize(("tile", "side"), [(512, 512), (100, 104), (509, 512), (5, 64), (65, 72)])
def test_a_tile_asked_for_is_rounded_up(pack: Pack, plan: ModuleType, tile: int, side: int) -> None:
    stage = stages_of(pack)[0]
    rounded, plain = (plan.plan_stage(stage, 512, 512, tile=asked, overlap=4) for asked in (tile, side))
    assert rounded == plain
    assert rounded.tiles.tile_height * stage.downscale <= side


def test_a_tile_larger_than_the_picture_is_the_whole_picture(pack: Pack) -> None:
    assert all(stage.tiles.is_whole for stage in planned(pack, (300, 200), tile=4096).stages)


@pytest.mark.parametrize(("tile", "overlap"), [(512, 512), (512, 264), (512, 4000), (5, 8), (-8, 64), (0, -1)])
def test_tiles_that_cannot_be_are_refused(pack: Pack, tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=f"{overlap}.*accepted are"):
        planned(pack, (1024, 1024), tile=tile, overlap=overlap)


def test_an_automatic_tile_is_at_least_twice_its_overlap(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    give_memory(monkeypatch, 1e8)
    for stage in planned(pack, (4096, 4096), overlap=3000).stages:
        assert 0 < stage.tiles.overlap <= stage.tiles.tile_height // 2


def test_others_stay_loaded_while_a_comfortable_tile_fits_beside_them(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = pack.comfy.module("memory")
    decoder = stages_of(pack)[2]
    comfortable = decoder.bytes_for((memory.COMFORTABLE_SIDE // decoder.downscale) ** 2)
    monkeypatch.setattr(memory, "_held_by_others", lambda _: int(1e10))
    give_memory(monkeypatch, 1.5 * comfortable)
    beside = memory.pixels_that_fit(decoder)
    assert decoder.bytes_for(beside) <= 1.5 * comfortable
    give_memory(monkeypatch, 0.5 * comfortable)
    assert decoder.bytes_for(memory.pixels_that_fit(decoder)) > 1e10


def test_a_network_larger_than_the_card_leaves_room_for_a_tile(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI then keeps a part of the weights in main memory, where the network is on a card."""
    memory = pack.comfy.module("memory")
    student = stages_of(pack)[1]
    card = 0.75 * pack.model.model_size()
    give_memory(monkeypatch, card)
    on_processor = memory.pixels_that_fit(student)
    monkeypatch.setattr(memory.mm, "is_device_cpu", lambda _: False)
    monkeypatch.setattr(pack.model, "loaded_size", lambda: 0)
    monkeypatch.setattr(memory, "_held_by_others", lambda _: 0)
    assert memory.free_for_activations(pack.model) < 0
    bytes_on_card = student.bytes_for(memory.pixels_that_fit(student))
    assert 0.49 * card < bytes_on_card <= card / 2 < student.bytes_for(on_processor)
    give_memory(monkeypatch, 1e9 + pack.model.model_size())
    comfortable = student.bytes_for((memory.COMFORTABLE_SIDE // student.downscale) ** 2)
    assert student.bytes_for(memory.pixels_that_fit(student)) <= max(comfortable, 1e9), "no weights moved out for more"
