"""The nodes' part of `scripts/same_results.py`: same_results_pictures.py PACK COMFYUI_BASE ANSWER.json.

Loads the pack of another tree by its path into a ComfyUI in this process, as ComfyUI would, and calls the nodes by
their ids and the names of their inputs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from host.comfy_in_process import load
from host.interpreter import chosen_comfyui
from host.node_pack import Pack, load_pack, models_folder, picture

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "tadsr-mini.safetensors"
NAME = "same-results.safetensors"  # the same file for every tree
SIZE = (40, 56)  # pixels of the input
TILES = {"tile": 96, "overlap": 32}  # pixels of the result
UPSCALES: dict[str, dict[str, Any]] = {
    "whole": {},
    "whole, wavelet": {"color_match": "wavelet"},
    "whole, sampled": {"encoding": "sample", "seed": 7, "color_match": "none"},
    "whole, odd size": {"width": 203, "height": 117},
    "tiled": {**TILES},
    "tiled, wavelet": {**TILES, "color_match": "wavelet"},
    "tiled, automatic overlap": {"tile": 128, "overlap": 0, "timestep": 200},
    "crop preview": {**TILES, "preview_size": 60},
    "crop preview, wavelet": {**TILES, "preview_size": 60, "color_match": "wavelet"},
    "crop preview of a whole": {"preview_size": 60},
}


def results(pack: Pack) -> dict[str, Tensor]:
    """Returns what the nodes give, by name."""
    image, batch = picture(*SIZE), picture(*SIZE, channels=4, batch=2, seed=1)
    given = {name: pack.upscale(image, **{"timestep": 500, **inputs}) for name, inputs in UPSCALES.items()}
    given |= {f"batch, alpha, {name}": pack.upscale(batch, **UPSCALES[name]) for name in ("whole", "tiled")}
    given["grey"] = pack.upscale(image[..., :1], **TILES)
    for name, tiles in (("whole", {}), ("tiled", TILES)):
        latent, enlarged = pack.encode(batch, encoding="sample", seed=3, **tiles)
        restored = pack.one_step(latent, **tiles)
        given[f"steps, {name}: encode"] = latent["samples"]
        given[f"steps, {name}: one step"] = restored["samples"]
        given[f"steps, {name}: match"] = pack.finish(pack.decode(restored), enlarged)
    return given


@torch.inference_mode()
def main(tree: Path, base: Path, answer: Path) -> None:
    """Writes the digest of every result."""
    torch.set_num_threads(1)
    comfyui = chosen_comfyui()
    assert comfyui is not None, "same_results.py chooses it"
    comfy = load(comfyui, base, pack=tree)
    shutil.copy(WEIGHTS, models_folder(comfy) / "tadsr" / NAME)
    pack = load_pack(comfy, NAME)
    digests = {f"pictures: {name}": digest(tensor) for name, tensor in results(pack).items()}
    answer.write_text(json.dumps(digests))


def digest(tensor: Tensor) -> str:
    shape = repr((tuple(tensor.shape), tensor.dtype)).encode()
    return hashlib.sha256(shape + tensor.contiguous().numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
