"""The page of the demo model, served by this process, and a browser that may speak to nothing else."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from flexvar import FlexVARPipeline
from flexvar.web.limits import Limits
from flexvar.web.privacy import forbid_telemetry

_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="session")
def site() -> Iterator[Any]:
    """The running page: ``local_url`` is its address, ``studio`` what draws. Fails if it looks for another host."""
    forbid_telemetry()
    from flexvar.web.server import serve
    from flexvar.web.studio import Studio

    studio = Studio(
        FlexVARPipeline.from_pretrained("demo"), "demo", Limits(max_pixels=1 << 17, max_upload_bytes=1 << 20)
    )
    hosts: set[Any] = set()

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo":
            hosts.add(arguments[0])
        elif event == "socket.connect" and isinstance(arguments[1], tuple):
            hosts.add(arguments[1][0])

    sys.addaudithook(look)
    app = serve(studio, block=False)
    app.studio = studio
    yield app
    app.close()
    assert hosts <= {"127.0.0.1", b"127.0.0.1", "localhost", "::1"}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=_FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(params=[1280])
def page(request: pytest.FixtureRequest, site: Any, browser: Any) -> Iterator[Any]:
    """The page at desktop width; fails if it asks any other host for anything, or if its scripts fail."""
    viewport = {"width": request.param, "height": 900}
    context = browser.new_context(viewport=viewport, has_touch=request.param < 700, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(30_000)
    requests: list[str] = []
    errors: list[str] = []
    context.on("request", lambda request: requests.append(request.url))
    page.on("websocket", lambda socket: requests.append(socket.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(site.local_url)
    page.get_by_role("tab", name="Generate").wait_for()
    yield page
    context.close()
    elsewhere = [url for url in requests if urlsplit(url).scheme not in ("data", "blob")]
    assert elsewhere, "the page was not loaded at all"
    assert {urlsplit(url).hostname for url in elsewhere} == {"127.0.0.1"}
    assert errors == []


@pytest.fixture
def screenshot(page: Any) -> Any:
    """Keeps a picture of what is seen of the page in the folder FLEXVAR_SCREENSHOTS, if that is set."""
    folder = os.environ.get("FLEXVAR_SCREENSHOTS")

    def screenshot(name: str) -> None:
        if folder:
            page.screenshot(path=Path(folder) / f"{name}.png", animations="disabled")

    return screenshot
