"""Odd calls of the nodes for `benchmarks.fuzz`: what a link may carry, right and wrong, and what must come of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from host.node_pack import Pack

COMPONENTS, CONTEXT_WIDTH = 24, 64  # of the bundled model: its latents, its prompt
ROUNDING = 1e-6  # the order of additions follows how a picture lies in memory
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Means:
    """An odd value that is as good as a usual one, and must give the same."""

    value: Any
    usual: Any


def _tensor(random: Random, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(random.randrange(2**31)))


def image(random: Random, batch: int = 0) -> Tensor:
    """Returns a small picture, or a batch."""
    sides = (random.randrange(1, 10), random.randrange(1, 10))
    return _tensor(random, batch or random.choice((1, 1, 1, 2)), *sides, random.choice((1, 3, 3, 3, 4)))


def latent(random: Random) -> dict[str, Any]:
    """Returns a latent as Time-Aware Encode gives it."""
    count = random.choice((1, 1, 2))
    samples = _tensor(random, count, COMPONENTS, random.randrange(8, 13), random.randrange(8, 13)) * 4 - 2
    return {"samples": samples, "tadsr_timesteps": tuple(random.choice((1, 300, 999)) for _ in range(count))}


def conditioning(random: Random) -> list[Any]:
    """Returns a prompt of the bundled model's width."""
    return [[_tensor(random, 1, random.randrange(1, 9), CONTEXT_WIDTH), {}]]


