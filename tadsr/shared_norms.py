"""GroupNorm over tiles as over one picture: statistics gathered once and used for every tile.

A GroupNorm normalises with mean and variance of what it is given. Given a tile, it takes the tile's, and tiles
disagree in colour and contrast. Here the statistics come from a sample of the picture, run as one batch.

The calls of `torch.nn.functional.group_norm` are intercepted in the order in which the network makes them, and the
modules are not touched: it works with any subclass, and with weights that are moved or cast at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Statistics = tuple[Tensor, Tensor]  # mean and variance, (groups,) float32 each


class SharedNorms:
    """Mean and variance of every GroupNorm of one network, in the order of the calls."""

    def __init__(self) -> None:
        self.statistics: list[Statistics] = []

    @classmethod
    @contextmanager
    def gather(cls, network: nn.Module) -> Iterator[SharedNorms]:
        """Gives statistics that are recorded while the block calls `network` once, on a sample of the picture.

        During that call each GroupNorm takes its statistics over the whole batch, as if it were one picture. Raises
        RuntimeError at the end of the block unless each GroupNorm of the network was called once.
        """
        norms = cls()

        def record(x: Tensor, groups: int) -> Statistics:
            norms.statistics.append(pooled_statistics(x, groups))
            return norms.statistics[-1]

        with _NormsWith(record):
            yield norms
        expected = sum(isinstance(module, nn.GroupNorm) for module in network.modules())
        if len(norms.statistics) != expected:
            raise RuntimeError(
                f"{len(norms.statistics)} calls of GroupNorm were recorded for the {expected} of the network; "
                "accepted is one call of the network, not compiled, with the whole sample as its batch"
            )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Makes the network use the recorded statistics while the block runs, from the start of a call of it.

        Raises RuntimeError at the end of the block unless the network was called as a whole, any number of times.
        """
        calls = 0

        def recorded(x: Tensor, groups: int) -> Statistics:
            nonlocal calls
            statistics = self.statistics[calls % len(self.statistics)]
            calls += 1
            return statistics

        with _NormsWith(recorded):
            yield
        if calls % max(1, len(self.statistics)):
            raise RuntimeError(f"{calls} calls of GroupNorm do not repeat the {len(self.statistics)} recorded ones")


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
