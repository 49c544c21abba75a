"""A made-up photograph for tests of the degradation."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def synthetic_photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Soft blobs, hard edges and some texture: float32 (H, W, 3) in [0, 1]."""
    rng = np.random.default_rng(seed)
    soft = ndimage.gaussian_filter(rng.random((height, width, 3)), (6, 6, 0), mode="wrap")
    soft = (soft - soft.min()) / max(np.ptp(soft), 1e-6)
    edges = 0.3 * (soft[:, :, :1] > 0.5)
    texture = 0.05 * ndimage.gaussian_filter(rng.standard_normal((height, width, 3)), (1, 1, 0))
    return np.clip(0.6 * soft + edges + texture, 0, 1).astype(np.float32)
