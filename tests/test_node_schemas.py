"""What saved workflows and translations rely on: ids, inputs, types, defaults and words of the nodes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from host.server import ComfyServer
from scripts.node_schemas import CONTRACT, ENGLISH, OURS, Schemas, broken, contract, inputs_of, words


@pytest.fixture(scope="module")
def schemas(comfy_server: ComfyServer) -> Schemas:
    return comfy_server.object_info()


@pytest.fixture
def promised() -> Schemas:
    return json.loads(CONTRACT.read_text(encoding="utf-8"))


def test_saved_workflows_keep_working(schemas: Schemas, promised: Schemas) -> None:
    """An id may go only where a NodeReplace leads to another and CHANGELOG tells it; then take it from the file."""
    assert broken(promised, contract(schemas)) == []


def test_the_contract_has_every_node_and_input(schemas: Schemas, promised: Schemas) -> None:
    now = contract(schemas)
    assert {node: list(one["inputs"]) for node, one in now.items()} == {
        node: list(one["inputs"]) for node, one in promised.items()
    }, "run scripts/node_schemas.py"


def rename(node: dict[str, Any]) -> None:
    node["inputs"] = {("dial" if name == "timestep" else name): more for name, more in node["inputs"].items()}


def swap(node: dict[str, Any]) -> None:
    node["inputs"] = dict(reversed(node["inputs"].items()))


CHANGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (rename, "the input timestep is gone"),
    (swap, "values are saved by place"),
    (lambda node: node["inputs"]["scale"].update(type="INT"), "scale's type is 'INT', was 'FLOAT'"),
    (lambda node: node["inputs"]["timestep"].update(default=501), "timestep's default is 501, was 500"),
    (lambda node: node["inputs"]["color_match"]["options"].remove("wavelet"), "no choice 'wavelet' any more"),
    (lambda node: node["required"].append("tile"), "the input tile is now required"),
    (lambda node: node.update(outputs=["LATENT"]), "the outputs are ['LATENT'], were ['IMAGE']"),
]


@pytest.mark.parametrize(("change", "sentence"), CHANGES)
def test_a_change_that_breaks_saved_workflows_is_told(
    change: Callable[[dict[str, Any]], Any], sentence: str, promised: Schemas
) -> None:
    now = copy.deepcopy(promised)
    change(now["TADSRUpscale"])
    (fault,) = broken(promised, now)
    assert fault.startswith("TADSRUpscale: ") and sentence in fault


def test_a_node_that_goes_is_told_and_one_that_comes_is_welcome(promised: Schemas) -> None:
    more = {**promised, "TADSRNew": {"inputs": {}, "required": [], "outputs": []}}
    assert broken(promised, more) == []
    assert broken(more, promised) == ["the node TADSRNew is gone"]


def test_every_socket_and_widget_has_a_tooltip(schemas: Schemas) -> None:
    bare = []
    for node, schema in schemas.items():
        if node.startswith(OURS):
            bare += [f"{node}.{name}" for name, (_, more) in inputs_of(schema).items() if not more.get("tooltip")]
            bare += [f"{node}: output {place}" for place, text in enumerate(schema["output_tooltips"]) if not text]
    assert bare == []


def test_the_english_words_are_those_of_the_schemas(schemas: Schemas) -> None:
    assert json.loads(ENGLISH.read_text(encoding="utf-8")) == words(schemas), "run scripts/node_schemas.py"


def test_every_node_has_a_help_page_that_names_its_inputs(schemas: Schemas, repository: Path) -> None:
    for node, schema in schemas.items():
        if node.startswith(OURS):
            text = (repository / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
            named = set(re.findall(r"[a-z_0-9]+", text))
            assert set(inputs_of(schema)) <= named, f"{node}.md lacks {set(inputs_of(schema)) - named}"
