"""The commands that start from a picture: ``flexvar inpaint``, ``outpaint``, ``expand``, ``refine``; and ``rerun``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flexvar.cli_options import (
    DEFAULT_MAX_SIDE,
    DrawOptions,
    HeightOption,
    MaxSideOption,
    SizeOption,
    WidthOption,
    pixel_sides,
    with_options,
)

PhotoArgument = Annotated[Path, typer.Argument(help="Any picture, or a folder of pictures.")]
EditLabelsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="Classes by name or, where no class is called so, by number; `none`, the default, for no class."
    ),
]
PasteOption = Annotated[bool, typer.Option(help="Put the pixels that are kept back into the result, bit for bit.")]
FeatherOption = Annotated[int, typer.Option(help="Pixels over which the pasted pixels fade in, around the seam.")]
StartStepOption = Annotated[
    int | None,
    typer.Option(help="The first step that is drawn; earlier ones are taken from the kept pixels. Default: 1."),
]
MarginOption = Annotated[int, typer.Option(help="Pixels to add on this side.")]


def add_edit_commands(app: typer.Typer) -> None:
    """Adds the commands of this file."""
    for command in (inpaint, outpaint, expand, refine, rerun):
        app.command()(command)


@with_options(DrawOptions)
def inpaint(
    picture: PhotoArgument,
    mask: Annotated[Path, typer.Argument(help="White where to paint; one for all, or a folder with one of each name.")],
    labels: EditLabelsArgument = None,
    paste: PasteOption = True,
    feather: FeatherOption = 0,
    start_step: StartStepOption = None,
    max_side: MaxSideOption = DEFAULT_MAX_SIDE,
    *,
    options: DrawOptions,
) -> None:
    """Paint anew where a mask is white.

    ```
    flexvar inpaint photo.png mask.png star
    flexvar inpaint photo.png mask.png star --num 8 --seed 3 --feather 4 --out sheet.png
    flexvar inpaint photos masks --out edited                  # folders: masks of the same names
    ```

    Each PNG carries its settings, and the names and SHA-256 of the pictures; `flexvar rerun` draws it again.
    """
    _edit("inpaint", picture, mask, labels, max_side, options, paste=paste, feather=feather, start_step=start_step)


@with_options(DrawOptions)
def outpaint(
    picture: PhotoArgument,
    labels: EditLabelsArgument = None,
    left: MarginOption = 0,
    right: MarginOption = 0,
    top: MarginOption = 0,
    bottom: MarginOption = 0,
    paste: PasteOption = True,
    feather: FeatherOption = 0,
    start_step: StartStepOption = None,
    max_side: MaxSideOption = DEFAULT_MAX_SIDE,
    *,
    options: DrawOptions,
) -> None:
    """Continue a picture beyond its edges.

    ```
    flexvar outpaint photo.png star --right 32
    flexvar outpaint photos --left 16 --right 16 --out wide    # a folder
    ```
    """
    _edit(
        "outpaint", picture, None, labels, max_side, options, left=left, right=right, top=top, bottom=bottom,
        paste=paste, feather=feather, start_step=start_step,
    )  # fmt: skip


@with_options(DrawOptions)
def expand(
    picture: PhotoArgument,
    labels: EditLabelsArgument = None,
    size: SizeOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    paste: PasteOption = True,
    feather: FeatherOption = 0,
    start_step: StartStepOption = None,
    max_side: MaxSideOption = DEFAULT_MAX_SIDE,
    *,
    options: DrawOptions,
) -> None:
    """Draw a larger picture around one in its centre.

    ```
    flexvar expand photo.png star --height 64 --width 128      # 1:2, as in the paper
    ```
    """
    _edit(
        "expand", picture, None, labels, max_side, options, **_both_sides("expand", size, height, width),
        paste=paste, feather=feather, start_step=start_step,
    )  # fmt: skip


@with_options(DrawOptions)
def refine(
    picture: PhotoArgument,
    labels: EditLabelsArgument = None,
    size: SizeOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    start_step: Annotated[
        int | None,
        typer.Option(
            help="The first step that is drawn; earlier ones are the picture's. Default: the first that is larger."
        ),
    ] = None,
    max_side: MaxSideOption = DEFAULT_MAX_SIDE,
    *,
    options: DrawOptions,
) -> None:
    """Draw a larger picture from a small one: what it shows is kept, what it is too small to show is drawn.

    ```
    flexvar refine small.png star --size 128
    flexvar refine photo.png star --size 64 --start-step 5     # a variation of the same size
    ```
    """
    sides = _both_sides("refine", size, height, width)
    _edit("refine", picture, None, labels, max_side, options, **sides, start_step=start_step)


def rerun(
    picture: Annotated[Path, typer.Argument(help="A PNG that `flexvar` drew.")],
    out: Annotated[Path | None, typer.Option(help="The new `.png`. Default: beside it, as NAME-again.png.")] = None,
    image: Annotated[Path | None, typer.Option(help="Where the edited picture is now, if it was moved.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Where the mask is now, if it was moved.")] = None,
    device: Annotated[str | None, typer.Option(help="Instead of the kind of device it was drawn on.")] = None,
) -> None:
    """Draw a PNG again from the settings it carries, and say whether every bit is the same.

    ```
    flexvar rerun flexvar.png
    ```

    On the same kind of device, with the same versions and model, it is. Exit code 1 where a pixel differs.
    """
    from flexvar import commands

    if not commands.rerun(picture, out, image=image, mask=mask, device=device):
        raise typer.Exit(1)


def _both_sides(command: str, size: int | None, height: int | None, width: int | None) -> dict[str, int]:
    rows, columns = pixel_sides(command, size, height, width)
    if rows is None or columns is None:
        raise ValueError(f"{command}: --size, or --height and --width, must be given")
    return {"height": rows, "width": columns}


def _edit(
    task: str,
    picture: Path,
    mask: Path | None,
    labels: list[str] | None,
    max_side: int,
    options: DrawOptions,
    **arguments: Any,
) -> None:
    from flexvar import commands
    from flexvar.edit_request import EditRequest
    from flexvar.photos import list_photos, mask_of

    photos = list_photos(picture)
    requests = [
        EditRequest(task, photo, None if mask is None else mask_of(photo, mask), max_side, arguments)
        for photo in photos
    ]
    target = commands.check_target(options.out, grid=options.grid)
    pipe = options.load()
    parsed: list[int | str | None] = [None]
    if labels:
        parsed = commands.parse_labels(labels, pipe.transformer.config.num_classes, pipe.class_names)
    drawing = options.drawing(task, parsed, {})
    commands.edit(
        pipe, drawing, requests, model=options.model, target=target, grid=options.grid, columns=options.columns
    )
