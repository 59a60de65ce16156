"""The page in a real browser, as a user has it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flexvar import commands
from flexvar.image_io import open_image, open_mask, read_settings
from PIL import Image, ImageDraw

pytestmark = pytest.mark.browser

# Counts the steps that are shown, from before the button is pressed.
WATCH = """() => {
    window.steps = new Set();
    const look = () => document.querySelectorAll('.stage[data-step]').forEach(e => window.steps.add(e.dataset.step));
    new MutationObserver(look).observe(document.body, {childList: true, subtree: true, attributes: true});
}"""


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """64 x 48, a disc."""
    image = Image.new("RGB", (64, 48), "teal")
    ImageDraw.Draw(image).ellipse((16, 8, 48, 40), fill="orange")
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def open_tab(page: Any, title: str, photo: Path | None = None) -> Any:
    """The panel of a tab, once the photo is shown there."""
    page.get_by_role("tab", name=title).click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    if photo is not None:
        panel.locator("input[type=file]").first.set_input_files(photo)
        panel.locator(".shown img, .painter.filled canvas").first.wait_for()
    return panel


def download_all(page: Any, panel: Any, folder: Path) -> list[Path]:
    """The files of the panel, in a folder."""
    folder.mkdir()
    paths = []
    for link in panel.locator(".files a[download]").all():
        with page.expect_download() as download:
            link.click()
        paths.append(folder / download.value.suggested_filename)
        download.value.save_as(paths[-1])
    return paths


def paint(page: Any, canvas: Any, *points: tuple[float, float]) -> None:
    """A stroke of the brush; points are parts of the canvas's width and height."""
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for number, (x, y) in enumerate(points):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def toast(page: Any, text: str) -> None:
    """Waits for a message of the page that holds the text."""
    page.get_by_test_id("toast-body").filter(has_text=re.compile(text)).first.wait_for()


def test_generates_step_by_step(page: Any, tmp_path: Path) -> None:
    page.evaluate(WATCH)
    page.get_by_label("Class").first.fill("sta")  # the search
    page.get_by_role("option", name="star").click()
    panel = open_tab(page, "Generate")
    panel.get_by_role("button", name="Generate").click()
    panel.locator(".stage.done").wait_for()
    assert len(page.evaluate("[...window.steps]")) > 2  # previews on the way
    (path,) = download_all(page, panel, tmp_path / "downloads")
    settings = read_settings(path)
    assert (settings["class_labels"], settings["model"]) == (["star"], "demo")
    command = panel.locator(".command textarea").input_value()
    assert command.startswith("flexvar generate star --height 64 --width 64")
    assert f"--seed {settings['seed']} " in command
    page.locator("#gallery img").first.wait_for()


def test_paints_a_mask_and_in_paints(page: Any, photo: Path, tmp_path: Path) -> None:
    panel = open_tab(page, "In-paint", photo)
    stroke = partial(paint, page, panel.locator("canvas"))
    stroke((0.05, 0.05), (0.15, 0.05))
    stroke((0.6, 0.5), (0.8, 0.5), (0.8, 0.8))
    panel.get_by_role("button", name="Undo").click()
    panel.get_by_role("button", name="Undo").click()
    assert panel.get_by_role("button", name="Undo").is_disabled()
    stroke((0.6, 0.5), (0.8, 0.5), (0.8, 0.8))
    panel.get_by_text("Clear", exact=True).click()
    assert panel.get_by_text("Clear", exact=True).is_disabled()
    panel.get_by_role("button", name="Undo").click()
    panel.get_by_role("button", name="Paint anew").click()
    panel.locator(".stage.done .compare").wait_for()

    result, source, mask = download_all(page, panel, tmp_path / "downloads")
    assert source.read_bytes() == photo.read_bytes()
    painted = np.asarray(open_mask(mask).resize((64, 48), Image.Resampling.BOX))
    assert painted[24, 45] == 255
    assert painted[2, 6] == 0  # undone
    before, after = np.asarray(open_image(source)), np.asarray(open_image(result))
    assert (before == after)[painted == 0].all()
    assert not (before == after)[painted == 255].all()
    assert commands.rerun(result, None, image=None, mask=None, device=None)


def test_mask_from_a_file(page: Any, photo: Path, tmp_path: Path) -> None:
    mask = Image.new("L", (32, 24))
    mask.paste(255, (0, 0, 16, 24))
    mask.save(tmp_path / "left.png")
    (tmp_path / "bad.png").write_text("no picture")
    panel = open_tab(page, "In-paint", photo)
    panel.get_by_role("button", name="Paint anew").click()
    toast(page, "mask must be painted first")
    panel.get_by_label("Mask file").set_input_files(tmp_path / "bad.png")
    panel.locator(".problem").filter(has_text="bad.png is not a picture").wait_for()
    panel.get_by_label("Mask file").set_input_files(tmp_path / "left.png")
    panel.locator(".undo:enabled").wait_for()
    panel.get_by_role("button", name="Paint anew").click()
    panel.locator(".stage.done").wait_for()
    result, source, _ = download_all(page, panel, tmp_path / "downloads")
    same = (np.asarray(open_image(source)) == np.asarray(open_image(result))).all(2)
    assert same[:, 33:].all()
    assert not same[:, :31].all()


