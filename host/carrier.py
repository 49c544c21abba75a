"""A workflow as the carrier of one picture after another: where a picture goes in, and where its result comes out."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import HostError
from .workflow import Prompt, title

LOADERS = ("LoadImage",)
SAVERS = ("SaveImage", "SaveImageAdvanced", "PreviewImage")
BLEND, JOIN, PREVIEW, SAVE_DEEP = "ImageBlend", "JoinImageWithAlpha", "PreviewImage", "SaveImageAdvanced"
LOW_BYTE_SHARE = 1 / 257  # value/65535 = 256/257 high/255 + 1/257 low/255
_OWN = "tadsr-batch"  # in the ids of the nodes that are added, and the names of files on the server
_IMAGE_OUTPUT, _MASK_OUTPUT = 0, 1


@dataclass(frozen=True)
class Carrier:
    """An API-format workflow, and the ids of the nodes that take a picture and save its result."""

    prompt: Prompt
    load: str
    save: str

    def classes(self, deep: bool = False) -> set[str]:
        """Returns the node classes that a server must have; `deep`: also what only 16 bits need."""
        own = {node["class_type"] for node in self.prompt.values()} | {PREVIEW, JOIN, BLEND}
        return own | {SAVE_DEEP} if deep else own

    def described(self, name: str) -> Prompt:
        """Returns the workflow as it is kept in a result: with the name of the picture's file."""
        prompt = copy.deepcopy(self.prompt)
        prompt[self.load]["inputs"]["image"] = name
        return prompt

    def filled(self, images: Sequence[str], *, alpha: bool, deep_result: bool) -> Prompt:
        """Returns the workflow with a picture's uploads in it: one, or the high and low bytes of 16 bits.

        Alpha, which a LoadImage gives as a mask, is joined to the picture. The result is a preview, which ComfyUI
        keeps in its temporary folder; one of 16 bits has to go to its output folder.
        """
        prompt = copy.deepcopy(self.prompt)
        sources = [self._loader(prompt, number, image, alpha) for number, image in enumerate(images)]
        if len(sources) == 2:
            mix = {"image1": sources[0], "image2": sources[1]}
            inputs = {**mix, "blend_factor": LOW_BYTE_SHARE, "blend_mode": "normal"}
            source = _add(prompt, "bytes", BLEND, inputs)
        else:
            (source,) = sources
        self._rewire(prompt, source)
        prompt[self.save] = _saver(prompt[self.save]["inputs"]["images"], deep_result)
        return prompt

    def _loader(self, prompt: Prompt, number: int, image: str, alpha: bool) -> list[Any]:
        if number == 0:
            prompt[self.load]["inputs"]["image"] = image
            link = [self.load, _IMAGE_OUTPUT]
        else:
            inputs = {**self.prompt[self.load]["inputs"], "image": image}
            link = _add(prompt, f"load-{number}", self.prompt[self.load]["class_type"], inputs)
        mask = [link[0], _MASK_OUTPUT]
        return _add(prompt, f"alpha-{number}", JOIN, {"image": link, "alpha": mask}) if alpha else link

    def _rewire(self, prompt: Prompt, source: list[Any]) -> None:
        """Lets what took the picture from its loader take it from `source`."""
        for node_id, node in prompt.items():
            if node_id.startswith(_OWN):
                continue
            for name, value in node["inputs"].items():
                if value == [self.load, _IMAGE_OUTPUT]:
                    node["inputs"][name] = source


def _add(prompt: Prompt, name: str, class_type: str, inputs: Mapping[str, Any]) -> list[Any]:
    prompt[f"{_OWN}-{name}"] = {"class_type": class_type, "inputs": dict(inputs)}
    return [f"{_OWN}-{name}", _IMAGE_OUTPUT]


