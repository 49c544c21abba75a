"""Reads the API-format workflow that this repository ships, and fills it in."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import HostError

UPSCALE_WORKFLOW = Path(__file__).resolve().parent.parent / "example_workflows" / "api" / "upscale.json"

Prompt = dict[str, dict[str, Any]]


def load_workflow(path: Path = UPSCALE_WORKFLOW) -> Prompt:
    """Returns an API-format workflow: node id -> class_type, inputs, _meta."""
    return json.loads(path.read_text(encoding="utf-8"))


def with_inputs(prompt: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> Prompt:
    """Returns a copy of `prompt` with the `inputs` (class_type -> name -> value) set.

    Raises HostError for a class that is not there exactly once, or an input that its node does not have.
    """
    patched = copy.deepcopy(dict(prompt))
    for class_type, values in inputs.items():
        node = patched[node_of_class(prompt, class_type)]["inputs"]
        unknown = sorted(set(values) - set(node))
        if unknown:
            raise HostError(f"{class_type} has no input {', '.join(unknown)} in the workflow; it has {sorted(node)}.")
        node.update(values)
    return patched


def node_of_class(prompt: Mapping[str, Any], class_type: str) -> str:
    """Returns the id of the one node of `class_type`."""
    found = [node_id for node_id, node in prompt.items() if node["class_type"] == class_type]
    if len(found) != 1:
        raise HostError(f"The workflow has {len(found)} nodes of class {class_type}; exactly one was expected.")
    return found[0]


def title(prompt: Mapping[str, Any], node_id: str) -> str:
    """Returns what the page shows above a node, or its class, or the id of a node that is not there."""
    node = prompt.get(node_id, {})
    return node.get("_meta", {}).get("title") or node.get("class_type") or node_id