@pytest.mark.parametrize(
    ("title", "fields", "size"),
    [
        ("Extend", {"Left": 8, "Right": 0, "Bottom": 20}, (72, 68)),
        ("Expand", {"Width": 96, "Height": 48}, (96, 48)),
        ("Refine", {"Width": 96, "Height": 72}, (96, 72)),
    ],
)
def test_larger_pictures(
    page: Any,
    photo: Path,
    tmp_path: Path,
    title: str,
    fields: dict[str, int],
    size: tuple[int, int],
) -> None:
    panel = open_tab(page, title, photo)
    for label, value in fields.items():
        panel.get_by_label(label, exact=True).fill(str(value))
    panel.get_by_role("button", name=title, exact=True).click()
    panel.locator(".stage.done .compare").wait_for()
    result, _ = download_all(page, panel, tmp_path / "downloads")
    assert open_image(result).size == size
    assert commands.rerun(result, None, image=None, mask=None, device=None)


def test_a_picture_of_the_session_goes_on(page: Any, tmp_path: Path) -> None:
    panel = open_tab(page, "Generate")
    panel.get_by_label("Images").fill("2")
    panel.get_by_role("button", name="Generate").click()
    page.locator("#gallery img").nth(1).wait_for()
    drawn = download_all(page, panel, tmp_path / "generated")
    page.get_by_role("button", name="Reconstruct it").click()  # the first
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.locator(".shown img").wait_for()
    panel.get_by_role("button", name="Reconstruct", exact=True).click()
    panel.locator(".stage.done .compare").wait_for()
    sheet, source = download_all(page, panel, tmp_path / "reconstructed")
    assert source.read_bytes() == drawn[0].read_bytes()
    assert sheet.name == "flexvar-reconstruct.png"
    page.locator("#gallery button img").nth(1).click()  # the second
    page.locator("#gallery .preview").wait_for()
    page.get_by_role("button", name="Refine it").click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.locator(".shown img").wait_for()
    panel.get_by_role("button", name="Refine", exact=True).click()
    panel.locator(".stage.done .compare").wait_for()
    refined, source = download_all(page, panel, tmp_path / "refined")
    assert source.read_bytes() == drawn[1].read_bytes()
    assert commands.rerun(refined, None, image=None, mask=None, device=None)


def test_cancel_stops_at_the_next_step(page: Any, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    stopped = threading.Event()
    draw = site.studio.draw

    def watched(*arguments: Any) -> Iterator[Any]:
        try:
            for shown in draw(*arguments):
                steps.append(shown.step)
                yield shown
        finally:
            stopped.set()

    monkeypatch.setattr(site.studio, "draw", watched)
    panel = open_tab(page, "Generate")
    panel.get_by_label("Width").fill("256")
    panel.get_by_label("Height").fill("256")
    panel.get_by_label("Images").fill("2")
    panel.get_by_label("Steps").fill("40")
    panel.get_by_role("button", name="Generate").click()
    panel.locator(".stage.running").wait_for()
    panel.get_by_role("button", name="Cancel").click()
    panel.locator("[data-cancelled] > .stage.running").wait_for()
    assert stopped.wait(30)
    assert steps[-1] < 39
    monkeypatch.undo()
    panel.get_by_label("Width").fill("32")
    panel.get_by_label("Height").fill("32")
    panel.get_by_label("Steps").fill("3")
    panel.get_by_role("button", name="Generate").click()
    panel.locator(".stage.done").wait_for()


def test_bad_input_is_a_clear_message(page: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    panel = open_tab(page, "Refine")
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "bad.png")
    toast(page, "must be a picture that Pillow reads")
    panel.get_by_role("button", name="Refine", exact=True).click()
    toast(page, "must be a picture that Pillow reads")
    assert "/" not in page.get_by_test_id("toast-body").first.inner_text()  # no folder of the server's
    (tmp_path / "large.png").write_bytes(bytes(2 << 20))
    panel = open_tab(page, "Expand")
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "large.png")
    toast(page, "size")
    panel.get_by_role("button", name="Expand", exact=True).click()
    toast(page, "picture must be chosen first")
    panel = open_tab(page, "Generate")
    panel.get_by_label("Width").fill("100000")
    panel.get_by_role("button", name="Generate").click()
    toast(page, "at most 131072 pixels together")


def test_desktop(page: Any, screenshot: Callable[[str], None]) -> None:
    panel = open_tab(page, "Generate")
    panel.get_by_label("Class").fill("sta")
    page.get_by_role("option", name="star").click()
    panel.get_by_label("Images").fill("4")
    panel.get_by_label("New seed every time").uncheck()
    panel.get_by_label("Seed", exact=True).fill("4")
    panel.get_by_role("button", name="Generate").click()
    panel.locator(".stage.done").wait_for()
    page.locator("#gallery img").nth(3).wait_for()
    screenshot("web-desktop")


@pytest.mark.parametrize("page", [390], indirect=True)
def test_phone(page: Any, site: Any, tmp_path: Path, screenshot: Callable[[str], None]) -> None:
    site.studio.pipe("star", seed=4).images[0].save(tmp_path / "star.png")
    panel = open_tab(page, "In-paint", tmp_path / "star.png")
    paint(page, panel.locator("canvas"), (0.3, 0.3), (0.5, 0.4), (0.6, 0.25))
    page.evaluate("scrollTo(0, 0)")
    screenshot("web-phone")
    panel.get_by_role("button", name="Paint anew").click()
    panel.locator(".stage.done .compare").wait_for()
    for title in ("Generate", "In-paint"):
        open_tab(page, title)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
