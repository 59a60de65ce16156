"""Any photograph in, PNG files with their settings out."""

import contextlib
import io
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from flexvar.image_io import (
    MAX_PIXELS,
    image_to_tensor,
    make_grid,
    open_image,
    read_settings,
    save_png,
    tensor_to_images,
)
from PIL import Image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def photograph(width=24, height=16):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    file.seek(0)
    return file


def png_header_of_size(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "mode",
    [
        "1",
        "L",
        "LA",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBX",
        "CMYK",
        "YCbCr",
        "HSV",
        "I",
        "F",
    ],
)
def test_every_mode_becomes_rgb(mode):
    image = open_image(Image.new(mode, (5, 4)))
    assert image.mode == "RGB"
    assert image.size == (5, 4)


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "1"), ("JPEG", "RGB"), ("JPEG", "L"),
        ("JPEG", "CMYK"), ("TIFF", "CMYK"), ("TIFF", "RGB"), ("GIF", "P"), ("BMP", "RGB"), ("WEBP", "RGBA"),
        ("PPM", "RGB"), ("TGA", "RGBA"), ("ICO", "RGBA"),
    ],
)  # fmt: skip
def test_every_format_becomes_rgb(format, mode):
    source = photograph(32, 32).convert("RGB" if mode == "CMYK" else mode).convert(mode)
    image = open_image(encoded(source, format=format))
    assert image.mode == "RGB"
    assert image.size == (32, 32)


def test_cmyk_jpeg_keeps_its_colours():
    image = open_image(encoded(Image.new("RGB", (8, 8), RED).convert("CMYK"), format="JPEG"))
    assert np.abs(np.asarray(image).astype(int) - RED).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.new("RGB", (4, 2), BLUE)
    upright.putpixel((0, 0), RED)  # the corner that tells all eight apart, with the sides
    upright.putpixel((3, 0), GREEN)
    undo = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(encoded(stored, format="PNG", exif=exif))
    assert np.array_equal(np.asarray(image), np.asarray(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode):
    image = Image.new("RGBA", (3, 3), (0, 0, 0, 0))
    assert open_image(image.convert(mode)).getpixel((1, 1)) == WHITE


def test_half_transparency_is_mixed():
    assert open_image(Image.new("RGBA", (2, 2), (0, 0, 0, 128))).getpixel((0, 0)) == (
        127,
        127,
        127,
    )


def test_transparent_palette_entry_is_white():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 1), 1)
    opened = open_image(encoded(image, format="PNG", transparency=0))
    assert opened.getpixel((0, 0)) == WHITE
    assert opened.getpixel((1, 1)) == RED


def test_16_bit_grey_keeps_its_range():
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    opened = open_image(encoded(Image.fromarray(values), format="PNG"))
    assert [opened.getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]


def test_floats_are_stretched_and_nan_is_survived():
    values = np.array([[-2.0, 0.0, 2.0, np.nan, np.inf]], dtype=np.float32)
    opened = open_image(encoded(Image.fromarray(values), format="TIFF"))
    assert [opened.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (6, 6), colour) for colour in (RED, GREEN)]
    for format in ("GIF", "WEBP", "PNG"):
        file = encoded(frames[0], format=format, save_all=True, append_images=frames[1:])
        assert np.abs(np.asarray(open_image(file)).astype(int) - RED).max() < 8


def test_one_pixel():
    assert open_image(encoded(Image.new("RGB", (1, 1), RED), format="PNG")).getpixel((0, 0)) == RED


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(8, 8), (100_000, 100_000), (13_000, 13_000)])
def test_pixel_limit_is_checked_before_decoding(size):
    limit = 63 if size == (8, 8) else MAX_PIXELS
    with pytest.raises(ValueError, match=r"open_image: .*pixel"):
        open_image(io.BytesIO(png_header_of_size(*size)), max_pixels=limit)


@pytest.mark.filterwarnings("ignore")  # of Pillow, on damaged metadata
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated_files_are_refused(format):
    data = encoded(photograph(64, 64), format=format).getvalue()
    for cut in (0, 1, 8, 20, len(data) // 2):
        with pytest.raises(ValueError, match=r"open_image: file must be"):
            open_image(io.BytesIO(data[:cut]))


@pytest.mark.filterwarnings("ignore")  # of Pillow, on damaged metadata
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "ICO"])
def test_damaged_files_give_a_picture_or_a_value_error(format):
    rng = np.random.default_rng(1)
    data = encoded(photograph(16, 16), format=format).getvalue()
    for _ in range(100):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), 4):
            broken[at] = rng.integers(0, 256)
        with contextlib.suppress(ValueError):
            assert open_image(io.BytesIO(broken), max_pixels=10_000).mode == "RGB"


