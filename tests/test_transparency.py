"""Colours that are hidden under full transparency: they make no difference to what can be seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from host.comfy_in_process import InProcessComfy
from host.node_pack import Pack, load_pack

LEVEL = 1 / 255
RED, GREEN, BLACK, WHITE = ((200, 30, 30), (0, 255, 0), (0, 0, 0), (255, 255, 255))
pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def mini(comfy_inprocess: InProcessComfy) -> Pack:
    return load_pack(comfy_inprocess, "tadsr-mini.safetensors")


def disc(hidden: tuple[int, int, int], side: int = 64) -> Tensor:
    """Returns a red disc with another colour under the transparency around it, (1, side, side, 4)."""
    rows, columns = torch.meshgrid(torch.arange(side) - side / 2, torch.arange(side) - side / 2, indexing="ij")
    inside = (rows**2 + columns**2 < (side / 3) ** 2)[..., None]
    rgb = torch.where(inside, torch.tensor(RED), torch.tensor(hidden)) / 255
    return torch.cat([rgb, inside.float()], dim=-1)[None]


def difference(a: Tensor, b: Tensor, visible: Tensor) -> float:
    """Returns the largest one where something can be seen, in levels."""
    return float(((a[..., :3] - b[..., :3]).abs() * visible).max() / LEVEL)


@pytest.mark.parametrize("inputs", [{}, {"tile": 96, "overlap": 32}], ids=["whole", "tiled"])
@pytest.mark.parametrize("color_match", ["adain", "lab", "wavelet", "none"])
def test_hidden_colours_make_no_difference(mini: Pack, color_match: str, inputs: dict[str, int]) -> None:
    options = {"scale": 2.0, "color_match": color_match, **inputs}
    green, black, white = (mini.upscale(disc(hidden), **options) for hidden in (GREEN, BLACK, WHITE))
    visible = green[..., 3:] > 0
    assert difference(green, black, visible) < 1 and difference(green, white, visible) < 1
    plain = mini.upscale(disc(RED)[..., :3], **options)
    assert difference(green, plain, green[..., 3:] == 1) < 8, "as the same disc on a ground of its own colour"


def test_the_steps_apart_take_no_notice_of_hidden_colours_either(mini: Pack) -> None:
    results = []
    for hidden in (GREEN, BLACK):
        latent, enlarged = mini.encode(disc(hidden), scale=2.0)
        results.append(mini.finish(mini.decode(mini.one_step(latent)), enlarged))
        raw = mini.finish(results[-1][..., :3].clone(), disc(hidden, side=128), "wavelet")
        results.append(raw)
    visible = results[0][..., 3:] > 0
    assert difference(results[0], results[2], visible) < 1
    assert difference(results[1], results[3], results[1][..., 3:] > 0) < 1, "a reference that is not of the encoder"


def test_a_grey_picture_stays_grey_over_hidden_colours(mini: Pack) -> None:
    image = disc(GREEN)
    image[..., :3] = torch.where(image[..., 3:] > 0, 0.5, image[..., :3])
    result = mini.upscale(image, scale=2.0)
    assert torch.equal(result[..., 0], result[..., 1])


def test_nothing_to_be_seen_is_no_error(mini: Pack) -> None:
    image = disc(GREEN, side=16)
    image[..., 3] = 0.0
    assert mini.upscale(image, scale=2.0).isfinite().all()


def test_filling_takes_the_nearest_visible_colour(comfy_inprocess: InProcessComfy) -> None:
    row = torch.tensor([[0.1, 1.0], [0.9, 0.0], [0.8, 0.0], [0.4, 0.2]])  # grey and alpha
    planes = torch.cat([row[:, :1].expand(-1, 3), row[:, 1:]], dim=1).T.reshape(1, 4, 1, 4)
    filled = comfy_inprocess.module("pictures").fill_hidden(planes)
    assert torch.allclose(filled[0, 0, 0], torch.tensor([0.1, 0.1, 0.4, 0.4]))
    assert torch.equal(filled[:, 3:], planes[:, 3:])
