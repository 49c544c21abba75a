"""Image quality metrics of the paper's tables: our own PSNR-Y, SSIM-Y, LPIPS, DISTS; pyiqa's where it is installed.

OSEDiff, whose protocol the paper follows, measures with pyiqa: PSNR and SSIM on BT.601 luma without leaving out a
border, and MANIQA with the weights of PIPAL (test_metrics.py of cswry/OSEDiff). pyiqa is optional
(`pip install pyiqa`). Nearly all of its metrics download weights when they are first used, into torch's and Hugging
Face's caches; a metric whose package or weights cannot be had is left out, and `Metrics.missing` says why. Without a
network MANIQA and Q-Align try for a minute each, unless HF_HUB_OFFLINE=1. Of pyiqa's own dependencies CLIPIQA needs
openai-clip, MANIQA timm, TOPIQ timm and facexlib (without it: no object named 'CFANet'), Q-Align icecream.
Measured with pyiqa 0.1.16: its PSNR is ours to 1e-4 dB; its SSIM differs by up to 0.003 in either direction, because
it rounds luma to 8 bits and counts windows of negative correlation as 0. Compare `ssim_pyiqa` with tables of papers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from host import torch_import_shim
from training.metrics.dists import DISTS
from training.metrics.lpips import LPIPS
from training.metrics.pretrained import LpipsWeightsError
from training.metrics.reference import Reference

LPIPS_NETWORK = "alex"  # the network that papers report LPIPS with
SAID = 160  # characters of a reason that are shown


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What is known of a metric, other than how to compute it."""

    name: str
    """On the command line and in files."""
    label: str
    higher_is_better: bool
    needs_reference: bool
    digits: int = 4
    """Decimals in tables, as papers print it."""
    pyiqa_name: str = ""
    """The metric in pyiqa; empty: computed by this package."""
    on_luma: bool = False
    """Whether pyiqa is told to measure luma without the border; its other metrics take colours and all pixels."""


METRICS = {
    metric.name: metric
    for metric in (
        Metric(name="psnr", label="PSNR-Y", higher_is_better=True, needs_reference=True, digits=2),
        Metric(name="ssim", label="SSIM-Y", higher_is_better=True, needs_reference=True),
        Metric(
            name="ssim_pyiqa",
            label="SSIM-Y (pyiqa)",
            higher_is_better=True,
            needs_reference=True,
            pyiqa_name="ssim",
            on_luma=True,
        ),
        Metric(name="lpips", label="LPIPS", higher_is_better=False, needs_reference=True),
        Metric(name="dists", label="DISTS", higher_is_better=False, needs_reference=True),
        Metric(name="niqe", label="NIQE", higher_is_better=False, needs_reference=False, digits=3, pyiqa_name="niqe"),
        Metric(name="clipiqa", label="CLIPIQA", higher_is_better=True, needs_reference=False, pyiqa_name="clipiqa"),
        Metric(name="musiq", label="MUSIQ", higher_is_better=True, needs_reference=False, digits=2, pyiqa_name="musiq"),
        Metric(name="maniqa", label="MANIQA", higher_is_better=True, needs_reference=False, pyiqa_name="maniqa-pipal"),
        Metric(name="topiq_nr", label="TOPIQ", higher_is_better=True, needs_reference=False, pyiqa_name="topiq_nr"),
        Metric(name="qalign", label="Q-Align", higher_is_better=True, needs_reference=False, pyiqa_name="qalign"),
    )
}
"""The metrics of the paper's table 1, and DISTS and NIQE, in the order of tables."""

Scorer = Callable[[Tensor], dict[str, float]]


