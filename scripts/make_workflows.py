"""Makes the shipped workflows, their API twins and the thumbnails: `python scripts/make_workflows.py [NAME ...]`.

Each is built in ComfyUI's real page from its description in `scripts/workflows.py`, saved, run, and its thumbnail made
of what it gave. Needs the environment of `python runtests.py`: run it with that environment's Python.
"""

from __future__ import annotations

import io
import json
import re
import sys
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from host.browser import find_browser
from host.comfyui import fetch_comfyui
from host.page import open_page, press_run, running_browser, to_prompt
from host.server import PACK, ComfyServer
from scripts.template_thumbnail import before_after, fitted
from scripts.workflows import WORKFLOWS, Workflow

if TYPE_CHECKING:
    from playwright.sync_api import Page

FOLDER = PACK / "example_workflows"
NAMESPACE = uuid.UUID("6f1f4c1e-6f0b-4d0e-9b53-7a0c5a6de001")
THUMBNAIL_QUALITY = 88
CORE, REGISTRY_ID = "comfy-core", "tadsr"

BUILD = """async workflow => {
  await app.loadGraphData({nodes: [], links: [], groups: [], version: 0.4, last_node_id: 0, last_link_id: 0,
                           config: {}, extra: {}});
  const made = {};
  for (const [name, wanted] of Object.entries(workflow.nodes)) {
    const node = LiteGraph.createNode(wanted.type);
    if (!node) throw new Error(`the page knows no node ${wanted.type}`);
    app.graph.add(node);
    node.pos = wanted.at;
    if (wanted.title) node.title = wanted.title;
    for (const [key, value] of Object.entries(wanted.values)) {
      const widget = (node.widgets ?? []).find(widget => widget.name === key);
      if (!widget) throw new Error(`${wanted.type} has no widget ${key}`);
      widget.value = value;
      widget.callback?.(value);
    }
    node.setSize(wanted.size ?? node.computeSize());
    Object.assign(node.properties, wanted.properties);
    if (wanted.bypassed) node.mode = 4;
    made[name] = node;
  }
  for (const [name, wanted] of Object.entries(workflow.nodes))
    for (const [input, [from, output]] of Object.entries(wanted.inputs)) {
      const source = made[from].outputs.findIndex(slot => slot.name === output);
      const target = made[name].inputs.findIndex(slot => slot.name === input);
      if (source < 0) throw new Error(`${from} has no output ${output}`);
      if (target < 0) throw new Error(`${name} has no input ${input}`);
      made[from].connect(source, made[name], target);
    }
  Object.assign(app.graph.extra, workflow.extra);
  return JSON.stringify(app.graph.serialize());
}"""


def pack_version() -> str:
    """Returns the version in pyproject.toml."""
    match = re.search(r'^version = "([^"]+)"', (PACK / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None, "pyproject.toml states a version"
    return match.group(1)


def finished(built: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns a workflow as it is shipped: the same bytes from each build, each node with the pack it comes from."""
    built["id"] = str(uuid.uuid5(NAMESPACE, name))
    built["extra"] = {key: value for key, value in built["extra"].items() if key not in ("ds", "frontendVersion")}
    for node in built["nodes"]:
        ours = node["type"].startswith("TADSR")
        node["properties"]["cnr_id"] = REGISTRY_ID if ours else CORE
        if ours:
            node["properties"]["ver"] = pack_version()
        node["pos"] = [round(number) for number in node["pos"]]
        node["size"] = [round(number) for number in node["size"]]
    return built


def build(page: Page, name: str, workflow: Workflow) -> dict[str, Any]:
    """Builds the workflow in the page and returns it; it stays open there."""
    return finished(json.loads(page.evaluate(BUILD, asdict(workflow))), name)


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON as people read it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def thumbnail(page: Page, server: ComfyServer, workflow: Workflow) -> Image.Image:
    """Returns the thumbnail of the open workflow; runs it where it shows a result."""
    if workflow.thumbnail == "graph":
        page.wait_for_timeout(1000)
        return fitted(Image.open(io.BytesIO(page.screenshot(clip={"x": 60, "y": 40, "width": 1380, "height": 800}))))
    press_run(page)
    ids = {key: index + 1 for index, key in enumerate(workflow.nodes)}
    page.wait_for_function("id => !!(app.nodeOutputs[String(id)] || {}).images", arg=ids[workflow.after])
    shown = page.evaluate("id => app.nodeOutputs[String(id)].images", ids[workflow.after])
    pictures = [Image.open(io.BytesIO(server.view(item))) for item in shown]
    if workflow.thumbnail == "last":
        return fitted(pictures[-1])
    return before_after(Image.open(PACK / "assets" / "sample.jpg"), pictures[0])


def main(names: list[str]) -> None:
    """Makes the workflows of these names, or all."""
    browser_path = find_browser()
    if browser_path is None:
        raise SystemExit("No Chromium, Chrome or Edge was found.")
    with ComfyServer(fetch_comfyui()) as server, running_browser(browser_path) as browser:
        page = open_page(browser, server)
        for name in names or WORKFLOWS:
            workflow = WORKFLOWS[name]
            write(FOLDER / f"{name}.json", build(page, name, workflow))
            write(FOLDER / "api" / f"{name}.json", to_prompt(page))
            thumbnail(page, server, workflow).save(FOLDER / f"{name}.jpg", quality=THUMBNAIL_QUALITY)
            print(name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
