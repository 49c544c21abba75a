"""Counts what a GPU would have to wait for, without one: `python -m benchmarks.dispatch`.

Operators dispatched, copies between devices, and calls that make the host wait for the device (`.item()`, `nonzero` and
the like): of each network at full size for a 512x512 result, the nodes' beside diffusers modules of the same sizes, on
torch's meta device, where a call that waits cannot even run; and of a whole run of the nodes with the bundled model, in
a real ComfyUI on the processor. Prints Markdown tables. Needs nothing but Python, like runtests.py.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(REPOSITORY) in sys.path else [str(REPOSITORY)]  # run again by path, see main

from host.errors import HostError  # noqa: E402
from host.interpreter import chosen_comfyui, prepare_tests, run_again  # noqa: E402

RESULT_SIDE, LATENT_SIDE, TOKENS = 512, 64, 77
# Operators after which the host must know a value on the device.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
VIEWS = ("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice")
VIEWS += ("select", "split", "chunk", "detach", "alias", "unbind", "as_strided", "split_with_sizes")
COMFY_UNET = {  # SD 2.1 in ComfyUI's words (comfy/supported_models.py, SD20)
    **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2]},
    **{"channel_mult": (1, 2, 4, 4), "num_head_channels": 64, "use_spatial_transformer": True, "context_dim": 1024},
    **{"transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1, "legacy": False},
    **{"transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "use_linear_in_transformer": True},
}


def counted(run: Callable[[], object]) -> Counter[str]:
    """Returns how often each operator was dispatched while `run` ran, by name; copies that change device as "copy"."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            moved = isinstance(result, torch.Tensor) and args and isinstance(args[0], torch.Tensor)
            self.seen["copy" if name == "_to_copy" and moved and result.device != args[0].device else name] += 1
            return result

    with Counting() as mode, torch.inference_mode():
        run()
    return mode.seen


def kernels(seen: Counter[str]) -> int:
    """Returns the number of operators that do work: all but views."""
    return sum(count for name, count in seen.items() if name not in VIEWS)


def networks() -> dict[str, dict[str, Callable[[], object]]]:
    """Returns network -> side -> a run of it at full size, on the meta device. ComfyUI must be importable."""
    import importlib

    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.autoencoders.vae import Decoder

    from benchmarks.full_size import SD_UNET
    from benchmarks.unmerged import MOMENTS, SD_NORM_GROUPS, SD_WIDTHS, UnmergedEncoder
    from tadsr.encoder import EncoderConfig, TimeAwareEncoder

    openai = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel")
    autoencoder = importlib.import_module("comfy.ldm.modules.diffusionmodules.model")
    attention = importlib.import_module("comfy.ldm.modules.attention")
    operations = importlib.import_module("comfy.ops").disable_weight_init
    meta = torch.device("meta")
    with meta:
        theirs = UNet2DConditionModel(**SD_UNET).eval()
        their_encoder = UnmergedEncoder().eval()
        their_decoder = Decoder(
            in_channels=MOMENTS // 2,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * len(SD_WIDTHS),
            block_out_channels=SD_WIDTHS,
            layers_per_block=2,
            norm_num_groups=SD_NORM_GROUPS,
        ).eval()
        our_encoder = TimeAwareEncoder(EncoderConfig()).eval()
        our_decoder = autoencoder.Decoder(
            ch=128, out_ch=3, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=[], in_channels=3,
            resolution=256, z_channels=4, dropout=0.0,
        ).eval()  # fmt: skip
        ours = openai.UNetModel(**COMFY_UNET, dtype=torch.float32, device=meta, operations=operations).eval()
        latent, image = torch.empty(1, 4, LATENT_SIDE, LATENT_SIDE), torch.empty(1, 3, RESULT_SIDE, RESULT_SIDE)
        context, timestep = torch.empty(1, TOKENS, 1024), torch.empty(1)
    our_decoder.mid.attn_1.optimized_attention = autoencoder.pytorch_attention  # as on a GPU
    choice = {"optimized_attention_override": lambda _, *args, **kwargs: attention.attention_pytorch(*args, **kwargs)}
    return {
        "UNet": {
            "nodes": lambda: ours(latent, timestep, context=context, transformer_options=dict(choice)),
            "diffusers": lambda: theirs(latent, timestep, encoder_hidden_states=context),
        },
        "encoder": {
            "nodes": lambda: our_encoder(image, timestep),
            "diffusers": lambda: their_encoder(image, timestep),
        },
        "decoder": {"nodes": lambda: our_decoder(latent), "diffusers": lambda: their_decoder(latent)},
    }


def full_size_table() -> str:
    """Returns operators of each network at full size, ours beside diffusers'."""
    lines = ["| network, 512x512 result | nodes | of these, work | diffusers | of these, work | waiting calls |"]
    lines.append("|---|---|---|---|---|---|")
    for name, sides in networks().items():
        ours, theirs = counted(sides["nodes"]), counted(sides["diffusers"])
        waits = sum(ours[word] for word in WAITING)
        lines.append(f"| {name} | {ours.total()} | {kernels(ours)} | {theirs.total()} | {kernels(theirs)} | {waits} |")
    return "\n".join(lines)


def whole_run_table(comfy: Any) -> str:
    """Returns what a second whole run of the nodes dispatches, whole and in tiles, with the bundled model."""
    lines = ["| a run of tadsr-mini, 256x256 result | operators | copies between devices | waiting calls |"]
    lines.append("|---|---|---|---|")
    for name, tile in (("whole", 0), ("in tiles of 128", 128)):
        seen = counted(_run_of(comfy, tile))
        waits = {word: seen[word] for word in WAITING if seen[word]}
        lines.append(f"| {name} | {seen.total()} | {seen['copy']} | {waits or 0} |")
    return "\n".join(lines)


def _run_of(comfy: Any, tile: int) -> Callable[[], object]:
    """Returns a run of the nodes themselves, their model loaded and used once."""
    import inspect

    import torch

    loader, upscale = comfy.node("TADSRModelLoader"), comfy.node("TADSRUpscale")
    model, encoder, vae = loader.execute(
        weights="tadsr-mini.safetensors", base="none (the weights file holds its base)"
    ).result[:3]
    first, second = torch.rand(2, 1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    settings = {"model": model, "encoder": encoder, "vae": vae, "image": first, "timestep": 500, "scale": 4.0}
    settings |= {"color_match": "adain", "tile": tile, "overlap": 32}
    accepted = inspect.signature(upscale.execute).parameters
    settings = {key: value for key, value in settings.items() if key in accepted}

    def run() -> object:
        return upscale.execute(**settings | {"image": second})  # another: the result of the same one is kept

    with torch.inference_mode():
        upscale.execute(**settings)
    return run


def main(arguments: list[str]) -> int:
    """Counts and prints; returns the exit code."""
    if arguments:
        print(__doc__)
        return 0 if arguments[0] in ("-h", "--help") else 2
    try:
        comfyui = chosen_comfyui()
        if comfyui is None:
            run_again(prepare_tests(), Path(__file__), arguments)
    except HostError as error:
        print(f"\nbenchmarks.dispatch: {error}", file=sys.stderr)
        return 1
    from host import comfy_in_process

    with tempfile.TemporaryDirectory(prefix="tadsr-dispatch-") as base:
        comfy = comfy_in_process.load(comfyui, Path(base))
        print(full_size_table(), whole_run_table(comfy), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
