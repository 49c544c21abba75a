"""The shipped workflows in ComfyUI's real page, in headless Chromium: open each, press Run, see the picture."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from host.browser import BROWSER_VARIABLE, find_browser
from host.cache import cache_directory
from host.page import found_by_search, load_graph, open_page, outputs_of, press_run, running_browser, to_prompt
from host.server import PACK, PACK_NAME, ComfyServer
from host.workflow import load_workflow
from scripts.make_workflows import pack_version
from scripts.workflows import SAMPLE, WORKFLOWS

TEMPLATE = "super-resolution-upscale-photo"
FOLDER = PACK / "example_workflows"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.json"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless browser; without one the tests are skipped, but in CI they fail."""
    path = find_browser()
    if path is None:
        reason = f"no Chromium, Chrome or Edge was found; install one, or name one with {BROWSER_VARIABLE}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with running_browser(path) as running:
        yield running


@pytest.fixture(scope="module")
def page(browser: Browser, comfy_server: ComfyServer) -> Page:
    """ComfyUI's page with the first template opened by its address, as quickstart.py prints it."""
    page = open_page(browser, comfy_server, f"?template={TEMPLATE}&source={PACK_NAME}")
    page.wait_for_function("count => app.graph._nodes.length === count", arg=len(shipped(TEMPLATE)["nodes"]))
    return page


def shipped(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def node_id(name: str, key: str) -> int:
    return list(WORKFLOWS[name].nodes).index(key) + 1


def picture(server: ComfyServer, item: dict[str, str]) -> Image.Image:
    return Image.open(io.BytesIO(server.view(item)))


def test_every_workflow_has_a_description_a_twin_and_a_thumbnail() -> None:
    assert sorted(WORKFLOWS) == SHIPPED
    assert sorted(path.stem for path in (FOLDER / "api").glob("*.json")) == [*SHIPPED, "upscale"]
    assert sorted(path.stem for path in FOLDER.glob("*.jpg")) == SHIPPED
    for name in SHIPPED:
        assert name == name.lower() and name.replace("-", "").isalnum(), "an address can open it"
        with Image.open(FOLDER / f"{name}.jpg") as thumbnail:
            assert thumbnail.size == (512, 512)


@pytest.mark.parametrize("name", SHIPPED)
def test_nodes_say_which_pack_and_version_they_come_from(name: str) -> None:
    for node in shipped(name)["nodes"]:
        ours = node["type"].startswith("TADSR")
        assert node["properties"]["cnr_id"] == (PACK_NAME if ours else "comfy-core")
        if ours:
            assert node["properties"]["ver"] == pack_version(), "run scripts/make_workflows.py"


def test_the_first_template_runs_as_it_is(page: Page, comfy_server: ComfyServer) -> None:
    """The first five minutes: the template opens with a photograph that is there, and Run makes the picture."""
    assert (comfy_server.base / "input" / SAMPLE).is_file()
    assert "Missing" not in page.locator("body").inner_text()
    press_run(page)
    (image,) = outputs_of(page, node_id(TEMPLATE, "save"))["images"]
    assert picture(comfy_server, image).size == (960, 640)
    (sides,) = outputs_of(page, node_id(TEMPLATE, "preview"))["images"]
    assert picture(comfy_server, sides).height == 640 and picture(comfy_server, sides).width > 1900
    shown = "id => (app.graph.getNodeById(id).imgs || []).some(img => img.naturalWidth === 960)"
    page.wait_for_function(shown, arg=node_id(TEMPLATE, "save"))
    page.screenshot(path=str(cache_directory() / "page.png"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_workflow_opens_means_what_its_twin_says_and_runs(page: Page, comfy_server: ComfyServer, name: str) -> None:
    workflow = shipped(name)
    load_graph(page, workflow)
    types = {node["type"] for node in workflow["nodes"]}
    unknown = page.evaluate("types => types.filter(type => !LiteGraph.registered_node_types[type])", sorted(types))
    assert unknown == [], "the page does not know these nodes"
    twin = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert to_prompt(page) == twin, "the twin is stale: run scripts/make_workflows.py"
    if WORKFLOWS[name].runs_as_shipped:
        press_run(page)
        assert outputs_of(page, node_id(name, WORKFLOWS[name].after))["images"]
        assert page.evaluate("app.graph._nodes.filter(node => node.has_errors).map(node => node.type)") == []
        for key, node in WORKFLOWS[name].nodes.items():
            if node.type == "ImageCompare":
                shown = outputs_of(page, node_id(name, key))
                first, second = (picture(comfy_server, shown[f"{side}_images"][0]) for side in "ab")
                assert first.size == second.size and first.tobytes() != second.tobytes()


def test_the_plain_api_workflow_is_the_first_template_without_its_comparison() -> None:
    twin = json.loads((FOLDER / "api" / f"{TEMPLATE}.json").read_text(encoding="utf-8"))
    plain = load_workflow()
    for node in plain.values():
        (same,) = [other for other in twin.values() if other["class_type"] == node["class_type"]]
        links = {key for key, value in node["inputs"].items() if isinstance(value, list)}
        for key in node["inputs"].keys() - links - {"image"}:
            assert node["inputs"][key] == same["inputs"][key], f"{node['class_type']}.{key}"


def test_an_estimate_is_shown_on_its_node(page: Page) -> None:
    """As a user does who adds the node to the template and connects it to the loader and the picture."""
    load_graph(page, shipped(TEMPLATE))
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
        .map(widget => String(widget.value)).find(text => text.includes('960x640'))"""
    page.wait_for_function(shown)
    text = page.evaluate(shown)
    assert "MB" in text and "second" in text, text
    page.screenshot(path=str(cache_directory() / "page-estimate.png"))


def test_the_classic_page_hides_the_advanced_inputs_and_shows_them_on_wish(page: Page) -> None:
    load_graph(page, shipped(TEMPLATE))
    shown = """() => { const node = app.graph._nodes.find(node => node.type === 'TADSRUpscale');
        return node.widgets.filter(widget => node.isWidgetVisible(widget)).map(widget => widget.name); }"""
    assert page.evaluate(shown) == ["timestep", "scale", "color_match"]
    page.evaluate("app.graph._nodes.find(node => node.type === 'TADSRUpscale').toggleAdvanced()")
    assert {"seed", "tile", "preview_size"} < set(page.evaluate(shown))


# "tadsr" and "sr" find all nodes of the pack, but the page orders those by the length of their ids.
WORDS = ("4x", "2x", "upscaler", "upscale", "deblur", "denoise", "sharpen", "photo restoration", "super resolution")


@pytest.mark.parametrize("words", WORDS)
def test_the_node_search_finds_the_all_in_one_node_first_of_ours(page: Page, words: str) -> None:
    ours = [name for name in found_by_search(page, words) if name.startswith("TADSR")]
    assert ours[:1] == ["TADSRUpscale"], ours


@pytest.mark.parametrize("words", ["tadsr", "sr"])
def test_the_pack_s_own_name_finds_all_its_nodes(page: Page, words: str) -> None:
    assert {"TADSRUpscale", "TADSRModelLoader"} <= set(found_by_search(page, words))


@pytest.mark.parametrize("words", ["super resolution", "upscale", "tadsr"])
def test_the_template_search_finds_ours(page: Page, words: str) -> None:
    """In the dialog itself, which filters by name, title, description and pack."""
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    search = page.get_by_placeholder("Search").first
    search.fill(words)
    page.get_by_text(TEMPLATE, exact=True).first.wait_for()
    page.screenshot(path=str(cache_directory() / "page-templates.png"))
    page.keyboard.press("Escape")