def test_programs_are_not_run_on_a_file():
    with pytest.raises(ValueError, match="must be a picture"):
        open_image(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "missing.png")
    with pytest.raises(IsADirectoryError):
        open_image(tmp_path)
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(ValueError, match=r"text\.jpg must be a picture"):
        open_image(tmp_path / "text.jpg")


def test_tensors_and_images_are_inverse():
    image = photograph()
    tensor = image_to_tensor([image, image])
    assert tensor.shape == (2, 3, 16, 24)
    assert tensor.dtype == torch.float32
    assert tensor.min() >= -1
    assert tensor.max() <= 1
    assert np.array_equal(np.asarray(tensor_to_images(tensor)[1]), np.asarray(image))
    assert tensor_to_images(torch.full((1, 3, 1, 1), 7.0))[0].getpixel((0, 0)) == WHITE


def test_bad_tensors_and_images():
    with pytest.raises(ValueError, match=r"must have shape \[B, 3, H, W\], got \(3, 4, 4\)"):
        tensor_to_images(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="must be finite"):
        tensor_to_images(torch.full((1, 3, 2, 2), torch.nan))
    with pytest.raises(TypeError, match="must be Pillow images, got str"):
        image_to_tensor(["photo.jpg"])
    with pytest.raises(ValueError, match="of one size"):
        image_to_tensor([photograph(), photograph(8, 8)])
    with pytest.raises(ValueError, match="of one size"):
        image_to_tensor([])


def test_png_carries_its_settings(tmp_path):
    settings = {
        "seed": 3,
        "top_p": 0.95,
        "schedule": [[1, 1], [2, 4]],
        "name": "Kreis – größer",
    }
    save_png(photograph(), tmp_path / "a.png", settings)
    assert read_settings(tmp_path / "a.png") == settings
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(photograph()))
    assert os.listdir(tmp_path) == ["a.png"]


def test_settings_that_are_not_there(tmp_path):
    save_png(photograph(), tmp_path / "plain.png")
    with pytest.raises(ValueError, match=r"plain\.png must be a PNG written by flexvar"):
        read_settings(tmp_path / "plain.png")
    photograph().save(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match="undamaged PNG"):
        read_settings(tmp_path / "photo.jpg")


def test_save_refuses_other_formats_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.png, got 'a\.jpg'"):
        save_png(photograph(), tmp_path / "a.jpg")
    with pytest.raises(OSError, match="missing"):
        save_png(photograph(), tmp_path / "missing" / "a.png")
    assert os.listdir(tmp_path) == []


def test_grid():
    cells = [Image.new("RGB", (8, 4), colour) for colour in (RED, GREEN, BLUE)]
    sheet = make_grid(cells, columns=2, gap=2)
    assert sheet.size == (2 * 10 + 2, 2 * 6 + 2)
    assert [sheet.getpixel(at) for at in ((2, 2), (12, 2), (2, 8), (12, 8))] == [
        RED,
        GREEN,
        BLUE,
        WHITE,
    ]
    captioned = make_grid(cells, captions=["1x1", "2x2", "4x4"])
    assert captioned.height > make_grid(cells).height
    with pytest.raises(ValueError, match="at least one image"):
        make_grid([])
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        make_grid(cells, columns=0)
    with pytest.raises(ValueError, match=r"one per image \(3\), got 1"):
        make_grid(cells, captions=["a"])


def test_an_error_names_the_picture_and_leaves_nothing(tmp_path):
    picture = Image.new("RGB", (8, 8))
    (tmp_path / "folder.png").mkdir()
    for name, reason in (("missing/a.png", "No such file or directory"), ("folder.png", "Is a directory")):
        with pytest.raises(OSError, match=rf"{reason}: '{re.escape(str(tmp_path / name))}'$"):
            save_png(picture, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_a_read_only_file_system_names_the_picture(tmp_path, monkeypatch):
    def refused(path, *arguments, **options):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(OSError, match=rf"Read-only file system: '{re.escape(str(tmp_path / 'a.png'))}'$"):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png")
