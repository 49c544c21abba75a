"""Draws a before/after sheet: the enlarged input beside the result, and the same detail of both, magnified."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageStat

PANEL_SIDE = 720  # the longer side of a picture on the sheet, in pixels
NARROWEST_COLUMN = 420  # room for the labels above a tall picture
DETAIL_SHARE = 0.3  # a detail is this share of the picture's shorter side
MARGIN, LABEL_HEIGHT, FONT_SIZE = 12, 34, 20
BACKGROUND, INK, FRAME = (24, 24, 26), (240, 240, 240), (255, 196, 0)
_SEARCH_STEPS = 12  # places tried along each side when looking for the richest detail

Box = tuple[int, int, int, int]


def before_after_sheet(pictures: Sequence[tuple[str, Image.Image]], box: Box | None = None) -> Image.Image:
    """Returns one column for each (label, picture): the whole picture above, its detail `box` below.

    The pictures have the same size; None: the richest detail of the first, which is the input.
    """
    size = pictures[0][1].size
    box = box or richest_detail(pictures[0][1])
    scale = PANEL_SIDE / max(size)
    panel = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    detail_side = max(panel[0], NARROWEST_COLUMN)
    column = detail_side + MARGIN
    height = 2 * (LABEL_HEIGHT + MARGIN) + panel[1] + detail_side
    sheet = Image.new("RGB", (column * len(pictures) + MARGIN, height + MARGIN), BACKGROUND)
    for index, (label, picture) in enumerate(pictures):
        left = MARGIN + index * column
        whole = picture.convert("RGB").resize(panel, Image.Resampling.LANCZOS)
        _frame(whole, box, scale)
        detail = picture.convert("RGB").crop(box).resize((detail_side, detail_side), Image.Resampling.NEAREST)
        _place(sheet, (left, MARGIN), label, whole)
        magnification = detail_side / (box[2] - box[0])
        below = (left, MARGIN + LABEL_HEIGHT + panel[1] + MARGIN)
        _place(sheet, below, f"{label}: detail, {magnification:.1f}x", detail)
    return sheet


def richest_detail(picture: Image.Image) -> Box:
    """Returns the square (left, top, right, bottom) whose edges vary most, away from the picture's border."""
    side = max(1, int(min(picture.size) * DETAIL_SHARE))
    edges = picture.convert("L").filter(ImageFilter.FIND_EDGES)
    boxes = [
        (left, top, left + side, top + side)
        for left in _places(picture.width - side)
        for top in _places(picture.height - side)
    ]
    return max(boxes, key=lambda box: ImageStat.Stat(edges.crop(box)).sum2[0])


def _places(room: int) -> list[int]:
    margin = room // 8
    step = max(1, (room - 2 * margin) // _SEARCH_STEPS)
    return list(range(margin, room - margin + 1, step))


def _frame(whole: Image.Image, box: Box, scale: float) -> None:
    left, top, right, bottom = (round(edge * scale) for edge in box)
    ImageDraw.Draw(whole).rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=FRAME, width=2)


def _place(sheet: Image.Image, position: tuple[int, int], label: str, picture: Image.Image) -> None:
    font = ImageFont.load_default(FONT_SIZE)
    ImageDraw.Draw(sheet).text((position[0], position[1] + 4), label, fill=INK, font=font)
    sheet.paste(picture, (position[0], position[1] + LABEL_HEIGHT))