def _saver(images: Any, deep: bool) -> dict[str, Any]:
    if not deep:
        return {"class_type": PREVIEW, "inputs": {"images": images}}
    depth = {"format": "png", "format.bit_depth": "16-bit", "format.input_color_space": "sRGB"}
    return {"class_type": SAVE_DEEP, "inputs": {"images": images, "filename_prefix": f"{_OWN}/result", **depth}}


def read_workflow(path: Path) -> Prompt:
    """Returns an API-format workflow of a file; raises HostError for anything else."""
    try:
        prompt = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HostError(f"the workflow {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise HostError(f"the workflow {path} is not JSON: {error}") from error
    if isinstance(prompt, dict) and isinstance(prompt.get("nodes"), list):
        raise HostError(f"{path} is a workflow as the page saves it; export it with Workflow > Export (API)")
    nodes = prompt.values() if isinstance(prompt, dict) else ()
    if not nodes or not all(isinstance(node, dict) and {"class_type", "inputs"} <= node.keys() for node in nodes):
        raise HostError(f"{path} is not a workflow in API format: node id -> class_type, inputs")
    return prompt


def carrier(prompt: Prompt, load: str | None = None, save: str | None = None) -> Carrier:
    """Returns the workflow with the nodes that carry our picture: those named (id, title or class), else found.

    Raises HostError where there is none, or more than one.
    """
    loading = node_named(prompt, load) if load else _only(prompt, LOADERS[:1], "--input-node")
    saving = node_named(prompt, save) if save else _only(prompt, SAVERS, "--output-node")
    for node_id, needed in ((loading, "image"), (saving, "images")):
        if needed not in prompt[node_id]["inputs"]:
            raise HostError(
                f"node {node_id} ({title(prompt, node_id)}) has no input {needed}, and cannot carry a picture"
            )
    return Carrier(prompt, loading, saving)


def _only(prompt: Prompt, classes: Sequence[str], option: str) -> str:
    """Returns the id of the only node of the first of `classes` that occurs."""
    for class_type in classes:
        found = [node_id for node_id, node in prompt.items() if node["class_type"] == class_type]
        if len(found) == 1:
            return found[0]
        if found:
            raise HostError(
                f"the workflow has {len(found)} {class_type} nodes ({', '.join(found)}): name one with {option}"
            )
    raise HostError(f"the workflow has no {' or '.join(classes)} node: name the node with {option}")


def node_named(prompt: Prompt, name: str) -> str:
    """Returns the id of the node with this id, title or class; raises HostError unless it is one."""
    if name in prompt:
        return name
    found = [i for i, node in prompt.items() if name in (node["class_type"], node.get("_meta", {}).get("title"))]
    if len(found) != 1:
        known = ", ".join(f"{i} ({title(prompt, i)})" for i in prompt)
        raise HostError(f"{name!r} names {len(found)} nodes of the workflow, not one; it has {known}")
    return found[0]


def with_settings(prompt: Prompt, assignments: Sequence[str]) -> Prompt:
    """Returns a copy with NODE.INPUT=VALUE set for each; VALUE is read as JSON where it is some, else as text.

    Raises HostError for an assignment of another form, or a node that is not there.
    """
    changed = copy.deepcopy(prompt)
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        node, dot, name = target.rpartition(".")
        if not (equals and dot and node and name):
            raise HostError(f"--set {assignment} is not of the form NODE.INPUT=VALUE")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        changed[node_named(changed, node)]["inputs"][name] = value
    return changed


def check_inputs(prompt: Prompt, object_info: Mapping[str, Any]) -> None:
    """Raises HostError for an input that its node does not have, which ComfyUI would ignore in silence."""
    for node_id, node in prompt.items():
        declared = object_info.get(node["class_type"], {}).get("input", {})
        names = {name for kind in ("required", "optional") for name in declared.get(kind, {})}
        unknown = sorted(name for name in node["inputs"] if name.split(".")[0] not in names)
        if declared and unknown:
            has = ", ".join(sorted(names))
            raise HostError(f"node {node_id} ({node['class_type']}) has no input {', '.join(unknown)}; it has {has}")
