"""Images to train on: shapes drawn by the library itself, or folders of the user's own pictures."""

from flexvar.data.dataset import ImageDataset
from flexvar.data.image_folder import ImageFolder
from flexvar.data.render import render, render_batch
from flexvar.data.shape_dataset import ShapeDataset
from flexvar.data.shapes import SHAPE_NAMES

__all__ = ["SHAPE_NAMES", "ImageDataset", "ImageFolder", "ShapeDataset", "render", "render_batch"]