class Metrics:
    """The metrics asked for that can be had, and why the others cannot."""

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu", border: int = 0) -> None:
        """Loads the metrics; border: pixels at each side that PSNR and SSIM leave out.

        Raises ValueError for a name that METRICS does not have.
        """
        unknown = [name for name in names if name not in METRICS]
        if unknown:
            raise ValueError(f"unknown metrics: {', '.join(unknown)}; accepted: {', '.join(METRICS)}")
        self.border = border
        self.missing: dict[str, str] = {}
        self._networks: list[LPIPS] = []
        self._dists: DISTS | None = None
        self._foreign: dict[str, Any] = {}
        self._own = [name for name in names if not METRICS[name].pyiqa_name]
        for name in ("lpips", "dists"):
            if name in self._own:
                self._load_network(name, device)
        foreign = [name for name in names if METRICS[name].pyiqa_name]
        if foreign:
            self._load_foreign(foreign, device)

    @property
    def names(self) -> list[str]:
        """The metrics that can be had, in the order of METRICS."""
        return [name for name in METRICS if name in self._own or name in self._foreign]

    def scorer(self, reference: Tensor | None) -> Scorer:
        """Returns what scores results against a truth; without one only metrics that need none are computed.

        reference and results: (1, 3, H, W) in [0, 1]. A pyiqa metric that fails on a result moves to `missing`.
        """
        own = None if reference is None or not self._own else Reference(reference, self._networks, self.border)
        features = None if reference is None else self._dists_features(reference)

        def score(result: Tensor) -> dict[str, float]:
            scores = {} if own is None else self._score_own(own, features, result)
            return scores | self._score_foreign(result, reference)

        return score

    def _score_own(self, reference: Reference, features: list[Tensor] | None, result: Tensor) -> dict[str, float]:
        found = reference.score(result)
        scores = {"psnr": found.psnr_y, "ssim": found.ssim, "lpips": found.lpips.get(LPIPS_NETWORK, float("nan"))}
        results = self._dists_features(result)
        if self._dists is not None and features is not None and results is not None:
            scores["dists"] = self._dists.distance(features, results).item()
        return {name: scores[name] for name in self._own}

    @torch.no_grad()
    def _dists_features(self, image: Tensor) -> list[Tensor] | None:
        return None if self._dists is None else self._dists.features(image * 2 - 1)

    @torch.no_grad()
    def _score_foreign(self, result: Tensor, reference: Tensor | None) -> dict[str, float]:
        scores = {}
        for name, metric in list(self._foreign.items()):
            if METRICS[name].needs_reference and reference is None:
                continue
            images = (result, reference) if METRICS[name].needs_reference else (result,)
            try:
                scores[name] = float(metric(*images))
            except Exception as error:  # pyiqa's networks raise anything, and hours of other scores are at stake
                self._leave_out(name, f"failed on a picture of {tuple(result.shape[2:])} pixels: {_reason(error)}")
        return scores

    def _leave_out(self, name: str, reason: str) -> None:
        self._foreign.pop(name, None)
        self.missing[name] = reason

    def _load_network(self, name: str, device: torch.device | str) -> None:
        try:
            if name == "lpips":
                self._networks = [LPIPS(LPIPS_NETWORK).to(device)]
            else:
                self._dists = DISTS().to(device)
        except LpipsWeightsError as error:
            self._own.remove(name)
            self.missing[name] = _reason(error)

    def _load_foreign(self, names: Sequence[str], device: torch.device | str) -> None:
        torch_import_shim.install()  # pyiqa imports torchvision
        try:
            import pyiqa  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            self.missing |= dict.fromkeys(names, f"pyiqa is not installed ({_reason(error)}): pip install pyiqa")
            return
        for name in names:
            try:
                options = {"test_y_channel": True, "color_space": "ycbcr", "crop_border": self.border}
                chosen = options if METRICS[name].on_luma else {}
                self._foreign[name] = pyiqa.create_metric(METRICS[name].pyiqa_name, device=device, **chosen)
            except Exception as error:  # no network, no weights, a package of its own: each raises its own kind
                self.missing[name] = f"pyiqa cannot load it: {_reason(error)}"


def _reason(error: Exception) -> str:
    """Returns the error's kind and the start of its message, on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= SAID else f"{text[: SAID - 3]}..."
