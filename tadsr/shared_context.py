"""What a tile must know of the whole picture: GroupNorm's statistics and what attention looks at.

A GroupNorm normalises with mean and variance of what it is given, and an attention over all pixels mixes what it is
given. Given a tile, both take the tile for the picture, and tiles disagree in colour and contrast. Here statistics,
keys and values come from a sample of the picture, run as one batch.

The calls of `torch.nn.functional.group_norm` are intercepted in the order in which the network makes them, which works
with any subclass, and with weights that are moved or cast at each call. A module with an attribute
`optimized_attention`, a function of queries, keys and values, (B, C, H, W) each, is an attention (so it is in ComfyUI's
VAEs and in `tadsr.encoder`); for the time of a block the attribute is replaced. A module called `attn1` is the
self-attention of a UNet's transformer block (in ComfyUI and in diffusers), (B, pixels, C) -> the same: it gets as
context the sample's pixels as the layer before left them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .encoder import Attend

ATTENTION = "optimized_attention"  # the attribute of a module
SELF_ATTENTION, CONTEXT = "attn1", "context"  # a module's name, and the argument of its call
MOST_PRODUCTS = 2**26  # of a query and a key at a time, where torch holds them all: 256 MB in float32

Statistics = tuple[Tensor, Tensor]  # mean and variance, (groups,) float32 each
KeysValues = tuple[Tensor, Tensor]  # (N, C) each, of all pixels
Hook = Callable[[nn.Module, tuple[Tensor, ...], dict[str, Any]], Any]  # before a module's call


class SharedContext:
    """Mean and variance of every GroupNorm of one network, in the order of the calls, and keys and values by module."""

    def __init__(self) -> None:
        self.statistics: list[Statistics] = []
        self.keys_values: dict[nn.Module, list[KeysValues]] = {}  # one for each call
        self.pixels: dict[nn.Module, list[Tensor]] = {}  # (N, C) for each call: what a self-attention looks at

    @classmethod
    @contextmanager
    def gather(cls, network: nn.Module) -> Iterator[SharedContext]:
        """Gives a context that is recorded while the block calls `network` on a sample of the picture.

        A function that calls it several times, as with two sets of weights, has a context for each of its calls.

        During that call each GroupNorm takes its statistics over the whole batch, as if it were one picture; an
        attention mixes each item of the batch on its own. Raises RuntimeError at the end of the block unless each
        GroupNorm of the network was called equally often.
        """
        context = cls()

        def record(x: Tensor, groups: int) -> Statistics:
            context.statistics.append(pooled_statistics(x, groups))
            return context.statistics[-1]

        with ExitStack() as stack:
            for module in _attentions(network):
                stack.enter_context(_replaced(module, context._recording(module)))
            for module in _self_attentions(network):
                stack.enter_context(_before_each_call(module, context._recording_pixels(module)))
            stack.enter_context(_NormsWith(record))
            yield context
        expected = sum(isinstance(module, nn.GroupNorm) for module in network.modules())
        if not context.statistics or len(context.statistics) % expected:
            raise RuntimeError(
                f"{len(context.statistics)} calls of GroupNorm were recorded for the {expected} of the network; "
                "accepted is one call of the network, not compiled, with the whole sample as its batch"
            )

    def _recording(self, module: nn.Module) -> Attend:
        usual: Attend = getattr(module, ATTENTION)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = (x.movedim(1, -1).flatten(0, -2).contiguous() for x in (k, v))
            self.keys_values.setdefault(module, []).append((keys, values))
            return usual(q, k, v)

        return attend

    def _recording_pixels(self, module: nn.Module) -> Hook:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            if options.get(CONTEXT) is None:
                self.pixels.setdefault(module, []).append(inputs[0].flatten(0, 1))

        return record

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Makes the network use what was recorded while the block runs, from the start of a call of it.

        Raises RuntimeError at the end of the block unless the network was called as a whole, any number of times.
        """
        calls = 0

        def recorded(x: Tensor, groups: int) -> Statistics:
            nonlocal calls
            statistics = self.statistics[calls % len(self.statistics)]
            calls += 1
            return statistics

        with ExitStack() as stack:
            for module, recorded_calls in self.keys_values.items():
                stack.enter_context(_replaced(module, _attention_to(recorded_calls)))
            for module, recorded_pixels in self.pixels.items():
                stack.enter_context(_before_each_call(module, _looking_at(recorded_pixels)))
            stack.enter_context(_NormsWith(recorded))
            yield
        if calls % max(1, len(self.statistics)):
            raise RuntimeError(f"{calls} calls of GroupNorm do not repeat the {len(self.statistics)} recorded ones")


def _attentions(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if hasattr(module, ATTENTION)]


def _self_attentions(network: nn.Module) -> list[nn.Module]:
    return [module for name, module in network.named_modules() if name.rpartition(".")[2] == SELF_ATTENTION]


@contextmanager
def _before_each_call(module: nn.Module, hook: Hook) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _looking_at(recorded: list[Tensor]) -> Hook:
    """Returns a hook by which each pixel of a batch looks at recorded ones, those of one call after the other."""
    calls = cycle(recorded)

    def look(_: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if options.get(CONTEXT) is not None:
            return inputs, options
        pixels = next(calls).to(inputs[0]).expand(len(inputs[0]), -1, -1)
        return inputs, {**options, CONTEXT: pixels}

    return look


@contextmanager
def _replaced(module: nn.Module, attention: Attend) -> Iterator[None]:
    usual = getattr(module, ATTENTION)
    setattr(module, ATTENTION, attention)
    try:
        yield
    finally:
        setattr(module, ATTENTION, usual)


def _attention_to(recorded: list[KeysValues]) -> Attend:
    """Returns an attention in which each pixel of a batch looks at recorded keys, those of one call after the other."""
    calls = cycle(recorded)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = next(calls)
        queries = q.movedim(1, -1).flatten(0, -2)[None, None]
        all_keys, all_values = (x.to(q)[None, None] for x in (keys, values))
        parts = queries.split(max(1, MOST_PRODUCTS // len(keys)), dim=-2)
        found = [F.scaled_dot_product_attention(part, all_keys, all_values) for part in parts]
        return torch.cat(found, dim=-2).reshape(len(q), *q.shape[-2:], -1).movedim(-1, 1)

    return attend


def pooled_statistics(x: Tensor, groups: int) -> Statistics:
    """Returns each group's mean and variance over all pixels of the batch. x: (B, C, ...)."""
    # One picture of the batch at a time, so that only one is held in float32.
    each = [torch.var_mean(picture.float().reshape(groups, -1), dim=1, correction=0) for picture in x.detach()]
    variances, means = (torch.stack(values) for values in zip(*each, strict=True))
    return means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)


class _NormsWith(TorchFunctionMode):
    """While entered, group_norm takes its statistics from a function of its input and number of groups."""

    def __init__(self, statistics: Callable[[Tensor, int], Statistics]) -> None:
        super().__init__()
        self.statistics = statistics

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.group_norm:
            return self._group_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _group_norm(
        self, x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        mean, variance = (s.to(x.device) for s in self.statistics(x, num_groups))
        channels = x.shape[1] // num_groups
        # With the statistics given, GroupNorm is a batch norm in evaluation whose channels of a group share them.
        return F.batch_norm(
            x,
            mean.repeat_interleave(channels),
            variance.repeat_interleave(channels),
            None if weight is None else weight.float(),
            None if bias is None else bias.float(),
            eps=eps,
        )
