"""What judges a picture without its truth: NIQE and BRISQUE, by the packages iqa-torch and brisque, and lattices.

Lower is better.

Both packages make a number of an array with one element, which numpy 2.4 refuses; each is mended in one place here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.lattice import comb, lattice
from benchmarks.packages import make_importable, reason
from host import torch_import_shim
from host.errors import HostError
from training.images import to_picture, to_tensor
from training.metrics.registry import METRICS, Device, Load, Measure, Metric, MetricError

Judge = Callable[[np.ndarray], float]  # uint8 (H, W, 3) RGB -> score

NIQE_BLOCK = 96  # side of the blocks that NIQE compares, as published


def load_niqe() -> Judge:
    """Returns NIQE (doi 10.1109/LSP.2012.2227726) with the published parameters, on grey in 8 bits.

    A picture without any texture has none: NaN. It raises ValueError for one that does not hold two blocks. Errors as
    `packages.install`.
    """
    make_importable("iqa-torch", "einops")
    torch_import_shim.install()  # iqa imports torchvision
    core: Any = importlib.import_module("iqa.niqe.niqe_core")
    pristine = {name: core.NIQE_PRIS_PARAMS[name] for name in ("mu_pris_param", "cov_pris_param", "gaussian_window")}
    core.NIQE_PRIS_PARAMS = {**pristine, "mu_pris_param": pristine["mu_pris_param"].ravel()}  # was (1, 36)
    niqe = importlib.import_module("iqa.niqe.niqe").niqe

    def judge(pixels: np.ndarray) -> float:
        height, width = pixels.shape[:2]
        if (height // NIQE_BLOCK) * (width // NIQE_BLOCK) < 2:
            raise ValueError(
                f"NIQE got {width}x{height} pixels; accepted: room for two blocks of {NIQE_BLOCK}x{NIQE_BLOCK}"
            )
        return float("nan") if _is_flat(pixels) else niqe(to_tensor(pixels)).item()

    return judge


def load_brisque() -> Judge:
    """Returns BRISQUE (doi 10.1109/TIP.2012.2214050) with the support vector machine trained on LIVE.

    A picture without any texture has none: NaN. Errors as `packages.install`.
    """
    make_importable("brisque", "libsvm-official", "scikit-image", "lazy-loader", "tifffile", "imageio")
    package = importlib.import_module("brisque")

    class Brisque(package.BRISQUE):
        def calculate_brisque_features(self, *arguments: object, **options: object) -> np.ndarray:
            features = super().calculate_brisque_features(*arguments, **options)  # some are arrays of one number
            return np.array([np.asarray(feature).item() for feature in features])

    brisque = Brisque(url=False)

    def judge(pixels: np.ndarray) -> float:
        return float("nan") if _is_flat(pixels) else float(brisque.score(pixels))

    return judge


def _is_flat(pixels: np.ndarray) -> bool:
    return bool((pixels == pixels[0, 0]).all())


def _loading(load: Callable[[], Judge]) -> Load:
    """Returns a judge's `load` as the table of metrics has it."""

    def loaded(device: Device, border: int) -> Measure:
        try:
            judge = load()
        except (HostError, ImportError, OSError) as error:
            raise MetricError(reason(error)) from error
        return lambda truth: lambda result: judge(np.asarray(to_picture(result)))

    return loaded


def _metric(name: str, label: str, digits: int, load: Callable[[], Judge]) -> Metric:
    return Metric(
        name=name, label=label, higher_is_better=False, needs_reference=False, digits=digits, load=_loading(load)
    )


NO_REFERENCE = {
    "niqe": replace(METRICS["niqe"], load=_loading(load_niqe)),
    "brisque": _metric("brisque", "BRISQUE", 2, load_brisque),
    "lattice": _metric("lattice", "lattice", 3, lambda: lattice),
    "comb": _metric("comb", "comb", 1, lambda: comb),
}
"""NIQE without pyiqa, BRISQUE, and the two measures of `benchmarks.lattice`."""
