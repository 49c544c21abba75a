"""The parts of the suite, each run by `benchmarks.suite` in a process of its own, inside a real ComfyUI.

python -m benchmarks.suite_parts PART ANSWER.json OPTIONS
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.full_size import FILES, write_random_weights
from benchmarks.inference import MEGABYTE
from benchmarks.seams import seam_ratio
from benchmarks.suite import FULL, MINI, Figures
from benchmarks.suite_gpu import gpu, gpu_large
from benchmarks.suite_meters import begin_peak, held_mb, on_gpu, peak_mb
from benchmarks.suite_pictures import LEFT, PICTURES, picture
from benchmarks.suite_stages import SCALE, Stages
from benchmarks.suite_weights import write_random_weights as write_small_random_weights
from host.comfy_in_process import load
from host.interpreter import chosen_comfyui
from host.node_pack import Pack, load_pack, models_folder

MEGAPIXEL = 2**20  # pixels of 1024x1024
WARM_UP_SIDE = 256  # pixels of the result
OVERLAPS, COPY_SHARES = (8, 16, 24, 32), (1, 1 / 2, 1 / 4, 1 / 16)  # latent pixels; of the picture's pixels
OPERATORS_SHOWN = 6
ATTENTION = "optimized_attention_override"  # ComfyUI's option of a MODEL
TILES_ACROSS = 2  # a tile is this part of a side, where tiled is compared with untiled
RUNS, WINDOW, GROWTH_SIDE = 50, 10, 256  # runs; runs at either end that are compared; pixels of the result
GROWTH_LIMIT_MB = 0.1  # a run: an eighth of a result of 256x256 pixels in float32
PHOTOGRAPH_CONTRAST = 0.25  # standard deviation of a photograph in [0, 1]; random weights decode to grey on grey
FLOAT_BYTES, RGB, BYTE_MAX = 4, 3, 255


def machine(pack: Pack) -> Figures:
    """Returns what the parts run on."""
    gpu_name = torch.cuda.get_device_name() if on_gpu() else None
    return {"gpu": gpu_name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def speed(pack: Pack, sides: list[int], repeats: int) -> Figures:
    """Returns seconds for each size of result, at the default settings; the sizes take turns."""
    clock = time.perf_counter if on_gpu() else time.process_time
    pack.upscale(picture(LEFT, WARM_UP_SIDE // SCALE))
    times: dict[int, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, seconds in times.items():
            image = picture(LEFT, side // SCALE)
            begin = clock()
            pack.upscale(image)
            seconds.append(clock() - begin)
    runs = []
    for side, seconds in times.items():
        per_megapixel = statistics.median(seconds) * MEGAPIXEL / side**2
        runs.append({"side": side, "seconds": seconds, "seconds_per_megapixel": per_megapixel})
    return {"clock": clock.__name__, "runs": runs}


def memory(pack: Pack, side: int, limit: float | None) -> Figures:
    """Returns the peak of one run that may take `limit` bytes, above the memory after loading and a small run.

    limit: None for all that is free. working_mb: without the picture itself, which is the input, the enlarged input and
    the result in float32. tiles: number and width in pixels for each stage.
    """
    pack.upscale(picture(LEFT, WARM_UP_SIDE // SCALE))
    image = picture(LEFT, side // SCALE)
    if limit is not None:
        limit_memory(pack, limit)
    plan = Stages(pack, side, (0, 0, 0)).plan
    tiles = {
        planned.stage.name: [len(planned.tiles.tiles), planned.tiles.tile_width * planned.stage.downscale]
        for planned in plan.stages
    }
    before = held_mb()
    begin_peak()
    pack.upscale(image)
    above = peak_mb() - before
    pictures = 0 if on_gpu() else 2 * side**2 + (side // SCALE) ** 2  # in main memory
    of_picture = pictures * RGB * FLOAT_BYTES / MEGABYTE
    return {"side": side, "above_mb": above, "picture_mb": of_picture, "working_mb": above - of_picture, "tiles": tiles}


def limit_memory(pack: Pack, limit: float) -> None:
    """Leaves `limit` bytes to runs by what --reserve-vram sets: all else that is free now is reserved."""
    management = pack.comfy.module("memory").mm
    management.EXTRA_RESERVED_VRAM = management.get_free_memory(pack.model.load_device) - limit


def difference(pack: Pack, side: int) -> Figures:
    """Returns how far the picture changes where the encoder, the decoder or all stages run in tiles, in 1/255.

    Tiles are asked for while the memory is there, so that the statistics are the whole picture's; the last figure is
    of a run that may take the memory of a quarter of the picture.
    Pictures with less contrast than a photograph, as random weights make, are first given that contrast.
    """
    image = picture(LEFT, side // SCALE)
    whole = Stages(pack, side, (side, side, side)).restore(image)
    contrast = max(1.0, PHOTOGRAPH_CONTRAST / float(whole.std()))
    mean = whole.mean(dim=(-2, -1), keepdim=True)

    def shown(result: Tensor) -> Tensor:
        return ((result - mean) * contrast + mean).clamp(0.0, 1.0) * BYTE_MAX

    tile = side // TILES_ACROSS
    ways = {"encoder": (tile, side, side), "decoder": (side, side, tile), "all stages": (tile, tile, tile)}
    results = {name: Stages(pack, side, tiles).restore(image) for name, tiles in ways.items()}
    decoding = pack.comfy.module("stages").decoder_stage(pack.vae)
    limit_memory(pack, decoding.bytes_for((tile // decoding.downscale) ** 2))
    results["memory for a quarter"] = Stages(pack, side, (0, 0, 0)).restore(image)
    changes = {name: (shown(result) - shown(whole)).abs() for name, result in results.items()}
    return {name: {"mean": float(change.mean()), "largest": float(change.max())} for name, change in changes.items()}


def choices(pack: Pack, side: int) -> Figures:
    """Returns what tiles lose by how far they overlap and by the size of the copy that gives statistics.

    overlap: by latent pixels, the largest difference of a latent, of its standard deviation, and of the decoded
    picture, in 1/255. copy: by the copy's share of the pixels, mean and largest difference in 1/255 where encoder and
    decoder run in tiles.
    """
    image, tile = picture(LEFT, side // SCALE), side // TILES_ACROSS
    whole, to_cut = (Stages(pack, side, (side, side, last)) for last in (side, tile))
    latent = to_cut.run(0, to_cut.begin(image))  # with the copy that tiles of the decoder need
    predicted = to_cut.run(1, latent)
    decoded = whole.run(2, replace(predicted, thumbnail=None)).full
    overlap, copy = {}, {}
    for pixels in OVERLAPS:
        tiled = Stages(pack, side, (tile, side, tile), overlap=pixels * whole.plan.downscale)
        change = tiled.run(0, tiled.begin(image)).full - latent.full
        overlap[pixels] = {
            "latent": float(change.abs().max() / latent.full.std()),
            "decoded": float((tiled.run(2, predicted).full - decoded).abs().max()) * BYTE_MAX,
        }
    for share in COPY_SHARES:
        tiled = Stages(pack, side, (tile, side, tile), thumbnail_share=share)
        change = (tiled.restore(image) - decoded).abs() * BYTE_MAX
        copy[share] = {"mean": float(change.mean()), "largest": float(change.max())}
    return {"overlap": overlap, "copy": copy}


def profile(pack: Pack, side: int) -> Figures:
    """Returns, for each network on the whole picture, processor seconds and the operators that take most of them.

    usual attention: the UNet again with the attention that ComfyUI would use by itself; both the faster of two.
    """
    stages = Stages(pack, side, (side, side, side))
    options = pack.model.model_options["transformer_options"]
    data, figures = stages.begin(picture(LEFT, side // SCALE)), {}
    for index, planned in enumerate(stages.plan.stages):
        run = partial(stages.run, index, data)
        data = run()  # loads the network
        with torch.profiler.profile() as profiler:
            run()
        operators = sorted(profiler.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
        total = sum(event.self_cpu_time_total for event in operators)
        shares = {event.key: event.self_cpu_time_total / total for event in operators[:OPERATORS_SHOWN]}
        figures[planned.stage.name] = {"seconds": _fastest(run), "operators": shares}
        if planned.stage.name == "predict" and ATTENTION in options:
            ours = options.pop(ATTENTION)
            figures["predict, usual attention"] = {"seconds": _fastest(run)}
            options[ATTENTION] = ours
    return figures


def _fastest(run: Callable[[], object]) -> float:
    """Returns the processor seconds of the faster of two runs."""
    times = []
    for _ in range(2):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return min(times)


def seams(pack: Pack, side: int) -> Figures:
    """Returns the seam ratio of each picture in tiles, and that of the whole one at the same places."""
    figures, tile = {}, side // TILES_ACROSS
    for kind in PICTURES:
        image = picture(kind, side // SCALE)
        tiled = Stages(pack, side, (tile, tile, tile))
        pictures = {"tiled": tiled.restore(image), "whole": Stages(pack, side, (side, side, side)).restore(image)}
        plans = [planned.tiles for planned in tiled.plan.stages]
        figures[kind] = {
            name: max(seam_ratio(result, plan, tiled.plan.downscale) for plan in plans)
            for name, result in pictures.items()
        }
    return figures


def growth(pack: Pack) -> Figures:
    """Returns by how many MB a run the memory grew over RUNS runs in tiles, each of another picture.

    The least of the last runs against the least of as many runs after the first ones: what is between is what the
    allocator keeps for a while.
    """
    held = []
    for index in range(RUNS):
        image = picture(PICTURES[index % len(PICTURES)], GROWTH_SIDE // SCALE) * (1 - index / RUNS / 2)
        pack.upscale(image, tile=GROWTH_SIDE // TILES_ACROSS)
        held.append(held_mb())
    rise = min(held[-WINDOW:]) - min(held[WINDOW : 2 * WINDOW])
    return {"mb_per_run": rise / (RUNS - 2 * WINDOW), "limit_mb_per_run": GROWTH_LIMIT_MB, "held_mb": held}


PARTS = {
    part.__name__: part
    for part in (machine, speed, memory, difference, choices, profile, seams, growth, gpu, gpu_large)
}


def pack_of(weights: str, base: Path, precision: str) -> Pack:
    """Returns the nodes with the weights of that name: the bundled ones, or random ones that are written first."""
    comfyui = chosen_comfyui()
    assert comfyui is not None, "the suite starts its parts inside ComfyUI's Python"
    comfy = load(comfyui, base, cpu=not on_gpu())
    models = models_folder(comfy)
    if weights == MINI:
        return load_pack(comfy, f"{MINI}.safetensors")
    if weights == FULL:
        write_random_weights(models)
        return load_pack(comfy, FILES["tadsr"], FILES["checkpoints"], precision)
    write_small_random_weights(models / "tadsr" / "random.safetensors")
    return load_pack(comfy, "random.safetensors")


def main(name: str, answer: str, options: str) -> None:
    """Runs one part and writes its figures."""
    chosen: dict[str, Any] = json.loads(options)
    torch.set_num_threads(chosen.pop("threads", torch.get_num_threads()))
    with tempfile.TemporaryDirectory(prefix="suite-part-") as base, torch.inference_mode():
        pack = pack_of(chosen.pop("weights", MINI), Path(base), chosen.pop("precision", "auto"))
        figures = PARTS[name](pack, **chosen)
    Path(answer).write_text(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
