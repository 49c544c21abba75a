"""How a batch is done."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..carrier import Carrier, carrier, read_workflow, with_settings
from ..errors import HostError
from ..results import DEFAULT_QUALITY, KINDS
from ..workflow import UPSCALE_WORKFLOW
from .lanes import DEFAULT_TIMEOUT_SECONDS, IN_FLIGHT
from .serving import PATIENCE_SECONDS

FORMATS = {"png": ".png", "jpg": ".jpg", "webp": ".webp"}


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How a batch is done.

    workflow: an API-format workflow file (None: the shipped one); assignments: "NODE.INPUT=VALUE" to set in it;
    input_node, output_node: the nodes that carry our picture, where they cannot be found.
    format: png, jpg or webp; quality: 1 to 100, of jpg and webp; keep_suffix: a.jpg becomes a.jpg.png, not a.png.
    window: frames whose statistics a result gets, 1 for its own (see `frames`); force: make again what is there.
    servers: addresses of ComfyUIs (none: one of our own); key: a bearer token for them; in_flight: pictures at a time
    on each; timeout: seconds without news from a running picture; patience: seconds without any server.
    comfyui: the folder of our own ComfyUI (None: that which batch.py runs with); models: a folder of models for it.
    ray: None, or the address of a Ray cluster ("": a local one); send: pictures travel to the cluster, which shares
    no storage with us; ray_cpus: where the cluster has no GPU,
    the CPU cores that one ComfyUI gets.
    """

    workflow: Path | None = None
    assignments: Sequence[str] = ()
    input_node: str | None = None
    output_node: str | None = None
    format: str = "png"
    quality: int = DEFAULT_QUALITY
    keep_suffix: bool = False
    window: int = 1
    force: bool = False
    servers: Sequence[str] = ()
    key: str | None = None
    in_flight: int = IN_FLIGHT
    timeout: float = DEFAULT_TIMEOUT_SECONDS
    patience: float = PATIENCE_SECONDS
    comfyui: Path | None = None
    models: Path | None = None
    ray: str | None = None
    send: bool = False
    ray_cpus: int = 4

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise HostError(f"the format {self.format!r} is none of {', '.join(FORMATS)}")
        if not 1 <= self.quality <= 100:
            raise HostError(f"the quality {self.quality} is not in 1..100")
        for name in ("window", "in_flight", "ray_cpus"):
            if getattr(self, name) < 1:
                raise HostError(f"{name} is {getattr(self, name)}; accepted are 1 and more")
        if self.ray is not None and self.servers:
            raise HostError("servers and a Ray cluster were given; choose one")

    @property
    def suffix(self) -> str:
        """The suffix of results."""
        return FORMATS[self.format]

    def carrier(self) -> Carrier:
        """Returns the workflow with its settings; raises HostError if it cannot carry a picture."""
        prompt = with_settings(read_workflow(self.workflow or UPSCALE_WORKFLOW), self.assignments)
        return carrier(prompt, self.input_node, self.output_node)

    def settings(self, carried: Carrier) -> Mapping[str, Any]:
        """Returns what a result depends on, beside its input and the weights."""
        prompt = copy.deepcopy(carried.prompt)
        for node in prompt.values():
            node.pop("_meta", None)
        prompt[carried.load]["inputs"]["image"] = ""
        prompt[carried.save]["inputs"] = {"images": prompt[carried.save]["inputs"]["images"]}
        lossy = {"quality": self.quality} if KINDS[self.suffix].lossy else {}
        return {"prompt": prompt, "format": self.format, "window": self.window, **lossy}
