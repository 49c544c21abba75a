"""Sizes of pictures: target size, enlarging, padding by reflection and the exact crop back.

Images are (B, C, H, W).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_SCALE, MAX_SCALE = 1.0, 8.0  # the enlargements offered; the method was trained for 4 (paper, section 4.1)
DEFAULT_SCALE = 4.0  # paper, section 4.1
MEGAPIXEL = 1e6  # pixels
MAX_SIDE = 16384  # ComfyUI's MAX_RESOLUTION
MIN_THUMBNAIL_SIDE = 8  # latent pixels: the SD 2.1 UNet halves them three times
MIN_NETWORK_SIDE = 64  # 8x VAE, then three halvings in the SD 2.1 UNet: one pixel is left at the bottom


def target_size(
    height: int,
    width: int,
    *,
    scale: float = DEFAULT_SCALE,
    target: tuple[int, int] = (0, 0),
    longest_side: int = 0,
    shortest_side: int = 0,
    megapixels: float = 0.0,
) -> tuple[int, int]:
    """Returns the (height, width) of the result for an input of height x width pixels.

    target: exact (height, width); a side of 0 follows from the other one in the input's proportions. longest_side,
    shortest_side, in pixels, and megapixels, in millions of pixels, keep the proportions, too. With all of them 0 the
    size is `scale` times the input's, rounded. Raises ValueError for two sizes at once, and for what is out of range.
    """
    if height < 1 or width < 1:
        raise ValueError(f"image is {width}x{height} pixels; accepted are images of at least 1x1 pixel")
    sides = {"longest_side": longest_side, "shortest_side": shortest_side, "megapixels": megapixels}
    given = {name: value for name, value in sides.items() if value}
    exact = {name: value for name, value in (("width", target[1]), ("height", target[0])) if value}
    if len(given) > 1 or (given and exact):
        wanted = ", ".join(f"{name} {value:g}" for name, value in {**given, **exact}.items())
        raise ValueError(
            f"the size of the result is given in several ways: {wanted}; accepted is one of them, with the others at 0"
        )
    if exact:
        size = (
            target[0] or max(1, round(height * target[1] / width)),
            target[1] or max(1, round(width * target[0] / height)),
        )
    else:
        size = _scaled(height, width, _factor(height, width, scale, **sides))
    if not all(1 <= side <= MAX_SIDE for side in size):
        raise ValueError(
            f"the result would be {size[1]}x{size[0]} pixels; accepted are sides of 1..{MAX_SIDE} pixels. "
            f"The input is {width}x{height}: choose a smaller scale or target size"
        )
    return size


def _factor(
    height: int, width: int, scale: float, *, longest_side: int, shortest_side: int, megapixels: float
) -> float:
    """Returns the enlargement of both sides."""
    if min(longest_side, shortest_side, megapixels) < 0 or not math.isfinite(megapixels):
        raise ValueError(
            f"longest_side is {longest_side}, shortest_side {shortest_side} and megapixels {megapixels:g}; accepted "
            f"are sides of 1..{MAX_SIDE} pixels, megapixels above 0, and 0 for what is not used"
        )
    if longest_side:
        return longest_side / max(height, width)
    if shortest_side:
        return shortest_side / min(height, width)
    if megapixels:
        return math.sqrt(megapixels * MEGAPIXEL / (height * width))
    return check_scale(scale)


def check_scale(scale: float) -> float:
    """Returns the enlargement unchanged; raises ValueError outside of those offered."""
    if not MIN_SCALE <= scale <= MAX_SCALE:
        raise ValueError(f"scale is {scale:g}; accepted are {MIN_SCALE:g}..{MAX_SCALE:g}")
    return scale


def _scaled(height: int, width: int, factor: float) -> tuple[int, int]:
    return max(1, round(height * factor)), max(1, round(width * factor))


def crop_to_shape(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the largest centred part of `image` with the proportions of `size` (height, width).

    A picture that has these proportions, to within a pixel, is returned whole.
    """
    height, width = image.shape[-2:]
    new_height = min(height, max(1, round(width * size[0] / size[1])))
    new_width = min(width, max(1, round(height * size[1] / size[0])))
    top, left = (height - new_height) // 2, (width - new_width) // 2
    return image[..., top : top + new_height, left : left + new_width]


