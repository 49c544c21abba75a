"""Makes the thumbnail of the page's template: `python scripts/template_thumbnail.py RESULT`.

RESULT is what `python quickstart.py` wrote for the sample photograph. The left half of the thumbnail shows the input
enlarged by Lanczos, the right half the result.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

REPOSITORY = Path(__file__).resolve().parent.parent
THUMBNAIL = REPOSITORY / "workflows" / "tadsr_upscale.jpg"
SIDE = 512  # pixels; the page shows templates at about half of that
LINE_WIDTH = 4


def thumbnail(before: Image.Image, after: Image.Image) -> Image.Image:
    """Returns the centre square of `after`, its left half replaced by the enlarged `before`."""
    side = min(after.size)
    left, top = (after.width - side) // 2, (after.height - side) // 2
    box = (left, top, left + side, top + side)
    enlarged = before.convert("RGB").resize(after.size, Image.Resampling.LANCZOS)
    halves = [picture.convert("RGB").crop(box).resize((SIDE, SIDE)) for picture in (enlarged, after)]
    halves[1].paste(halves[0].crop((0, 0, SIDE // 2, SIDE)), (0, 0))
    ImageDraw.Draw(halves[1]).line((SIDE // 2, 0, SIDE // 2, SIDE), fill="white", width=LINE_WIDTH)
    return halves[1]


if __name__ == "__main__":
    thumbnail(Image.open(REPOSITORY / "assets" / "sample.jpg"), Image.open(sys.argv[1])).save(THUMBNAIL, quality=88)
    print(THUMBNAIL)
