"""ComfyUI's page in a headless browser: opening it, building and reading graphs, pressing Run.

Used by the page's tests and by the scripts that make workflows, thumbnails and screenshots. Needs Playwright.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HostError
from .server import ComfyServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

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
VIEWPORT = (1500, 850)


@contextmanager
def running_browser(executable: Path) -> Iterator[Browser]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(executable), args=BROWSER_FLAGS)
        yield browser
        browser.close()


def open_page(
    browser: Browser,
    server: ComfyServer,
    query: str = "",
    *,
    viewport: tuple[int, int] = VIEWPORT,
    settings: dict[str, Any] | None = None,
) -> Page:
    """Returns ComfyUI's page, ready, with this pack's nodes known.

    query: of the address, such as `?template=NAME&source=PACK`. settings: of ComfyUI, beside SETTINGS.
    """
    file = server.base / "user" / "default" / "comfy.settings.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**SETTINGS, **(settings or {})}), encoding="utf-8")
    page = browser.new_page(viewport={"width": viewport[0], "height": viewport[1]})
    page.set_default_timeout(PAGE_TIMEOUT_MS)
    page.goto(f"{server.url}/{query}", wait_until="domcontentloaded")
    # `!!`: the last value is a class, which must not be handed to Python.
    page.wait_for_function(
        "!!(window.app && app.vueAppReady && app.graph && LiteGraph.registered_node_types.TADSRUpscale)"
    )
    return page


def load_graph(page: Page, workflow: dict[str, Any]) -> None:
    """Opens a workflow as a file dropped on the page would be."""
    page.evaluate("async workflow => { await app.loadGraphData(workflow); }", workflow)
    page.wait_for_function("count => app.graph._nodes.length === count", arg=len(workflow["nodes"]))


def to_prompt(page: Page) -> dict[str, Any]:
    """Returns the open workflow as the page itself sends it to the HTTP API."""
    return page.evaluate("async () => (await app.graphToPrompt()).output")


def press_run(page: Page, timeout_ms: int = RUN_TIMEOUT_MS) -> None:
    """Presses Run and waits until the workflow has run. Raises HostError with ComfyUI's words where it fails."""
    page.evaluate(
        """() => { window.ended = [];
        if (window.listening) return;
        window.listening = true;
        for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
            app.api.addEventListener(kind, event => ended.push([kind, event.detail.exception_message])); }"""
    )
    page.get_by_test_id("queue-button").first.click()
    page.wait_for_function("ended.length > 0", timeout=timeout_ms)
    kind, message = page.evaluate("ended[0]")
    if kind != "execution_success":
        raise HostError(f"{kind}: {message}")


def outputs_of(page: Page, node_id: int) -> dict[str, Any]:
    """Returns what a node has shown on the page: images and the like."""
    page.wait_for_function("id => !!app.nodeOutputs[String(id)]", arg=node_id)
    return page.evaluate("id => app.nodeOutputs[String(id)]", node_id)


def found_by_search(page: Page, words: str) -> list[str]:
    """Returns the ids of the nodes that the page's node search lists for these words, in its order."""
    return page.evaluate(
        """words => document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s.get('nodeDef')
        .nodeSearchService.searchNode(words, [], {limit: 64}).map(node => node.name)""",
        words,
    )
