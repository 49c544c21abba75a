"""The tagger over many pictures: what it is shown of each, and the tags that it gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tadsr.tagger_input import tagger_input
from tadsr.tagger_weights import TaggerWeights
from training.data.pictures import Picture, PictureError, decode, describe_damage
from training.data.storage import ByteRange
from training.degradation import degrade
from training.images import to_tensor

LQ, HQ = "lq", "hq"  # which of a pair is tagged: the paper tags LQ (section 4.1), SeeSR HQ
DOWNSCALE = 4  # of the degradation; paper, section 4.1


class TaggerInputs(Dataset[Tensor | str]):
    """What the tagger looks at, (3, side, side) float32, for each picture; the reason where it cannot be read."""

    def __init__(self, pictures: Sequence[Picture], of: str, side: int) -> None:
        self._pictures, self._of, self._side = tuple(pictures), of, side

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Tensor | str:
        picture = self._pictures[index]
        try:
            image = to_tensor(seen_of(picture, self._of))
        except PictureError as error:
            return str(error)
        size = tuple(max(sides) for sides in zip(picture.size, image.shape[2:], strict=True))
        return tagger_input(image, (size[0], size[1]), self._side)[0]


def seen_of(picture: Picture, of: str) -> np.ndarray:
    """Returns the pixels that are tagged, uint8 (H, W, 3); raises PictureError.

    A photograph without LQ is degraded as in training, by random numbers that depend on its name alone.
    """
    if of == HQ or picture.lq is not None:
        return _read(picture.hq if of == HQ or picture.lq is None else picture.lq)
    hq = _read(picture.hq)
    height, width = (side // DOWNSCALE * DOWNSCALE for side in hq.shape[:2])
    if not height or not width:
        raise PictureError(f"is {hq.shape[1]}x{hq.shape[0]} pixels; accepted: from {DOWNSCALE}x{DOWNSCALE}")
    return degrade(hq[:height, :width].astype(np.float32) / 255, np.random.default_rng(list(picture.name.encode())))


@torch.inference_mode()
def tag(
    pictures: Sequence[Picture],
    weights: TaggerWeights,
    *,
    of: str = LQ,
    device: torch.device | str = "cpu",
    batch: int = 1,
    workers: int = 0,
) -> Iterator[tuple[Picture, list[str] | str]]:
    """Yields each picture with its tags, or with a text that says why it cannot be read.

    workers: processes that read and degrade pictures. The tagger computes in float32.
    """
    network = weights.network(device)
    inputs = TaggerInputs(pictures, of, weights.config.side)
    loader = DataLoader(inputs, batch_size=batch, num_workers=workers, collate_fn=list)
    remaining = iter(pictures)
    for found in loader:
        images = [image for image in found if isinstance(image, Tensor)]
        given = iter(weights.tags.given(network(torch.stack(images).to(device))) if images else [])
        for item in found:
            yield next(remaining), item if isinstance(item, str) else next(given)


def _read(place: ByteRange) -> np.ndarray:
    try:
        return decode(place.read())
    except OSError as error:
        raise PictureError(describe_damage(error)) from error