def _with(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[changed.numel() // 2] = value
    return changed


def _odd_image(random: Random) -> Any:
    good = image(random)
    return random.choice(
        (
            *(good.to(torch.complex64), (good * 255).to(torch.uint8), good.to(torch.int64), good > 0.5, good[0]),
            *(good[None], good[:0], good[:, :0], good[..., :0], good[..., :1].expand(-1, -1, -1, 2)),
            *(good[..., :1].expand(-1, -1, -1, 5), _with(good, NAN), _with(good, INF), _with(good, -INF)),
            *(good.numpy(), good.tolist(), "picture", {"samples": good}, 1.0),
        )
    )


def _odd_latent(random: Random) -> Any:
    good = latent(random)
    samples = good["samples"]
    wrong = (
        *(samples[:, :3], samples.repeat(1, 4, 1, 1), samples[0], samples[None], samples[:0], samples[..., :0]),
        *(_with(samples, NAN), _with(samples, INF), samples.to(torch.int32), samples.to(torch.complex64), None, "x"),
    )
    masks = ("x", 1.0, samples[:, :, :0], _with(torch.ones(1, 1, 8, 8), NAN), torch.ones(()))
    times = ("500", (5000,), (None,), (), (1.5,), [NAN], 500, {"a": 1})
    return random.choice(
        (
            *({**good, "samples": value} for value in wrong),
            *({**good, "tadsr_timesteps": value} for value in times),
            *({**good, "noise_mask": value} for value in masks),
            *({}, [good], samples, "latent"),
        )
    )


def _odd_conditioning(random: Random) -> Any:
    tensor = conditioning(random)[0][0]
    return random.choice(
        (
            *([], [[]], [[tensor]], [[tensor, {}, 1]], [[None, {}]], [[tensor[0], {}]], [[tensor[..., :-1], {}]]),
            *([[_with(tensor, NAN), {}]], [[tensor.to(torch.int64), {}]], [[tensor[:, :0], {}]], "a cat", {}, tensor),
            *([[tensor, None]], [[tensor, {}], None], 5),
        )
    )


def _odd_mask(random: Random) -> Any:
    good = torch.ones(1, 4, 4)
    return random.choice(
        (
            *(
                good * 0,
                good[:0],
                good[..., :0],
                good[0, 0],
                good[None],
                good.to(torch.complex64),
                good.to(torch.int64),
            ),
            *(_with(good, NAN), _with(good, INF), good.numpy(), good.tolist(), "mask", 1.0, {}, True),
        )
    )


def _same_mask(random: Random) -> Means:
    """A mask of everything means the whole result."""
    good = torch.ones(1, random.randrange(4, 9), random.randrange(4, 9))
    return random.choice((Means(good, None), Means(good[0], None), Means(good > 0.5, None), Means(good.double(), good)))


def _one_of(*values: Any) -> Callable[[Random], Any]:
    return lambda random: random.choice(values)


NO_NUMBERS = (NAN, INF, "1", "", [1], (1, 2), {}, 1j, torch.tensor(1.0), True)
NO_COUNTS = (*NO_NUMBERS, -1, -(10**9), 2.5, 0.5)

Make = Callable[[Random], Any]
# of an input: a usual value, one that must be refused, and one that means a usual one
KINDS: dict[str, tuple[Make, Make, Make | None]] = {
    "image": (image, _odd_image, lambda random: _same_image(random)),
    "latent": (latent, _odd_latent, None),
    "conditioning": (conditioning, _odd_conditioning, None),
    "timestep": (
        lambda random: random.randrange(1, 1000),
        _one_of(*NO_COUNTS, 1000, 10**9, 2**70, 10**5000, None),
        _one_of(Means(0, 500), Means(250.0, 250)),
    ),
    "scale": (
        _one_of(1.0, 1.5, 2.0, 3.0),
        _one_of(*NO_NUMBERS, None, 0, 0.99, -2, 8.01, 10**9, 2**2000, 10**5000),
        _one_of(Means(2, 2.0)),
    ),
    "width": (_one_of(0, 0, 7, 24), _one_of(*NO_COUNTS, None, 10**6, 16385), _one_of(Means(24.0, 24))),
    "height": (_one_of(0, 0, 7, 24), _one_of(*NO_COUNTS, None, 10**6, 16385), _one_of(Means(24.0, 24))),
    "color_match": (_one_of("adain", "wavelet", "none"), _one_of("Adain", "", None, 0, [], "adain "), None),
    "encoding": (_one_of("mode", "sample"), _one_of("Mode", "", None, 0, [], "samples"), None),
    "seed": (lambda random: random.randrange(2**64), _one_of(*NO_COUNTS, None, 2**64), _one_of(Means(3.0, 3))),
    "tile": (_one_of(0, 0, 64, 200), _one_of(*NO_COUNTS, None), _one_of(Means(64.0, 64))),
    "overlap": (_one_of(0, 0, 16, 32), _one_of(*NO_COUNTS, None), _one_of(Means(16.0, 16))),
    "preview_size": (_one_of(0, 0, 5), _one_of(*NO_COUNTS, None), _one_of(Means(10**6, 0), Means(5.0, 5))),
    "any_timestep": (_one_of(True, False), _one_of("yes", 2, [], NAN), _one_of(Means(1, True))),
    "color_strength": (
        _one_of(0.0, 0.3, 1.0),
        _one_of(*NO_NUMBERS, None, -0.1, 1.1),
        _one_of(Means(1, 1.0), Means(0, 0.0)),
    ),
    "longest_side": (_one_of(0), _one_of(*NO_COUNTS, None, 10**6, 16385), _one_of(Means(0.0, 0), Means(20.0, 20))),
    "shortest_side": (_one_of(0), _one_of(*NO_COUNTS, None, 10**6, 16385), _one_of(Means(0.0, 0), Means(9.0, 9))),
    "megapixels": (_one_of(0.0), _one_of(*NO_NUMBERS, None, -1.0, 1e9), _one_of(Means(0, 0.0))),
    "preview_x": (_one_of(0.0, 0.5, 1.0), _one_of(*NO_NUMBERS, None, -0.1, 1.1), _one_of(Means(1, 1.0))),
    "preview_y": (_one_of(0.0, 0.5, 1.0), _one_of(*NO_NUMBERS, None, -0.1, 1.1), _one_of(Means(1, 1.0))),
    "preview_mask": (lambda _: None, _odd_mask, _same_mask),
    "position": (lambda random: random.random(), _one_of(*NO_NUMBERS, None, -0.1, 1.1), _one_of(Means(1, 1.0))),
}
NODES: dict[str, tuple[str, ...]] = {
    "TADSRUpscale": (
        *("image", "timestep", "scale", "color_match", "conditioning", "width", "height", "encoding", "seed"),
        *("tile", "overlap", "preview_size", "any_timestep", "longest_side", "shortest_side", "megapixels"),
        *("color_strength", "preview_x", "preview_y", "preview_mask"),
    ),
    "TADSREncode": ("image", "timestep", "scale", "width", "height", "encoding", "seed", "tile", "overlap"),
    "TADSROneStep": ("latent", "conditioning", "tile", "overlap", "any_timestep"),
    "TADSRFinish": ("image", "reference", "color_match", "color_strength"),
    "TADSRBlend": ("images", "position"),
}
SIZES = ("scale", "longest_side", "shortest_side", "megapixels")  # the exact sizes replace or exclude them
ALIASES = {"reference": "image", "images": "image"}


def _same_image(random: Random) -> Means:
    good = image(random)
    wide = good.repeat_interleave(2, dim=2)[:, :, ::2]
    return random.choice(
        (
            *(
                Means(wide, good),
                Means(good.double(), good),
                Means(good.movedim(-1, 1).contiguous().movedim(1, -1), good),
            ),
            *(Means(good.clone().requires_grad_(), good), Means(good * 5 - 2, (good * 5 - 2).clamp(0, 1))),
        )
    )


@dataclass(frozen=True)
class Call:
    """A call of a node."""

    node: str
    inputs: dict[str, Any]
    odd: str  # which input is odd; "": none
    usual: dict[str, Any] | None  # the call that must give the same; None: it must be refused, or all is usual


def call(seed: int, index: int) -> Call:
    """Returns call number `index`: most have one input that must be refused."""
    random = Random(f"{seed}:{index}")  # noqa: S311 - not for secrets
    name = random.choice(sorted(NODES))
    inputs = {key: KINDS[ALIASES.get(key, key)][0](random) for key in NODES[name]}
    if name == "TADSRFinish":
        inputs["reference"] = inputs["image"] * 0.5
    if name == "TADSRBlend":
        inputs["images"] = image(random, batch=3)
    odd = random.choice(NODES[name]) if random.random() < 0.85 else ""
    if not odd:
        return Call(name, inputs, "", None)
    if odd in SIZES:
        inputs |= {"width": 0, "height": 0}
    _, wrong, means = KINDS[ALIASES.get(odd, odd)]
    if means is not None and odd in KINDS and random.random() < 0.2:
        chosen: Means = means(random)
        if odd == "preview_mask":
            inputs["preview_size"] = 0  # with one, a mask says where
        if odd == "image" and name == "TADSRFinish":
            inputs["reference"] = chosen.usual[:1] * 0.5  # one for a batch of any length
        return Call(name, {**inputs, odd: chosen.value}, odd, {**inputs, odd: chosen.usual})
    return Call(name, {**inputs, odd: wrong(random)}, odd, None)


def attempt_call(pack: Pack, wanted: Call) -> str:
    """Runs a call; returns "refused", "equal" or "made", or what is wrong with that."""
    before = _copied(wanted.inputs)
    outcome, results = _run(pack, wanted.node, wanted.inputs)
    if not _unchanged(before, wanted.inputs):
        return "changed an input"
    if wanted.usual is not None and outcome == "made":
        other, expected = _run(pack, wanted.node, wanted.usual)
        same = other == "made" and all(_same(a, b) for a, b in zip(results, expected, strict=True))
        return "equal" if same else "another picture"
    if wanted.odd and wanted.usual is None:
        return f"accepted: {wanted.odd}={str(wanted.inputs[wanted.odd])[:80]}" if outcome == "made" else outcome
    return f"{outcome}, though right" if outcome == "refused" else outcome


def _run(pack: Pack, name: str, inputs: dict[str, Any]) -> tuple[str, list[Tensor]]:
    given: dict[str, Any] = {"model": pack.model, "encoder": pack.encoder, "vae": pack.vae}
    needed = {"TADSRUpscale": ("model", "encoder", "vae"), "TADSREncode": ("encoder",), "TADSROneStep": ("model",)}
    node = pack.comfy.node(name)
    try:
        results = node.execute(**{key: given[key] for key in needed.get(name, ())}, **inputs).result
    except ValueError as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = Path(__file__).resolve().parent.parent
        by_us = ours in Path(frames[-1].filename).resolve().parents
        if by_us and "accepted" in str(error) and "\n" not in str(error):
            return "refused", []
        return f"unclear: {str(error)[:120]!r} from {Path(frames[-1].filename).name}", []
    except Exception as error:  # what this program looks for
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"raw: {type(error).__name__}: {str(error)[:100]!r} from {Path(where.filename).name}", []
    tensors = [result["samples"] if isinstance(result, dict) else result for result in results]
    return ("made" if all(bool(t.isfinite().all()) for t in tensors) else "made NaN"), tensors


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= ROUNDING)


def _copied(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in inputs.items()}


def _unchanged(before: dict[str, Any], after: dict[str, Any]) -> bool:
    pairs = [(before[key], after[key]) for key in after if isinstance(after[key], Tensor)]
    return all(
        torch.equal(a.nan_to_num() if a.is_floating_point() else a, b.nan_to_num() if b.is_floating_point() else b)
        for a, b in pairs
    )
