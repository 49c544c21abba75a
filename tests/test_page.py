"""The shipped workflow in ComfyUI's real page, in headless Chromium: open the template, press Run, see the picture."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from host.browser import BROWSER_VARIABLE, find_browser
from host.cache import cache_directory
from host.server import PACK_NAME, ComfyServer

TEMPLATE = "tadsr_upscale"
# No first-run dialogs; a page that starts empty instead of with the last workflow.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.Persist": False,
    "Comfy.Notification.ShowVersionUpdates": False,
}
# A browser that a root user may start without a display, and that asks nothing of the network by itself.
BROWSER_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PAGE_TIMEOUT_MS = 120_000
RUN_TIMEOUT_MS = 300_000


@pytest.fixture(scope="module")
def browser_path() -> Path:
    path = find_browser()
    if path is not None:
        return path
    reason = f"no Chromium, Chrome or Edge was found; install one, or name one with {BROWSER_VARIABLE}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def picture(comfy_server: ComfyServer, photo: Path) -> str:
    """The name of a small picture in ComfyUI's input folder, there before the page asks what is in it."""
    content = io.BytesIO()
    Image.open(photo).crop((0, 0, 64, 48)).save(content, "PNG")
    return comfy_server.upload(content.getvalue(), "on-the-page.png")


@pytest.fixture
def page(browser_path: Path, comfy_server: ComfyServer, picture: str) -> Iterator[Page]:
    """ComfyUI's page with the shipped template opened by its address, as quickstart.py prints it."""
    settings = comfy_server.base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(SETTINGS))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(browser_path), args=BROWSER_FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 850})
        page.set_default_timeout(PAGE_TIMEOUT_MS)
        page.goto(f"{comfy_server.url}/?template={TEMPLATE}&source={PACK_NAME}", wait_until="domcontentloaded")
        # `!!`: the last value is a class, which must not be handed to Python.
        page.wait_for_function(
            "!!(window.app && app.vueAppReady && app.graph && LiteGraph.registered_node_types.TADSRUpscale)"
        )
        yield page
        browser.close()


def shipped(repository: Path) -> dict[str, Any]:
    return json.loads((repository / "workflows" / f"{TEMPLATE}.json").read_text(encoding="utf-8"))


def wait_for_template(page: Page, workflow: dict[str, Any]) -> None:
    page.wait_for_function("count => app.graph._nodes.length === count", arg=len(workflow["nodes"]))


def test_template_opens_with_every_node_known(page: Page, repository: Path) -> None:
    workflow = shipped(repository)
    wait_for_template(page, workflow)
    types = sorted(node["type"] for node in workflow["nodes"])
    assert page.evaluate("app.graph._nodes.map(node => node.type).sort()") == types
    assert page.evaluate("app.graph._nodes.filter(node => node.has_errors).map(node => node.type)") == []
    unknown = page.evaluate("types => types.filter(type => !LiteGraph.registered_node_types[type])", types)
    assert unknown == [], "the page does not know these nodes"
    assert "Missing" not in page.locator("body").inner_text()


def test_template_means_what_the_api_workflow_says(page: Page, repository: Path) -> None:
    """The page's own conversion of the template gives the nodes, links and values of workflows/api/upscale.json."""
    wait_for_template(page, shipped(repository))
    converted = page.evaluate("async () => (await app.graphToPrompt()).output")
    expected = json.loads((repository / "workflows" / "api" / "upscale.json").read_text(encoding="utf-8"))
    assert {key: node["class_type"] for key, node in converted.items()} == {
        key: node["class_type"] for key, node in expected.items()
    }
    for key, node in expected.items():
        for name, value in node["inputs"].items():
            # The example picture that ComfyUI ships is large: the template enlarges it less.
            wanted = 2 if name == "scale" else value
            assert converted[key]["inputs"][name] == wanted, f"{node['class_type']}.{name}"


def test_run_button_makes_the_picture_and_shows_it(
    page: Page, comfy_server: ComfyServer, repository: Path, picture: str
) -> None:
    wait_for_template(page, shipped(repository))
    choose_picture(page, picture)
    press_run(page)
    page.wait_for_function("!!(app.nodeOutputs['4'] || {}).images")
    (image,) = page.evaluate("app.nodeOutputs['4'].images")
    assert Image.open(io.BytesIO(comfy_server.view(image))).size == (128, 96)
    page.wait_for_function("(app.graph.getNodeById(4).imgs || []).some(img => img.naturalWidth === 128)")
    assert page.evaluate("app.graph._nodes.filter(node => node.has_errors).map(node => node.type)") == []
    page.screenshot(path=str(cache_directory() / "page.png"))


def test_an_estimate_is_shown_on_its_node(page: Page, repository: Path, picture: str) -> None:
    """As a user does who adds the node to the template and connects it to the loader and the picture."""
    wait_for_template(page, shipped(repository))
    choose_picture(page, picture)
    page.evaluate(
        """() => { const estimate = LiteGraph.createNode('TADSREstimate');
        app.graph.add(estimate);
        estimate.pos = [400, 60];
        const upscale = app.graph._nodes.find(node => node.type === 'TADSRUpscale');
        for (const name of ['model', 'encoder', 'vae', 'image']) {
            const link = app.graph.links.get(upscale.inputs.find(input => input.name === name).link);
            app.graph.getNodeById(link.origin_id).connect(link.origin_slot, estimate,
                estimate.inputs.findIndex(input => input.name === name));
        } }"""
    )
    press_run(page)
    shown = """() => app.graph._nodes.find(node => node.type === 'TADSREstimate').widgets
        .map(widget => String(widget.value)).find(text => text.includes('256x192'))"""
    page.wait_for_function(shown)
    text = page.evaluate(shown)
    assert "MB" in text and "second" in text, text
    page.screenshot(path=str(cache_directory() / "page-estimate.png"))


def press_run(page: Page) -> None:
    """Presses Run and waits until the workflow has run without an error."""
    page.evaluate(
        """() => { window.ended = [];
        for (const kind of ['execution_success', 'execution_error'])
            app.api.addEventListener(kind, event => ended.push([kind, event.detail.exception_message])); }"""
    )
    page.get_by_test_id("queue-button").first.click()
    page.wait_for_function("ended.length > 0", timeout=RUN_TIMEOUT_MS)
    assert page.evaluate("ended[0]")[0] == "execution_success", page.evaluate("ended[0]")


def choose_picture(page: Page, name: str) -> None:
    """Chooses an uploaded picture in the LoadImage node, as its drop-down does."""
    page.evaluate(
        """name => { const widget = app.graph.getNodeById(1).widgets.find(widget => widget.name === 'image');
        widget.value = name; if (widget.callback) widget.callback(name); }""",
        name,
    )
