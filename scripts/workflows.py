"""The shipped workflows: what is in them, and where it stands. `scripts/make_workflows.py` builds the files from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SAMPLE = "tadsr_sample.jpg"  # put into ComfyUI's input folder by the pack
WEIGHTS, NO_BASE = "tadsr-mini.safetensors", "none (the weights file holds its base)"
DIAL = "100, 300, 500, 700, 900"

Place = tuple[int, int]
Source = tuple[str, str]  # a node's name here, and the name of its output


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node on the page."""

    type: str
    at: Place
    size: Place | None = None  # None: as small as its content
    title: str | None = None
    values: dict[str, Any] = field(default_factory=dict)  # widget -> value, where it is not the default
    inputs: dict[str, Source] = field(default_factory=dict)
    properties: dict[str, Any] = field(default_factory=dict)
    bypassed: bool = False


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """A workflow: its nodes by name, in the order of their ids; what its thumbnail shows."""

    nodes: dict[str, Node]
    thumbnail: str  # "compare": before and after of the node "after"; "last": the last picture of it; "graph"
    after: str = "save"  # the node whose pictures the thumbnail shows
    extra: dict[str, Any] = field(default_factory=dict)
    runs_as_shipped: bool = True  # False where files are needed that the pack does not bring


def note(text: str, at: Place, size: Place, title: str = "Read me") -> Node:
    """Returns a note. No `code` in it: the page's new nodes show that in unreadable colours."""
    return Node(type="MarkdownNote", at=at, size=size, title=title, values={"text": text})


def photo(at: Place = (40, 60)) -> Node:
    """Returns the node with the sample photograph."""
    return Node(type="LoadImage", at=at, size=(300, 340), values={"image": SAMPLE}, title="Your photograph")


def loader(at: Place = (40, 470), weights: str = WEIGHTS, base: str = NO_BASE, **more: Any) -> Node:
    """Returns the node with the model."""
    return Node(type="TADSRModelLoader", at=at, size=(340, 190), values={"weights": weights, "base": base}, **more)


def model_inputs(name: str = "model") -> dict[str, Source]:
    """Returns the three links from the model to a node that takes all of it."""
    return {"model": (name, "MODEL"), "encoder": (name, "ENCODER"), "vae": (name, "VAE")}


def upscaler(image: Source = ("photo", "IMAGE"), at: Place = (450, 60), model: str = "model", **values: Any) -> Node:
    """Returns the node that does all steps in one."""
    inputs = {**model_inputs(model), "image": image}
    return Node(type="TADSRUpscale", at=at, size=(320, 230), values=values, inputs=inputs)


def save(image: Source, at: Place, size: Place = (400, 330), prefix: str = "tadsr") -> Node:
    """Returns the node that saves the result."""
    return Node(type="SaveImage", at=at, size=size, values={"filename_prefix": prefix}, inputs={"images": image})


def side_by_side(before: Source, after: Source, at: Place) -> Node:
    """Returns core's node that puts two pictures beside each other. (Its slider of both needs the new nodes.)"""
    values = {"direction": "left", "match_image_size": True, "spacing_width": 8}
    return Node(type="ImageStitch", at=at, size=(270, 170), values=values, inputs={"image1": after, "image2": before})


def preview(image: Source, at: Place, size: Place, title: str | None = None) -> Node:
    """Returns the node that shows a picture and keeps none."""
    return Node(type="PreviewImage", at=at, size=size, title=title, inputs={"images": image})


UPSCALE = Workflow(
    thumbnail="compare",
    nodes={
        "photo": photo(),
        "model": loader(),
        "upscale": upscaler(at=(420, 60), timestep=500, scale=4.0),
        "save": save(("upscale", "IMAGE"), at=(780, 370), size=(420, 370)),
        "sides": side_by_side(("photo", "IMAGE"), ("upscale", "IMAGE"), at=(420, 350)),
        "preview": preview(("sides", "IMAGE"), at=(780, 60), size=(780, 270), title="Before and after"),
        "note": note(
            "Press **Run**. Above, the photograph is beside the result; a click shows them larger.\n\n"
            "**timestep** is the dial: 100 stays faithful and soft, 900 is sharpest and invents most.\n\n"
            "Put your own photograph into the node on the left. The small model comes with the pack and needs no "
            "download; for the large one open the template *super-resolution-official-weights*.\n\n"
            "A transparent picture: *Load Image* gives colours and mask apart. Put both together with *Join Image with "
            "Alpha* before **image**, and the result keeps its alpha.",
            at=(1230, 370),
            size=(330, 440),
        ),
    },
)
COMPARE_WEIGHTS = Workflow(
    thumbnail="last",
    after="preview",
    nodes={
        "photo": photo(),
        "first": loader(at=(40, 470), title="First weights"),
        "second": loader(at=(40, 720), title="Second weights: choose another file"),
        "upscale_first": upscaler(at=(420, 60), model="first", timestep=200, scale=4.0),
        "upscale_second": upscaler(at=(420, 350), model="second", timestep=800, scale=4.0),
        "compare": Node(
            type="ImageCompare",
            at=(780, 370),
            size=(420, 340),
            inputs={"image_a": ("upscale_first", "IMAGE"), "image_b": ("upscale_second", "IMAGE")},
        ),
        "sides": side_by_side(("upscale_first", "IMAGE"), ("upscale_second", "IMAGE"), at=(420, 640)),
        "preview": preview(("sides", "IMAGE"), at=(780, 60), size=(780, 270), title="First and second"),
        "note": note(
            "Two weights files on one photograph. It opens with the small model twice, at timesteps 200 and 800.\n\n"
            "Choose your own files in the two loaders: TADSR, OSEDiff, PiSA-SR, OMGSR-S or HYPIR, each with its base. "
            "Weights for one timestep take the **timestep 0**: their own. Each loader shows what its file is, and "
            "its licence.\n\n"
            "**Compare Images** has a slider in the page's new nodes (Settings, Nodes 2.0); above it both are side by "
            "side.",
            at=(1230, 370),
            size=(330, 400),
        ),
    },
)
WORKFLOWS = {"super-resolution-upscale-photo": UPSCALE, "super-resolution-compare-weights": COMPARE_WEIGHTS}
