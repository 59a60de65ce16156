"""The page in a real browser, as a user has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flexvar.image_io import read_settings

pytestmark = pytest.mark.browser

# Counts the steps that are shown, from before the button is pressed.
WATCH = """() => {
    window.steps = new Set();
    const look = () => document.querySelectorAll('.stage[data-step]').forEach(e => window.steps.add(e.dataset.step));
    new MutationObserver(look).observe(document.body, {childList: true, subtree: true, attributes: true});
}"""


def test_generates_step_by_step(page: Any, tmp_path: Path, screenshot: Callable[[str], None]) -> None:
    page.evaluate(WATCH)
    page.get_by_label("Class").fill("sta")  # the search
    page.get_by_role("option", name="star").click()
    page.get_by_role("button", name="Generate").click()
    page.locator(".stage.done").wait_for()
    assert len(page.evaluate("[...window.steps]")) > 2  # previews on the way
    with page.expect_download() as download:
        page.locator(".files a").first.click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    settings = read_settings(path)
    assert (settings["class_labels"], settings["model"]) == (["star"], "demo")
    command = page.locator(".command textarea").input_value()
    assert command.startswith("flexvar generate star --height 64")
    assert f"--seed {settings['seed']} " in command
    page.locator("#gallery img").first.wait_for()
    screenshot("generate")
