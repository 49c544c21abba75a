"""Notices the pack that is installed twice: ComfyUI then takes each node from the copy that it loaded last."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import nodes  # ComfyUI's own module
from comfy_api.latest import io


def tell_second_copy(node: type[io.ComfyNode]) -> None:
    """Logs a warning that names both folders where another pack has brought a node of this id."""
    other = nodes.NODE_CLASS_MAPPINGS.get(node.GET_SCHEMA().node_id)
    if other is not None and (first := _pack_of(other)) != (second := _pack_of(node)):
        logging.warning(
            f"TADSR is installed twice, in {first} and in {second}: its nodes come from the last one, which may be the "
            "older. Remove one and start ComfyUI again"
        )


def _pack_of(node: type) -> Path:
    """Returns the folder of the pack that a node is of."""
    return Path(sys.modules[node.__module__].__file__ or "").parent.parent