def resize_bicubic(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns `image` resized to `size` (height, width), antialiased, with Pillow's cubic (a = -0.5).

    image: any range; a range of [0, 1] is kept by the caller's clamp, as a cubic overshoots at edges.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)


def enlarge(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns `image` in [0, 1] centre-cropped to the proportions of `size` and resized to it, in [0, 1]."""
    return resize_bicubic(crop_to_shape(image, size), size).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Padding:
    """Pixels added below and to the right, so that the crop back needs only the picture's size."""

    bottom: int
    right: int


def padding_for(height: int, width: int, multiple: int, minimum: int = MIN_NETWORK_SIDE) -> Padding:
    """Returns the padding that makes each side a multiple of `multiple`, and at least `minimum` pixels."""
    padded = [-(-max(side, minimum) // multiple) * multiple for side in (height, width)]
    return Padding(padded[0] - height, padded[1] - width)


def pad_to_multiple(image: Tensor, multiple: int, minimum: int = MIN_NETWORK_SIDE) -> tuple[Tensor, Padding]:
    """Returns `image` padded by reflection (repeated where the picture is small), and the padding.

    The edge row or column is not repeated, except for a side of one pixel, which has nothing else.
    """
    height, width = image.shape[-2:]
    padding = padding_for(height, width, multiple, minimum)
    image = _extend(image, -2, height + padding.bottom)
    return _extend(image, -1, width + padding.right), padding


def crop_padding(image: Tensor, padding: Padding) -> Tensor:
    """Returns `image` without its padding."""
    height, width = image.shape[-2:]
    return image[..., : height - padding.bottom, : width - padding.right]


def _extend(image: Tensor, dim: int, total: int) -> Tensor:
    length = image.shape[dim]
    if total == length:
        return image
    indices = torch.tensor(reflected_indices(length, total), device=image.device)
    return image.index_select(dim, indices)


def reflected_indices(length: int, total: int) -> list[int]:
    """Returns, for positions 0..total-1, the position inside 0..length-1 that a mirror at both ends shows."""
    if length == 1:
        return [0] * total
    period = 2 * (length - 1)
    return [min(i % period, period - i % period) for i in range(total)]


@dataclass(frozen=True)
class Region:
    """A rectangle of whole pixels, of the latent unless said otherwise."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """First row below it."""
        return self.top + self.height

    @property
    def right(self) -> int:
        """First column to the right of it."""
        return self.left + self.width

    def scaled(self, factor: int) -> Region:
        """Returns the same rectangle on a grid `factor` times as fine."""
        return Region(self.top * factor, self.left * factor, self.height * factor, self.width * factor)

    def intersection(self, other: Region) -> Region:
        """Returns what both cover; its height or width is 0 where they do not meet."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        return Region(top, left, max(0, bottom - top), max(0, right - left))

    def overlaps(self, other: Region) -> bool:
        """Returns whether the two share a pixel."""
        both = self.intersection(other)
        return both.height > 0 and both.width > 0

    def relative_to(self, other: Region) -> Region:
        """Returns the rectangle in the coordinates of `other`."""
        return Region(self.top - other.top, self.left - other.left, self.height, self.width)

    def crop(self, image: Tensor) -> Tensor:
        """Returns its part of `image` (..., H, W), a view."""
        return image[..., self.top : self.bottom, self.left : self.right]


@dataclass(frozen=True)
class TilePlan:
    """Tiles of one size that cover a picture, each overlapping the next by at least `overlap`; unit: latent pixels."""

    height: int
    width: int
    tile_height: int
    tile_width: int
    overlap: int
    multiple: int
    rows: tuple[int, ...]  # first row of each row of tiles, ascending
    columns: tuple[int, ...]  # first column of each column of tiles, ascending

    @property
    def whole(self) -> Region:
        """The whole picture."""
        return Region(0, 0, self.height, self.width)

    @property
    def is_whole(self) -> bool:
        """Whether one tile holds the whole picture."""
        return len(self.rows) == len(self.columns) == 1

    @property
    def tiles(self) -> tuple[Region, ...]:
        """All tiles, row by row."""
        return tuple(Region(top, left, self.tile_height, self.tile_width) for top in self.rows for left in self.columns)

    def tiles_for(self, region: Region) -> tuple[Region, ...]:
        """Returns the tiles that `region` needs: those that share a pixel with it."""
        return tuple(tile for tile in self.tiles if tile.overlaps(region))


def plan_tiles(height: int, width: int, *, tile: int, overlap: int, multiple: int = 1) -> TilePlan:
    """Returns the plan of the fewest tiles of at most `tile` a side, no larger than needed to overlap by `overlap`.

    A side that fits in `tile` is not cut. multiple: sides and first rows and columns of tiles are multiples of it,
    except at the far end of a picture whose size is none; `tile` is rounded down to it, and `overlap` up if it can be.
    Raises ValueError for a picture without pixels, tile < multiple and an overlap outside 0..tile - 1.
    """
    if height < 1 or width < 1 or tile < multiple:
        raise ValueError(
            f"tiles of {tile} for {width}x{height} latent pixels; accepted are pictures of at least 1x1 latent pixels "
            f"and tiles of at least {multiple}"
        )
    if not 0 <= overlap < tile:
        raise ValueError(f"tile overlap is {overlap} latent pixels and the tile {tile}; accepted are 0..{tile - 1}")
    rows, tile_height = _plan_side(height, tile, overlap, multiple)
    columns, tile_width = _plan_side(width, tile, overlap, multiple)
    return TilePlan(height, width, tile_height, tile_width, overlap, multiple, rows, columns)


def _plan_side(length: int, tile: int, overlap: int, multiple: int) -> tuple[tuple[int, ...], int]:
    """Returns the first pixels of the tiles along one side, and their length."""
    if length <= tile:
        return (0,), length
    cells, cell_tile = _ceil_div(length, multiple), tile // multiple
    cell_overlap = min(_ceil_div(overlap, multiple), cell_tile - 1)
    count = _ceil_div(cells - cell_overlap, cell_tile - cell_overlap)
    cell_tile = _ceil_div(cells + (count - 1) * cell_overlap, count)
    side = cell_tile * multiple
    starts = (i * (cells - cell_tile) // (count - 1) * multiple for i in range(count))
    return tuple(min(start, length - side) for start in starts), side


def thumbnail_size(height: int, width: int, *, area: int) -> tuple[int, int]:
    """Returns the (height, width) of a copy with the picture's proportions and up to `area` pixels, at most its own.

    No side falls below `MIN_THUMBNAIL_SIDE`, unless the picture's does. Unit: latent pixels. The size depends on the
    picture's alone.
    """
    scale = min(1.0, (area / (height * width)) ** 0.5)
    rows, columns = (max(int(side * scale), min(side, MIN_THUMBNAIL_SIDE)) for side in (height, width))
    return rows, columns


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)
