"""Draws the pictures of the README with the bundled demo model: ``python -m benchmarks.figures [--out docs]``.

generated.png (every class), sizes.png (beyond the trained size), editing.png (each editing task). About a minute on
two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flexvar import FlexVARPipeline
from flexvar.data import SHAPE_NAMES, ShapeDataset
from flexvar.image_io import make_grid
from PIL import Image, ImageDraw
from tqdm import tqdm

SIZE = 64  # px, of the demo's training images
SEED = 5  # of the real pictures that are edited
CELL = 2  # pictures of the demo are shown twice as large


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs", help="folder of the pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    pipe = FlexVARPipeline.from_pretrained("demo")
    for name, draw in tqdm((("generated", generated), ("sizes", sizes), ("editing", editing)), unit="picture"):
        draw(pipe).save(out / f"{name}.png", optimize=True)
    return 0


def generated(pipe: FlexVARPipeline) -> Image.Image:
    """Four images of each class: what ``flexvar generate --num 48 --columns 12`` draws."""
    images: list[Image.Image] = []
    for first in range(0, 48, 12):
        images += pipe(list(SHAPE_NAMES), seed=0, image_ids=list(range(first, first + 12))).images
    return make_grid(images, columns=12)


def sizes(pipe: FlexVARPipeline) -> Image.Image:
    """The same classes at once, one and a half times, twice and three times the trained size."""
    labels = ["star", "heart", "ring"]
    cells, captions = [], []
    for side in (64, 96, 128, 192):
        for label in labels:
            cells += pipe(label, seed=4, height=side, width=side).images
            captions.append(f"{label}, {side} px")
    by_label = [i * len(labels) + j for j in range(len(labels)) for i in range(4)]
    return make_grid([cells[i] for i in by_label], columns=4, captions=[captions[i] for i in by_label])


def editing(pipe: FlexVARPipeline) -> Image.Image:
    """A row for each task: the picture, what is kept of it, and three results."""
    cells: list[Image.Image] = []
    captions: list[str] = []

    def add_row(task: str, before: Image.Image, kept: Image.Image, results: list[Image.Image], shown: str) -> None:
        for picture, caption in [(before, task), (kept, shown)] + [(image, "") for image in results]:
            cells.append(picture.resize((picture.width * CELL, picture.height * CELL), Image.Resampling.NEAREST))
            captions.append(caption)

    ids = [0, 1, 2]
    picture = real_picture(66)
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).rectangle((16, 8, 60, 56), fill=255)
    results = pipe.inpaint(picture, mask, ["heart", "ring", "cross"], seed=1, image_ids=ids, feather=6).images
    add_row("inpaint", picture, hidden(picture, mask), list(results), "as heart, ring, cross")

    picture = real_picture(68)
    results = pipe.outpaint(
        picture, right=32, class_labels=["heart"] * 3, seed=2, image_ids=ids, feather=6, start_step=5
    ).images
    add_row("outpaint", picture, on_canvas(picture, (0, 0), (96, 64)), list(results), "32 px to the right")

    picture = real_picture(25)
    results = pipe.expand(picture, 64, 128, ["ring"] * 3, seed=3, image_ids=ids, feather=6, start_step=5).images
    add_row("expand", picture, on_canvas(picture, (32, 0), (128, 64)), list(results), "to 1:2")

    small = real_picture(74).resize((24, 24), Image.Resampling.LANCZOS)
    results = pipe.refine(small, SIZE, SIZE, class_labels=["crescent"] * 3, seed=4, image_ids=ids).images
    add_row("refine", small, small.resize((SIZE, SIZE), Image.Resampling.BICUBIC), list(results), "24 px, enlarged")

    picture = real_picture(134)
    scales = pipe.reconstruct(picture, schedule=[1, 4, 8, 16]).steps
    pictures = [step.preview()[0].resize(picture.size, Image.Resampling.BICUBIC) for step in scales]
    add_row("reconstruct", picture, pictures[0], pictures[1:], "from 1, 16, 64, 256 tokens")
    return make_grid(cells, columns=5, captions=captions)


def real_picture(index: int) -> Image.Image:
    """A picture that the model was not trained on; 66 is a star, 68 a heart, 25 a ring, 74 a crescent."""
    images, _ = ShapeDataset(index + 1, SIZE, SIZE, seed=SEED).batch([index])
    return Image.fromarray(images[0].movedim(0, -1).numpy())


def hidden(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture, grey where the mask is white."""
    return Image.composite(Image.new("RGB", picture.size, (160, 160, 160)), picture, mask)


def on_canvas(picture: Image.Image, place: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """The picture on grey, at ``place`` (left, top)."""
    canvas = Image.new("RGB", size, (160, 160, 160))
    canvas.paste(picture, place)
    return canvas


if __name__ == "__main__":
    raise SystemExit(main())
