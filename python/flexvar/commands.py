"""What the commands of :mod:`flexvar.cli` do, once their arguments are parsed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from PIL import Image
from tqdm import tqdm

from flexvar._checks import find_device
from flexvar._numbers import check_integer
from flexvar.doctor import is_strict
from flexvar.drawing import Drawing
from flexvar.edit_request import EditRequest
from flexvar.generation import Edit, FlexVARPipeline, GenerationStep
from flexvar.image_io import make_grid, save_png
from flexvar.rerun import Recipe, count_differing_pixels
from flexvar.schedule import ScaleSchedule

_SIZE = re.compile(r"(\d+)(?:x(\d+))?")
_NUMBER = re.compile(r"-?\d{1,100}")


def parse_schedule(text: str | None) -> ScaleSchedule | None:
    """``"1,2,4x8"`` -> the schedule of (1, 1), (2, 2), (4, 8)."""
    if text is None:
        return None
    matches = [_SIZE.fullmatch(part) for part in re.split(r"[\s,]+", text.strip())]
    if not all(matches):
        raise ValueError(f"--schedule must be sides or HEIGHTxWIDTH, such as 1,2,4x8, got {text!r:.100}")
    return ScaleSchedule((int(match[1]), int(match[2] or match[1])) for match in matches if match)


def parse_labels(texts: Sequence[str], num_classes: int, class_names: Sequence[str]) -> list[int | str | None]:
    """Labels as a pipeline takes them; no text at all is every class.

    A text that is the name of a class, whatever the case, is that class; only otherwise are digits a number and
    ``none`` no class.
    """
    if not texts:
        return list(range(num_classes))
    names = {name.casefold() for name in class_names}
    return [text if text.casefold() in names else _parse_unnamed(text) for text in texts]


def _parse_unnamed(text: str) -> int | str | None:
    if text.lower() == "none":
        return None
    return int(text) if _NUMBER.fullmatch(text) else text


def choose_device(name: str) -> torch.device:
    """``auto`` is a GPU that this build has kernels for, otherwise the CPU."""
    import flexvar_ext

    if name != "auto":
        return find_device("--device", name, "auto, cpu, cuda or cuda:N")
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
    """Where to write: a PNG, or a folder. Nothing is made of it until there is something to write."""
    if out.suffix.lower() == ".png":
        if grid:
            raise ValueError(f"--grid must be left out where --out is a .png, a sheet already, got {str(out)!r}")
        if out.is_dir():
            raise ValueError(f"--out must be a file where it ends in .png, got the folder {str(out)!r}")
    elif out.suffix and not out.is_dir():
        raise ValueError(f"--out must end in .png or be a folder, got {str(out)!r}")
    return out


def _make_folder(target: Path) -> None:
    """The folder that a target is, or is in: made before the drawing, which would be lost without it."""
    (target.parent if _is_png(target) else target).mkdir(parents=True, exist_ok=True)


def generate(
    pipe: FlexVARPipeline, drawing: Drawing, *, model: str, target: Path, grid: bool, columns: int | None
) -> None:
    """``flexvar generate``: draws, and writes PNGs with their settings."""
    sheet = _sheet(drawing.task, columns)
    drawing.check(pipe, None)
    record = drawing.record(model, pipe, None)
    with _progress("generating", drawing.num_passes(range(drawing.num)) * len(record["schedule"])) as bar:
        _draw_and_save(
            pipe, drawing, None, record, target, "", grid=grid, sheet=sheet, on_step=bar.update,
        )  # fmt: skip
    print(target if _is_png(target) else f"{target}: {drawing.num} images")


def edit(
    pipe: FlexVARPipeline,
    drawing: Drawing,
    requests: Sequence[EditRequest],
    *,
    model: str,
    target: Path,
    grid: bool,
    columns: int | None,
) -> None:
    """``flexvar inpaint`` and its relatives: edits pictures one by one, and writes PNGs with their settings.

    Raises:
        ValueError: some pictures could not be edited; each is named on stderr, and the others were written.
    """
    sheet = _sheet(drawing.task, columns)
    if len(requests) > 1 and (_is_png(target) or grid):
        raise ValueError(f"--out must be a folder, without --grid, where there are {len(requests)} pictures")
    inputs = {path.resolve() for request in requests for path in (request.image, request.mask) if path is not None}
    stems = _unique_stems([request.image for request in requests])
    failed = []
    num_passes = drawing.num_passes(range(drawing.num))
    with _progress("editing") as bar:
        for done, (request, stem) in enumerate(zip(requests, stems, strict=True)):
            bar.set_postfix_str(request.image.name)
            try:
                edit, fingerprints = request.load()
                drawing.check(pipe, edit)
            except (ValueError, TypeError, OSError) as error:
                if len(requests) == 1:
                    raise
                failed.append(request.image.name)
                tqdm.write(f"flexvar: error: {request.image.name}: {' '.join(str(error).split())}", file=sys.stderr)
                continue
            folder = target.parent if _is_png(target) else target
            record = drawing.record(model, pipe, edit)
            record["edit"] = request.record(fingerprints, folder)
            bar.total = bar.n + num_passes * len(record["schedule"]) * (len(requests) - done)  # if all have as many
            _draw_and_save(
                pipe, drawing, edit, record, target, stem, grid=grid, sheet=sheet, on_step=bar.update, keep=inputs,
            )  # fmt: skip
    num_images = (len(requests) - len(failed)) * drawing.num
    print(target if _is_png(target) else f"{target}: {num_images} images")
    if failed:
        raise ValueError(f"{len(failed)} of {len(requests)} pictures could not be edited: {', '.join(failed)}")


def _draw_and_save(
    pipe: FlexVARPipeline,
    drawing: Drawing,
    edit: Edit | None,
    record: Mapping[str, Any],
    target: Path,
    stem: str,
    *,
    grid: bool,
    sheet: Mapping[str, Any],
    on_step: Callable[[], object],
    keep: Collection[Path] = (),
) -> None:
    """Draws all images into a PNG, or into a folder: there each is written as soon as it is drawn."""
    ids = range(drawing.num)
    to_folder = not _is_png(target)
    if not to_folder:
        _refuse_to_overwrite(target, keep)
    _make_folder(target)
    pictures: list[Image.Image] = []
    for image, picture in drawing.draw(pipe, edit, ids, on_step):
        if to_folder:
            path = target / f"{_numbered(stem, image, drawing, pipe)}.png"
            _refuse_to_overwrite(path, keep)
            save_png(picture, path, {**record, **drawing.shown([image])})
        if grid or not to_folder:
            pictures.append(picture)
    if not to_folder and len(pictures) == 1:
        save_png(pictures[0], target, {**record, **drawing.shown(ids)})
    elif pictures:
        path = target / "grid.png" if to_folder else target
        save_png(make_grid(pictures, **sheet), path, {**record, **drawing.shown(ids), "sheet": dict(sheet)})


def _refuse_to_overwrite(path: Path, inputs: Collection[Path]) -> None:
    if path.resolve() in inputs:
        raise ValueError(f"--out must not be a picture that is edited, got {str(path)!r}")


def _sheet(op: str, columns: int | None) -> dict[str, int | None]:
    """How images are laid out, as :func:`make_grid` takes it and a PNG says it."""
    return {"columns": None if columns is None else check_integer("--columns", columns, 1, op=op)}


def _progress(what: str, total: int | None = None) -> tqdm[NoReturn]:
    return tqdm(total=total, desc=what, unit="step", disable=None)


def _is_png(target: Path) -> bool:
    return target.suffix.lower() == ".png"


def _unique_stems(files: Sequence[Path]) -> list[str]:
    """What the results of pictures are called: as they are, with their endings only where two would be the same."""
    stems = [file.stem for file in files]
    return stems if len(set(stems)) == len(stems) else [file.name for file in files]


def _numbered(stem: str, image: int, drawing: Drawing, pipe: FlexVARPipeline) -> str:
    """The only edit of a picture has its stem alone."""
    if stem and drawing.num == 1:
        return stem
    name = f"{image:04d}-{_file_name(_name_of(drawing.label(image), pipe.class_names))}"
    return f"{stem}-{name}" if stem else name


def rerun(picture: Path, out: Path | None, *, image: Path | None, mask: Path | None, device: str | None) -> bool:
    """``flexvar rerun``: draws a PNG again; whether every pixel is the same. Raises as :meth:`Recipe.read`."""
    recipe = Recipe.read(picture, image=image, mask=mask)
    target = check_target(out or picture.with_name(f"{picture.stem}-again.png"), grid=False)
    if not _is_png(target):
        raise ValueError(f"rerun: --out must end in .png, got {str(target)!r}")
    if target.resolve() == picture.resolve():
        raise ValueError(f"rerun: --out must not be the picture that is drawn again, got {str(target)!r}")
    inputs = set[Path]()
    settings, drawing, edit = dict(recipe.settings), recipe.drawing, None
    if recipe.request is not None:
        edit, fingerprints = recipe.request.load()
        settings["edit"] = recipe.request.record(fingerprints, target.parent)
        inputs |= {path.resolve() for path in (recipe.request.image, recipe.request.mask) if path is not None}
    _refuse_to_overwrite(target, inputs)
    pipe = FlexVARPipeline.from_pretrained(
        settings["model"], device=choose_device(device or settings["device"]), backend=settings["backend"]
    )
    recipe.use_recorded_threads()
    drawing.check(pipe, edit)
    _make_folder(target)
    num_steps = len(drawing.layout(pipe, edit).schedule)
    with _progress("drawing", drawing.num_passes(recipe.images) * num_steps) as bar:
        drawn = dict(drawing.draw(pipe, edit, recipe.images, bar.update))
    again = recipe.assemble([drawn[number] for number in recipe.images])
    save_png(again, target, {**settings, "device": pipe.device.type})
    differing = count_differing_pixels(picture, again)
    if differing == 0:
        print(f"{target}: the same as {picture}, bit for bit")
        return True
    print(f"{target}: {differing} of {again.width * again.height} pixels differ from {picture}")
    before = ", ".join(f"{name} {settings.get(name)}" for name in ("version", "torch", "device"))
    print(
        f"flexvar: note: {picture.name} was drawn with {before}; another model may have its name now", file=sys.stderr
    )
    return False


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
    sheet = _sheet("reconstruct", columns)
    out = pipe.reconstruct(picture, schedule=schedule, steps=steps, autocast_dtype=autocast_dtype(dtype))
    _make_folder(target)
    scales: list[Image.Image] = []
    for step in tqdm(out.steps, desc="decoding", unit="scale", disable=None):
        scales += cast("list[Image.Image]", step.preview())
    save_png(scales_sheet(picture, out.steps, scales, **sheet), target)
    print(target)


def autocast_dtype(name: str) -> torch.dtype | None:
    """``--dtype`` as a pipeline takes it."""
    return None if name == "float32" else cast("torch.dtype", getattr(torch, name))


def scales_sheet(
    picture: Image.Image,
    steps: Sequence[GenerationStep],
    scales: Sequence[Image.Image],
    columns: int | None = None,
) -> Image.Image:
    """A picture, and all scales of its reconstruction at its size."""
    shown = [scale.resize(picture.size, Image.Resampling.BICUBIC) for scale in scales]
    captions = [f"{h}x{w}" for h, w in (step.size for step in steps)]
    return make_grid([picture, *shown], columns=columns, captions=["original", *captions])


def _name_of(label: int | str | None, class_names: Sequence[str]) -> str:
    if isinstance(label, int) and label < len(class_names):
        return class_names[label]
    return "none" if label is None else str(label)


def _file_name(name: str) -> str:
    """Names come from the model's files, and may hold anything."""
    return re.sub(r"[^\w-]+", "-", name).strip("-")[:40] or "class"
