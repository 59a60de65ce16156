"""Data sets: the same image for the same (seed, index), whatever is asked for around it; bad input is refused."""

import os

import numpy as np
import pytest
import torch
from flexvar.data import SHAPE_NAMES, ImageFolder, ShapeDataset, render
from PIL import Image


def test_an_image_depends_on_seed_and_index_only():
    dataset = ShapeDataset(100, seed=3)
    images, labels = dataset.batch([5, 17, 99])
    again, _ = ShapeDataset(2000, seed=3).batch([99, 5])
    assert torch.equal(again, images[[2, 0]])
    assert labels.tolist() == [5, 17 % 12, 99 % 12]
    other, _ = ShapeDataset(100, seed=4).batch([5])
    assert not torch.equal(other[0], images[0])


def test_known_pixels():
    """The bundled model's data: a change of the drawing would leave its weights behind."""
    images, _ = ShapeDataset(24).batch(range(24))
    assert images.shape == (24, 3, 64, 64)
    assert images.dtype == torch.uint8
    # Sines and rounding differ by a bit between processors.
    assert abs(int(images.long().sum()) - 37_318_181) < 2000


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (33, 8), (8, 200)])
@pytest.mark.parametrize("label", range(len(SHAPE_NAMES)))
def test_any_size_shows_a_whole_shape(height, width, label):
    image = render(label, height, width, np.random.default_rng(label)).astype(int)
    assert image.shape == (height, width, 3)
    contrast = np.abs(image - image[0, 0]).sum(2).max()
    assert contrast > 100, "the shape must stand out from the background"


def test_shapes_differ_from_one_another():
    """No rotation within the range makes one class another: masks of all classes overlap by less than 90 %."""
    from flexvar.data.render import MAX_ROTATION
    from flexvar.data.shapes import SIGNED_DISTANCES

    axis = np.linspace(-1, 1, 48, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    upright = [shape(x, y) < 0 for shape in SIGNED_DISTANCES]
    for angle in np.linspace(-2 * MAX_ROTATION, 2 * MAX_ROTATION, 9):
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        for i, shape in enumerate(SIGNED_DISTANCES):
            turned = shape(x * cos + y * sin, y * cos - x * sin) < 0
            for j, other in enumerate(upright):
                if i != j:
                    assert (turned & other).sum() < 0.9 * (turned | other).sum(), (SHAPE_NAMES[i], SHAPE_NAMES[j])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": -1}, "length must be >= 0, got -1"),
        ({"length": 5, "seed": -1}, "seed must be >= 0, got -1"),
        ({"length": 5, "height": 7}, r"height must be in \[8, 4096\] pixels, got 7"),
        ({"length": 5, "width": 5000}, r"width must be in \[8, 4096\] pixels, got 5000"),
    ],
)
def test_bad_shape_datasets(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShapeDataset(**arguments)


def test_bad_index_and_class():
    with pytest.raises(IndexError, match=r"index must be in \[0, 10\), got 10"):
        ShapeDataset(10).batch([10])
    with pytest.raises(ValueError, match=r"class_index must be in \[0, 12\), got 12"):
        render(12, 64, 64, np.random.default_rng(0))


def test_image_folder(tmp_path):
    for name, colour, mode in (("red", (255, 0, 0), "RGB"), ("white", 255, "L")):
        (tmp_path / name / "deeper").mkdir(parents=True)
        Image.new(mode, (50, 30), colour).save(tmp_path / name / "deeper" / "a.png")
    (tmp_path / "red" / "notes.txt").write_text("not a picture")
    (tmp_path / "red" / "folder.png").mkdir()
    dataset = ImageFolder(tmp_path, 16, 24)
    assert (len(dataset), dataset.class_names) == (2, ("red", "white"))
    images, labels = dataset.batch([1, 0])
    assert labels.tolist() == [1, 0]
    assert images.shape == (2, 3, 16, 24)
    assert images[0].eq(255).all()
    assert images[1].amax(dim=(1, 2)).tolist() == [255, 0, 0]


def test_bad_image_folders(tmp_path):
    with pytest.raises(ValueError, match="root must be a folder"):
        ImageFolder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="root must hold one sub-folder for each class"):
        ImageFolder(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "full" / "a.png")
    with pytest.raises(ValueError, match=r"every sub-folder must hold pictures \(.*\), got none in \['empty'\]"):
        ImageFolder(tmp_path)
    (tmp_path / "empty" / "link.png").symlink_to("nothing.png")
    with pytest.raises(ValueError, match=r"pictures must be files, got a link to nothing: '.*/empty/link\.png'"):
        ImageFolder(tmp_path)
    (tmp_path / "empty" / "link.png").unlink()
    os.mkfifo(tmp_path / "empty" / "pipe.png")
    with pytest.raises(ValueError, match=r"pictures must be files, got something else: '.*/empty/pipe\.png'"):
        ImageFolder(tmp_path)
    (tmp_path / "empty" / "pipe.png").unlink()
    (tmp_path / "empty" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png must be a picture"):
        ImageFolder(tmp_path).batch([0])
