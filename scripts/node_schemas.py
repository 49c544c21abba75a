"""Writes what saved workflows and translations rely on: `python scripts/node_schemas.py`.

`tests/node_contract.json` has every node id with its inputs, types, defaults, choices and outputs. It only grows: what
is gone or changed is refused, as saved workflows would break. `locales/en/nodeDefs.json` has every word that the page
shows of a node; the other languages translate it. Needs the environment of `python runtests.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from host.comfyui import fetch_comfyui
from host.server import PACK, ComfyServer

CONTRACT = PACK / "tests" / "node_contract.json"
LOCALES = PACK / "locales"
ENGLISH = LOCALES / "en" / "nodeDefs.json"
OURS = "TADSR"
Schemas = dict[str, dict[str, Any]]  # as ComfyUI's /object_info gives them


def inputs_of(schema: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns each input's type and options, in the order of the page's widgets."""
    declared = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}
    return {name: (kind, more[0] if more else {}) for name, (kind, *more) in declared.items()}


def contract(schemas: Schemas) -> Schemas:
    """Returns what a saved workflow relies on, of our nodes among `schemas`."""
    return {
        node: {
            "inputs": {
                name: {"type": kind, **{key: more[key] for key in ("default", "options") if key in more}}
                for name, (kind, more) in inputs_of(schema).items()
            },
            "required": list(schema["input"].get("required", {})),
            "outputs": schema["output"],
        }
        for node, schema in sorted(schemas.items())
        if node.startswith(OURS)
    }


def broken(promised: Schemas, now: Schemas) -> list[str]:
    """Returns what `promised` has and `now` has not, one sentence each: saved workflows that use it would break."""
    found = []
    for node, was in promised.items():
        if node not in now:
            found.append(f"the node {node} is gone")
            continue
        found += [f"{node}: {fault}" for fault in _broken_node(was, now[node])]
    return found


def _broken_node(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = list(was["inputs"])
    found = [f"the input {name} is gone" for name in names if name not in now["inputs"]]
    if not found and list(now["inputs"])[: len(names)] != names:
        found.append(f"the inputs begin {list(now['inputs'])[: len(names)]}, and values are saved by place: {names}")
    for name in set(names) & set(now["inputs"]):
        before, after = was["inputs"][name], now["inputs"][name]
        found += [
            f"{name}'s {key} is {after.get(key)!r}, was {before.get(key)!r}"
            for key in ("type", "default")
            if before.get(key) != after.get(key)
        ]
        gone = [choice for choice in before.get("options", []) if choice not in after.get("options", [])]
        found += [f"{name} has no choice {choice!r} any more" for choice in gone]
    found += [f"the input {name} is now required" for name in now["required"] if name not in was["required"]]
    if now["outputs"][: len(was["outputs"])] != was["outputs"]:
        found.append(f"the outputs are {now['outputs']}, were {was['outputs']}")
    return found


def words(schemas: Schemas) -> Schemas:
    """Returns every word that the page shows of our nodes, in the format of `locales/LANGUAGE/nodeDefs.json`."""
    return {node: _words_of(schema) for node, schema in sorted(schemas.items()) if node.startswith(OURS)}


def _words_of(schema: dict[str, Any]) -> dict[str, Any]:
    inputs = {
        name: {"name": more.get("display_name") or name, "tooltip": more["tooltip"]}
        for name, (_, more) in inputs_of(schema).items()
    }
    outputs = {
        str(place): {"name": name, "tooltip": tooltip}
        for place, (name, tooltip) in enumerate(zip(schema["output_name"], schema["output_tooltips"], strict=True))
    }
    names = {"display_name": schema["display_name"], "description": schema["description"]}
    return {**names, "inputs": inputs, "outputs": outputs}


def write(path: Path, content: Schemas) -> None:
    """Writes JSON as people read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Writes both files from the schemas that a real ComfyUI has of this pack."""
    with ComfyServer(fetch_comfyui()) as server:
        schemas = server.object_info()
    now = contract(schemas)
    faults = broken(json.loads(CONTRACT.read_text(encoding="utf-8")), now) if CONTRACT.exists() else []
    if faults:
        raise SystemExit("Saved workflows would break:\n" + "\n".join(faults))
    write(CONTRACT, now)
    write(ENGLISH, words(schemas))


if __name__ == "__main__":
    main()
