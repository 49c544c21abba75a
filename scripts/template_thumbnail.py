"""How the thumbnails of the page's templates are laid out; `scripts/make_workflows.py` makes them."""

from __future__ import annotations

from PIL import Image, ImageDraw

SIDE = 512  # pixels; the page shows templates at about half of that
LINE_WIDTH = 4


def before_after(before: Image.Image, after: Image.Image) -> Image.Image:
    """Returns the centre square of `after`, its left half replaced by the enlarged `before`."""
    enlarged = before.convert("RGB").resize(after.size, Image.Resampling.LANCZOS)
    left, right = fitted(enlarged), fitted(after)
    right.paste(left.crop((0, 0, SIDE // 2, SIDE)), (0, 0))
    ImageDraw.Draw(right).line((SIDE // 2, 0, SIDE // 2, SIDE), fill="white", width=LINE_WIDTH)
    return right


def fitted(picture: Image.Image) -> Image.Image:
    """Returns the centre square of a picture at the size of a thumbnail."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.convert("RGB").crop((left, top, left + side, top + side))
    return square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
