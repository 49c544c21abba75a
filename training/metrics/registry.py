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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.metrics.dists import DISTS
from training.metrics.lpips import LPIPS
from training.metrics.pretrained import LpipsWeightsError
from training.metrics.reference import psnr_y, ssim

LPIPS_NETWORK = "alex"  # the network that papers report LPIPS with
SAID = 160  # characters of a reason that are shown

Device = torch.device | str
Score = Callable[[Tensor], float]  # of a result
Measure = Callable[[Tensor | None], Score]  # of a truth, whose part is computed once; None: a metric that needs none
Load = Callable[[Device, int], Measure]  # of the device, and the border that PSNR and SSIM leave out
"""Pictures are (1, 3, H, W) in [0, 1], on the device."""


class MetricError(RuntimeError):
    """A metric that cannot be had, or cannot judge a picture: it is left out, and the others go on."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric, and what loads it."""

    name: str
    """On the command line and in files."""
    label: str
    higher_is_better: bool
    needs_reference: bool
    load: Load
    """Raises MetricError or LpipsWeightsError where the metric cannot be had."""
    digits: int = 4
    """Decimals in tables, as papers print it."""


def load_psnr(device: Device, border: int) -> Measure:
    """Gives PSNR of luma, in dB."""
    return lambda truth: lambda result: psnr_y(result, _given(truth), border).item()


def load_ssim(device: Device, border: int) -> Measure:
    """Gives the structural similarity of luma."""
    return lambda truth: lambda result: ssim(result, _given(truth), border).item()


def load_lpips(device: Device, border: int) -> Measure:
    """Gives LPIPS with AlexNet, of all pixels."""
    return _by_features(LPIPS(LPIPS_NETWORK).to(device))


def load_dists(device: Device, border: int) -> Measure:
    """Gives DISTS, of all pixels."""
    return _by_features(DISTS().to(device))


def from_pyiqa(name: str, *, on_luma: bool = False) -> Load:
    """Returns what loads a metric of pyiqa; on_luma: of luma without the border, else of colours and all pixels."""

    def load(device: Device, border: int) -> Measure:
        try:
            import pyiqa  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MetricError(f"pyiqa is not installed ({reason(error)}): pip install pyiqa") from error
        options = {"test_y_channel": True, "color_space": "ycbcr", "crop_border": border} if on_luma else {}
        try:
            metric = pyiqa.create_metric(name, device=device, **options)
        except Exception as error:  # no network, no weights, a package of its own: each raises its own kind
            raise MetricError(f"pyiqa cannot load it: {reason(error)}") from error

        def score(result: Tensor, *truth: Tensor) -> float:
            try:
                return float(metric(result, *truth))
            except Exception as error:  # its networks raise anything, and hours of other scores are at stake
                size = tuple(result.shape[2:])
                raise MetricError(f"failed on a picture of {size} pixels: {reason(error)}") from error

        return lambda truth: lambda result: score(result, *(() if truth is None else (truth,)))

    return load


METRICS = {
    metric.name: metric
    for metric in (
        Metric(name="psnr", label="PSNR-Y", higher_is_better=True, needs_reference=True, digits=2, load=load_psnr),
        Metric(name="ssim", label="SSIM-Y", higher_is_better=True, needs_reference=True, load=load_ssim),
        Metric(
            name="ssim_pyiqa",
            label="SSIM-Y (pyiqa)",
            higher_is_better=True,
            needs_reference=True,
            load=from_pyiqa("ssim", on_luma=True),
        ),
        Metric(name="lpips", label="LPIPS", higher_is_better=False, needs_reference=True, load=load_lpips),
        Metric(name="dists", label="DISTS", higher_is_better=False, needs_reference=True, load=load_dists),
        *(
            Metric(
                name=name,
                label=label,
                higher_is_better=higher_is_better,
                needs_reference=False,
                digits=digits,
                load=from_pyiqa(theirs),
            )
            for name, label, higher_is_better, digits, theirs in (
                ("niqe", "NIQE", False, 3, "niqe"),
                ("clipiqa", "CLIPIQA", True, 4, "clipiqa"),
                ("musiq", "MUSIQ", True, 2, "musiq"),
                ("maniqa", "MANIQA", True, 4, "maniqa-pipal"),
                ("topiq_nr", "TOPIQ", True, 4, "topiq_nr"),
                ("qalign", "Q-Align", True, 4, "qalign"),
            )
        ),
    )
}
"""The metrics of the paper's table 1, and DISTS and NIQE, in the order of tables."""


class Metrics:
    """The metrics asked for that can be had, and why the others cannot."""

    def __init__(
        self,
        names: Sequence[str],
        device: Device = "cpu",
        border: int = 0,
        table: Mapping[str, Metric] = METRICS,
    ) -> None:
        """Loads the metrics; border: pixels at each side that PSNR and SSIM leave out.

        Raises ValueError for a name that the table does not have.
        """
        unknown = [name for name in names if name not in table]
        if unknown:
            raise ValueError(f"unknown metrics: {', '.join(unknown)}; accepted: {', '.join(table)}")
        self.missing: dict[str, str] = {}
        self._table, self._measures = table, dict[str, Measure]()
        for name in (name for name in table if name in names):
            try:
                self._measures[name] = table[name].load(device, border)
            except (MetricError, LpipsWeightsError) as error:
                self.missing[name] = str(error) if isinstance(error, MetricError) else reason(error)

    @property
    def names(self) -> list[str]:
        """The metrics that can be had, in the order of the table."""
        return list(self._measures)

    @torch.no_grad()
    def scorer(self, reference: Tensor | None) -> Callable[[Tensor], dict[str, float]]:
        """Returns what scores results against a truth; without one only metrics that need none are computed.

        reference and results: (1, 3, H, W) in [0, 1]. A metric that fails on a result moves to `missing`; what PSNR and
        SSIM refuse is a ValueError.
        """
        scores = {
            name: measure(reference if self._table[name].needs_reference else None)
            for name, measure in self._measures.items()
            if reference is not None or not self._table[name].needs_reference
        }

        @torch.no_grad()
        def score(result: Tensor) -> dict[str, float]:
            found = {}
            for name in [name for name in scores if name in self._measures]:
                try:
                    found[name] = scores[name](result)
                except MetricError as error:
                    del self._measures[name]
                    self.missing[name] = str(error)
            return found

        return score


def reason(error: Exception) -> str:
    """Returns the error's kind and the start of its message, on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= SAID else f"{text[: SAID - 3]}..."


def _by_features(network: LPIPS | DISTS) -> Measure:
    """Gives a distance of features, of which the truth's are computed once."""

    def measure(truth: Tensor | None) -> Score:
        features = network.features(_given(truth) * 2 - 1)
        return lambda result: network.distance(network.features(result * 2 - 1), features).item()

    return measure


def _given(truth: Tensor | None) -> Tensor:
    assert truth is not None, "a metric with needs_reference is given one"
    return truth
