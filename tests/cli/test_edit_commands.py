"""Editing from the command line, and PNGs drawn again from what they carry."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flexvar.image_io import read_settings, save_png
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")

Result = tuple[int, str, str]
EDITS: dict[str, list[object]] = {
    "inpaint": ["photo.png", "mask.png", "star"],
    "outpaint": ["photo.png", "star", "--left", 3, "--bottom", 8],
    "expand": ["photo.png", "star", "--height", 16, "--width", 40],
    "refine": ["photo.png", "star", "--height", 24, "--width", 40],
}
SIZES = {"inpaint": (20, 12), "outpaint": (23, 20), "expand": (40, 16), "refine": (40, 24)}  # (width, height)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def same(a: str | Path, b: str | Path) -> bool:
    return np.array_equal(np.asarray(Image.open(a)), np.asarray(Image.open(b)))


@pytest.fixture
def edit(run: Callable[..., Result], model: str) -> Callable[..., Result]:
    """``flexvar`` with the tiny pipeline, in a folder with photo.png (20 x 12) and mask.png (its left half)."""
    noise(20, 12).save("photo.png")
    mask = Image.new("L", (20, 12))
    mask.paste(255, (0, 0, 10, 12))
    mask.save("mask.png")
    return lambda *arguments: run(*arguments, "--model", model, "--device", "cpu")


@pytest.mark.parametrize("task", EDITS)
def test_every_task_and_its_rerun(edit: Callable[..., Result], run: Callable[..., Result], task: str) -> None:
    code, text, error = edit(task, *EDITS[task], "--steps", 4, "--seed", 3)
    assert (code, text, error) == (0, "flexvar.png\n", "")
    assert Image.open("flexvar.png").size == SIZES[task]
    settings = read_settings("flexvar.png")
    assert (settings["command"], settings["edit"]["task"], settings["class_labels"]) == (task, task, ["star"])
    assert settings["edit"]["image"]["file"] == "photo.png"
    code, text, error = run("rerun", "flexvar.png")
    assert (code, text, error) == (0, "flexvar-again.png: the same as flexvar.png, bit for bit\n", "")
    assert read_settings("flexvar-again.png") == settings


@pytest.mark.parametrize("task", EDITS)
def test_batches_sheets_and_folders_rerun_to_the_same_bits(
    edit: Callable[..., Result], run: Callable[..., Result], task: str
) -> None:
    arguments = [task, *EDITS[task], "circle", "--num", 5, "--batch", 2, "--steps", 3]
    assert edit(*arguments, "--out", "sheet.png", "--columns", 2)[0] == 0
    assert edit(*arguments, "--out", "folder", "--grid")[0] == 0
    assert sorted(os.listdir("folder")) == [
        "grid.png", "photo-0000-star.png", "photo-0001-circle.png", "photo-0002-star.png", "photo-0003-circle.png",
        "photo-0004-star.png",
    ]  # fmt: skip
    for file in ("sheet.png", "folder/grid.png", "folder/photo-0003-circle.png"):
        assert run("rerun", file)[0] == 0
    assert run("rerun", "folder/photo-0004-star.png", "--out", "new/four.png")[0] == 0
    assert same("new/four.png", "folder/photo-0004-star.png")
    assert run("rerun", "new/four.png")[0] == 0  # it names the picture as seen from its own folder


def test_generated_pictures_rerun(edit: Callable[..., Result], run: Callable[..., Result]) -> None:
    options = ["--height", 7, "--width", 18, "--dtype", "bfloat16", "--top-k", 5, "--backend", "reference"]
    assert edit("generate", "--num", 5, "--batch", 3, "--out", "images", "--grid", "--steps", 3, *options)[0] == 0
    for file in sorted(os.listdir("images")):
        code, text, _ = run("rerun", Path("images", file), "--out", "again.png")
        assert (code, text) == (0, f"again.png: the same as images/{file}, bit for bit\n")
    settings = read_settings("again.png")
    assert (settings["height"], settings["width"], settings["dtype"]) == (7, 18, "bfloat16")
    assert edit("generate", "star", "--schedule", "1,2x3", "--out", "one.png")[0] == 0
    assert run("rerun", "one.png")[0] == 0
    message = "flexvar: error: rerun: --out must not be the picture that is drawn again, got 'one.png'\n"
    assert run("rerun", "one.png", "--out", "one.png") == (2, "", message)


def test_options_reach_the_edit(edit: Callable[..., Result]) -> None:
    assert edit("inpaint", "photo.png", "mask.png", "--no-paste", "--start-step", 2, "--steps", 3)[0] == 0
    settings = read_settings("flexvar.png")
    assert settings["class_labels"] == [None]
    assert (settings["edit"]["paste"], settings["edit"]["start_step"]) == (False, 2)
    assert not np.array_equal(np.asarray(Image.open("flexvar.png"))[:, 12:], np.asarray(noise(20, 12))[:, 12:])
    assert edit("inpaint", "photo.png", "mask.png", "--feather", 3, "--steps", 3)[0] == 0
    assert np.array_equal(np.asarray(Image.open("flexvar.png"))[:, 13:], np.asarray(noise(20, 12))[:, 13:])


def test_a_folder_of_pictures(edit: Callable[..., Result], run: Callable[..., Result]) -> None:
    for folder in ("photos", "masks"):
        Path(folder).mkdir()
    for i, (width, height) in enumerate([(12, 12), (9, 20), (40, 8)]):
        noise(width, height, i).save(f"photos/{i}.png")
        Image.new("L", (5, 5), 255 * (i % 2)).save(f"masks/{i}.webp")
    Path("photos/notes.txt").write_text("no picture")
    code, text, error = edit("inpaint", "photos", "masks", "--out", "out", "--steps", 3, "--max-side", 20)
    assert (code, text) == (0, "out: 3 images\n")
    assert "2.png was shrunk from 40 x 8 to 20 x 4" in error
    assert sorted(os.listdir("out")) == ["0.png", "1.png", "2.png"]
    assert same("out/0.png", "photos/0.png")  # its mask is black
    assert run("rerun", "out/1.png")[0] == 0
    assert edit("inpaint", "photos", "mask.png", "--out", "out", "--steps", 3)[0] == 0  # one mask for all


def test_damaged_pictures_in_a_folder_do_not_stop_the_others(edit: Callable[..., Result]) -> None:
    Path("photos").mkdir()
    for name in ("a", "b", "c"):
        noise(12, 12).save(f"photos/{name}.png")
    Path("photos/b.png").write_bytes(Path("photos/b.png").read_bytes()[:90])
    noise(50, 12).save("photos/c.png")
    code, text, error = edit("expand", "photos", "--height", 16, "--width", 16, "--out", "out", "--steps", 2)
    assert (code, text) == (2, "out: 1 images\n")
    assert os.listdir("out") == ["a.png"]
    assert "b.png: open_image: photos/b.png must be an undamaged picture" in error
    assert "c.png: expand: width must be at least 50, got 16" in error
    assert "2 of 3 pictures could not be edited: b.png, c.png" in error


def test_rerun_says_what_is_missing_or_changed(edit: Callable[..., Result], run: Callable[..., Result]) -> None:
    assert edit("inpaint", "photo.png", "mask.png", "--steps", 3)[0] == 0
    fingerprint = read_settings("flexvar.png")["edit"]["image"]["sha256"]
    shutil.move("photo.png", "moved.png")
    code, _, error = run("rerun", "flexvar.png")
    assert code == 2
    assert f"got no file photo.png; --image says where it is now (SHA-256 {fingerprint})" in error
    assert run("rerun", "flexvar.png", "--image", "moved.png")[0] == 0
    noise(20, 12, seed=1).save("photo.png")
    code, _, error = run("rerun", "flexvar.png")
    assert code == 2
    assert f"photo.png must be the image that was edited, SHA-256 {fingerprint}, got" in error


def test_rerun_says_where_pixels_differ(edit: Callable[..., Result], run: Callable[..., Result]) -> None:
    assert edit("generate", "star", "--size", 8, "--steps", 3)[0] == 0
    settings, picture = read_settings("flexvar.png"), Image.open("flexvar.png").convert("RGB")
    red, green, blue = picture.getpixel((3, 4))
    picture.putpixel((3, 4), (red, green ^ 1, blue))
    save_png(picture, "touched.png", settings)
    code, text, error = run("rerun", "touched.png")
    assert (code, text) == (1, "touched-again.png: 1 of 64 pixels differ from touched.png\n")
    assert "touched.png was drawn with version" in error


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"command": "train"}, "must be drawn by one of generate, inpaint"),
        ({"model": None}, "settings must hold model"),
        ({"model": "nowhere"}, "source must be"),
        ({"labels": "star"}, "labels must be a list"),
        ({"labels": []}, "at least one label"),
        ({"labels": [{}]}, "class_labels must be an int"),
        ({"num": -1}, "--num must be at least 1"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"batch": "x"}, "--batch must be an int"),
        ({"seed": -1}, "seed must be from 0"),
        ({"dtype": "bool"}, "dtype must be one of float32"),
        ({"schedule": 5}, "sizes must be a list"),
        ({"schedule": [[1, 1], [10**9, 1]]}, "from 1 to"),
        ({"height": 10**9}, "height x width must be at most 268435456 pixels"),
        ({"height": 10**4}, "must need the schedule's last grid"),
        ({"threads": 0}, "threads must be from 1"),
        ({"top_p": "x"}, "top_p must be a number"),
        ({"image_ids": [7]}, "image_ids must be from 0 to 0, got 7"),
        ({"image_ids": []}, "image_ids must name"),
        ({"image_ids": [0, 0]}, "image_ids must name"),
        ({"sheet": {"columns": 0}}, "columns must be at least 1"),
        ({"sheet": {"gap": 10**9, "columns": 1}}, "sheet must hold columns"),
        ({"edit": None}, "edit must be one of"),
        ({"edit": {"task": "rm -rf"}}, "edit must be one of"),
        ({"edit": {"task": "inpaint"}}, "image must be recorded"),
        ({"edit": {"task": "outpaint", "image": {"file": "photo.png", "sha256": "0" * 64}}}, "must have max_side"),
        ({"edit": {"task": "outpaint", "image": {"file": "/etc/passwd", "sha256": "?"}}}, "image must be recorded"),
        ({"version": "0.0", "batch": ...}, "settings must hold batch, got those of version '0.0' without"),
    ],
)
def test_hostile_settings(
    edit: Callable[..., Result], run: Callable[..., Result], changes: dict[str, Any], text: str
) -> None:
    command = ["outpaint", *EDITS["outpaint"]] if "edit" in changes else ["generate", "star", "--size", 8]
    assert edit(*command, "--steps", 3)[0] == 0
    settings = {**read_settings("flexvar.png"), **changes}
    settings = {name: value for name, value in settings.items() if value is not ...}
    save_png(Image.open("flexvar.png"), "hostile.png", settings)
    code, _, error = run("rerun", "hostile.png", "--device", "cpu")
    assert code == 2
    assert error.startswith("flexvar: error: ")
    assert text in error
    assert error.count("\n") == 1


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, **{"format": "PNG", **options})
    return file.getvalue()


HANDLED: dict[str, bytes] = {
    "16 bit": encoded(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 163)),
    "palette": encoded(noise(20, 20).quantize(7)),
    "animated": encoded(
        noise(20, 20).convert("P"), format="GIF", save_all=True, append_images=[noise(20, 20, 1).convert("P")]
    ),
    "1 x 1": encoded(noise(1, 1)),
    "1 bit": encoded(noise(20, 20).convert("1")),
    "transparent": encoded(Image.new("RGBA", (20, 20), (9, 9, 9, 0))),
    "huge": encoded(Image.new("L", (6000, 4000))),
    "thin": encoded(Image.new("L", (3000, 1))),
}
REFUSED = {
    "bomb": (png_of_size(50_000, 50_000), "must be a picture that Pillow reads, got: Image size (2500000000 pixels)"),
    "too large": (png_of_size(13_000, 13_000), "must have 1 to 89478485 pixels, got 13000 x 13000"),
    "truncated": (encoded(noise(20, 20))[:300], "must be an undamaged picture"),
    "empty": (b"", "must be a picture that Pillow reads"),
    "text": (b"white where to paint", "must be a picture that Pillow reads"),
    "program": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "must be a picture that Pillow reads"),
}


@pytest.mark.parametrize("what", ["picture", "mask"])
@pytest.mark.parametrize("name", HANDLED)
def test_unusual_files_are_handled(edit: Callable[..., Result], name: str, what: str) -> None:
    Path("file.png").write_bytes(HANDLED[name])
    files = ["file.png", "mask.png"] if what == "picture" else ["photo.png", "file.png"]
    code, _, error = edit("inpaint", *files, "--steps", 2, "--max-side", 24)
    assert code == 0, error


@pytest.mark.parametrize("what", ["picture", "mask"])
@pytest.mark.parametrize("name", REFUSED)
def test_hostile_files_are_refused(edit: Callable[..., Result], name: str, what: str) -> None:
    data, text = REFUSED[name]
    Path("file.png").write_bytes(data)
    files = ["file.png", "mask.png"] if what == "picture" else ["photo.png", "file.png"]
    code, _, error = edit("inpaint", *files, "--steps", 2)
    assert code == 2
    assert f"file.png {text}" in error
    assert error.count("\n") == 1
    assert not Path("flexvar.png").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["inpaint", "photo.png"], None),
        (["inpaint", "missing.png", "mask.png"], "missing.png: No such file"),
        (["inpaint", "photo.png", "missing.png"], "missing.png: No such file"),
        (["inpaint", "photo.png", "mask.png", "sta"], "class_labels must be names that the model knows, got 'sta'"),
        (["inpaint", "photo.png", "mask.png", "--feather", -1], "feather must be from 0 to 20, got -1"),
        (["inpaint", "photo.png", "mask.png", "--start-step", 11], "start_step must be from 0 to 10, got 11"),
        (["inpaint", "photo.png", "mask.png", "--out", "photo.png"], "--out must not be a picture that is edited"),
        (["inpaint", "photo.png", "mask.png", "--out", "mask.png"], "--out must not be a picture that is edited"),
        (["inpaint", "photo.png", "mask.png", "--out", "."], "--out must not be a picture that is edited"),
        (["inpaint", ".", "mask.png", "--out", "x.png"], "--out must be a folder, without --grid"),
        (["inpaint", "empty", "mask.png"], "got a folder without one"),
        (["inpaint", "photo.png", "masks"], "masks must hold one mask for photo.png, called photo, got none"),
        (["inpaint", "photo.png", "mask.png", "--schedule", "1,2"], "must need the schedule's last grid"),
        (["outpaint", "photo.png"], "left, right, top or bottom must be at least 1"),
        (["outpaint", "photo.png", "--top", -3], "outpaint: top must be at least 0, got -3"),
        (["expand", "photo.png"], "expand: --size, or --height and --width, must be given"),
        (["expand", "photo.png", "--size", 5], "expand: height must be at least 12, got 5"),
        (["expand", "photo.png", "--size", 32, "--width", 3], "--size must be left out"),
        (["refine", "photo.png", "--width", 32], "refine: --size, or --height and --width, must be given"),
        (["refine", "photo.png", "--size", 8], "refine: start_step must be given where the image has the patches"),
        (["inpaint", "photo.png", "mask.png", "--max-side", -1], ": inpaint: --max-side must be at least 0"),
        (["inpaint", "photo.png", "mask.png", "--num", 0], ": inpaint: --num must be at least 1, got 0"),
        (["outpaint", "photo.png", "--batch", 0], ": outpaint: --batch must be at least 1, got 0"),
        (["refine", "photo.png", "--size", 32, "--columns", 0], ": refine: --columns must be at least 1, got 0"),
        (["rerun", "photo.png"], "must be a PNG written by flexvar"),
        (["rerun", "missing.png"], "missing.png: No such file"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(
    edit: Callable[..., Result], run: Callable[..., Result], arguments: list[Any], text: str | None
) -> None:
    for folder in ("empty", "masks"):
        Path(folder).mkdir()
    Image.new("L", (3, 3)).save("masks/other.png")
    code, _, error = (run if arguments[0] == "rerun" else edit)(*arguments)
    assert code == 2
    assert "Traceback" not in error
    if text is not None:
        assert error.startswith("flexvar: error: ")
        assert text in error
        assert error.count("\n") == 1


def test_settings_are_json_without_surprises(edit: Callable[..., Result]) -> None:
    assert edit("refine", *EDITS["refine"], "--steps", 3)[0] == 0
    text = json.dumps(read_settings("flexvar.png"))
    assert os.getcwd() not in text  # nothing about where the user's files are, but relative to the PNG
