"""What the commands of :mod:`flexvar.cli` do, once their arguments are parsed."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import flexvar
from flexvar.doctor import is_strict
from flexvar.generation import FlexVARPipeline
from flexvar.generation.settings import check_integer
from flexvar.image_io import make_grid, open_image, save_png
from flexvar.schedule import ScaleSchedule

_SIZE = re.compile(r"(\d+)(?:x(\d+))?")


def parse_schedule(text: str | None) -> ScaleSchedule | None:
    """``"1,2,4x8"`` -> the schedule of (1, 1), (2, 2), (4, 8)."""
    if text is None:
        return None
    matches = [_SIZE.fullmatch(part) for part in re.split(r"[\s,]+", text.strip())]
    if not all(matches):
        raise ValueError(f"--schedule must be sides or HEIGHTxWIDTH, such as 1,2,4x8, got {text!r}")
    return ScaleSchedule((int(match[1]), int(match[2] or match[1])) for match in matches if match)


def parse_labels(texts: Sequence[str], num_classes: int) -> list[int | str | None]:
    """Numbers as numbers, ``none`` as no class, names as they are; no text at all is every class."""
    if not texts:
        return list(range(num_classes))
    return [None if text.lower() == "none" else int(text) if re.fullmatch(r"-?\d+", text) else text for text in texts]


def choose_device(name: str) -> torch.device:
    """``auto`` is a GPU that this build has kernels for, otherwise the CPU."""
    import flexvar_ext

    if name != "auto":
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
        count = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= count:
            raise ValueError(f"--device must be one that torch finds ({count} GPUs here), got {name!r}")
        return device
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if flexvar_ext.HAS_CUDA_KERNELS:
        return torch.device("cuda")
    text = "there is a GPU, but flexvar was built without CUDA kernels (see `flexvar doctor`)"
    if is_strict():
        raise ValueError(f"--device auto: {text}")
    print(f"flexvar: note: {text}; running on the CPU", file=sys.stderr)
    return torch.device("cpu")


def check_target(out: Path, *, grid: bool) -> Path:
    """Where to write, before anything is computed: a PNG in a folder that is made, or a folder."""
    if out.suffix.lower() == ".png":
        if grid:
            raise ValueError(f"--grid must be left out where --out is a .png, a sheet already, got {str(out)!r}")
        if out.is_dir():
            raise ValueError(f"--out must be a file where it ends in .png, got the folder {str(out)!r}")
        out.parent.mkdir(parents=True, exist_ok=True)
    elif out.suffix and not out.is_dir():
        raise ValueError(f"--out must end in .png or be a folder, got {str(out)!r}")
    else:
        out.mkdir(parents=True, exist_ok=True)
    return out


def generate(
    pipe: FlexVARPipeline,
    labels: Sequence[str],
    *,
    num: int | None,
    seed: int,
    batch: int,
    dtype: str,
    options: dict[str, Any],
    model: str,
    target: Path,
    grid: bool,
    columns: int | None,
) -> None:
    """``flexvar generate``: draws in batches, image i as (seed, i), and writes PNGs with their settings."""
    classes = parse_labels(labels, pipe.transformer.config.num_classes)
    count = len(classes) if num is None else check_integer("--num", num, 1)
    check_integer("--batch", batch, 1)
    if columns is not None:
        check_integer("--columns", columns, 1)
    if dtype != "float32":
        options = {**options, "autocast_dtype": getattr(torch, dtype)}
    settings = pipe.settings(**options)
    layout = settings.layout(pipe.patch_size)
    drawn_classes = [classes[i % len(classes)] for i in range(count)]
    images: list[Image.Image] = []
    total = math.ceil(count / batch) * len(layout.schedule)
    with tqdm(total=total, desc="generating", unit="step", disable=None) as bar:
        for start in range(0, count, batch):
            part = range(start, min(start + batch, count))
            for step in pipe.stream([drawn_classes[i] for i in part], seed=seed, image_ids=part, **options):
                bar.update()
                if step.index + 1 == step.num_steps:
                    images += step.preview()
    record = {
        "version": flexvar.__version__,
        "command": "generate",
        "model": model,
        "device": pipe.device.type,
        "dtype": dtype,
        "seed": seed,
        "height": layout.image_size[0],
        "width": layout.image_size[1],
        "schedule": [list(size) for size in layout.schedule],
        "guidance_scale": settings.guidance_scale,
        "guidance_style": settings.guidance_style,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "published_greedy_quirk": settings.published_greedy_quirk,
    }
    if target.suffix.lower() == ".png":
        sheet = images[0] if count == 1 else make_grid(images, columns=columns)
        save_png(sheet, target, {**record, "class_labels": drawn_classes, "image_ids": list(range(count))})
        print(target)
        return
    for i, (image, label) in enumerate(zip(images, drawn_classes, strict=True)):
        path = target / f"{i:04d}-{_file_name(_name_of(label, pipe.class_names))}.png"
        save_png(image, path, {**record, "class_labels": [label], "image_ids": [i]})
    if grid:
        record = {**record, "class_labels": drawn_classes, "image_ids": list(range(count))}
        save_png(make_grid(images, columns=columns), target / "grid.png", record)
    print(f"{target}: {count} images")


def open_photo(path: Path, max_side: int) -> Image.Image:
    """A picture, shrunk to ``max_side`` pixels where it is longer (0: never), which is said."""
    check_integer("--max-side", max_side, 0)
    picture = open_image(path)
    if max_side and max(picture.size) > max_side:
        original = picture.size
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        print(
            f"flexvar: note: {path.name} was shrunk from {original[0]} x {original[1]} to {picture.width} x "
            f"{picture.height}; --max-side 0 keeps it",
            file=sys.stderr,
        )
    return picture


def reconstruct(
    pipe: FlexVARPipeline,
    picture: Image.Image,
    target: Path,
    *,
    schedule: ScaleSchedule | None,
    steps: int | None,
    dtype: str,
    columns: int | None,
) -> None:
    """``flexvar reconstruct``: the picture and its reconstruction at every scale, on one sheet."""
    autocast_dtype = None if dtype == "float32" else getattr(torch, dtype)
    out = pipe.reconstruct(picture, schedule=schedule, steps=steps, autocast_dtype=autocast_dtype)
    scales: list[Image.Image] = []
    for step in tqdm(out.steps, desc="decoding", unit="scale", disable=None):
        (preview,) = step.preview()
        scales.append(preview.resize(picture.size, Image.Resampling.BICUBIC))
    captions = [f"{h}x{w}" for h, w in (step.size for step in out.steps)]
    sheet = make_grid([picture, *scales], columns=columns, captions=["original", *captions])
    save_png(sheet, target)
    print(target)


def _name_of(label: int | str | None, class_names: Sequence[str]) -> str:
    if isinstance(label, int) and label < len(class_names):
        return class_names[label]
    return "none" if label is None else str(label)


def _file_name(name: str) -> str:
    """Names come from the model's files, and may hold anything."""
    return re.sub(r"[^\w-]+", "-", name).strip("-")[:40] or "class"
