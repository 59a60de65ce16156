"""The command ``flexvar``. Torch is imported when a command needs it, so that ``--help`` is quick."""

from __future__ import annotations

import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexvar.cli_train import train_app

if TYPE_CHECKING:
    from flexvar.generation import FlexVARPipeline

BAD_INPUT = 2  # exit code, the one that wrong arguments have

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.add_typer(train_app, name="train")


class GuidanceStyle(str, Enum):
    """The names of :data:`flexvar.generation.GuidanceStyle`."""

    var = "var"
    llamagen = "llamagen"
    off = "off"


class Precision(str, Enum):
    """What matrix products are computed in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Backend(str, Enum):
    """Which implementation of the ops."""

    native = "native"
    reference = "reference"


ModelOption = Annotated[str, typer.Option(help="`demo`, a folder, or a Hugging Face Hub id `owner/name`.")]
DeviceOption = Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`, …; `auto` takes a GPU where there is one.")]
PrecisionOption = Annotated[Precision, typer.Option("--dtype", help="What matrix products are computed in.")]
BackendOption = Annotated[Backend, typer.Option(help="`reference` is plain PyTorch: slow, and the specification.")]
StepsOption = Annotated[int | None, typer.Option(help="How many steps; 10 unless a schedule is given.")]
ScheduleOption = Annotated[
    str | None,
    typer.Option(help="The grid of every step in tokens, sides or HEIGHTxWIDTH: `1,2,4,8` or `1x2,2x4,8x16`."),
]


def main() -> None:
    """Entry point: whatever a user can cause is one line on stderr and exit code 2, without a traceback."""
    from PIL.Image import DecompressionBombWarning

    warnings.simplefilter("ignore", DecompressionBombWarning)  # pictures beyond that size are refused
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        _fail(error)
    except RuntimeError as error:
        if not any(text in str(error) for text in ("out of memory", "can't allocate memory")):
            raise
        _fail(error)


def _fail(error: Exception) -> None:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    print(f"flexvar: error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
    raise SystemExit(BAD_INPUT)


def _print_version(wanted: bool) -> None:
    if wanted:
        from flexvar import __version__

        print(f"flexvar {__version__}")
        raise typer.Exit


@app.callback()
def flexvar(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """FlexVAR: images of any size in any number of steps. Every step is the whole image at its own resolution.

    ```
    flexvar generate star                     # a star, drawn by the bundled demo model
    flexvar reconstruct photo.jpg             # what the tokenizer keeps of a photograph, scale by scale
    flexvar train tokenizer                   # your own model, or the bundled one again
    flexvar doctor                            # what was built, and what runs where
    ```
    """


@app.command()
def generate(
    labels: Annotated[
        list[str] | None, typer.Argument(help="Classes by name or number; `none` for no class. Default: all, in turn.")
    ] = None,
    num: Annotated[int | None, typer.Option(help="How many images; the labels take turns.")] = None,
    out: Annotated[
        Path, typer.Option(help="A `.png` (several images become one sheet), or a folder for one file each.")
    ] = Path("flexvar.png"),
    grid: Annotated[bool, typer.Option("--grid", help="With a folder: a sheet of all images, grid.png, too.")] = False,
    columns: Annotated[int | None, typer.Option(help="Images a row of the sheet.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of a square image in pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels; any number.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels; any number.")] = None,
    steps: StepsOption = None,
    schedule: ScheduleOption = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="How strongly to insist on the class. This and the next three default to the model's."),
    ] = None,
    guidance_style: Annotated[
        GuidanceStyle | None,
        typer.Option(help="`var` rises from 0 over the steps, `llamagen` is constant (1 is none), `off` is none."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw among the k likeliest codes; 0 is all, 1 the likeliest.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Then among the likeliest with this probability together; 1 is all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Image i of a seed is the same whatever --num and --batch are.")] = 0,
    batch: Annotated[int, typer.Option(help="Images at a time.")] = 16,
    published_greedy_quirk: Annotated[
        bool, typer.Option("--published-greedy-quirk", help="Greedy at the sides where the released code is.")
    ] = False,
    model: ModelOption = "demo",
    device: DeviceOption = "auto",
    dtype: PrecisionOption = Precision.float32,
    backend: BackendOption = Backend.native,
) -> None:
    """Draw images of classes.

    ```
    flexvar generate star
    flexvar generate star heart --num 8 --seed 7 --out sheet.png
    flexvar generate 3 --height 64 --width 128 --steps 12      # wide
    flexvar generate star --schedule 1,2,4,8,16                # any schedule
    flexvar generate --num 100 --out images --grid             # a folder, all classes in turn
    ```

    Each PNG carries its settings in the text chunk `flexvar`.
    """
    from flexvar import commands

    settings: dict[str, Any] = {
        "schedule": commands.parse_schedule(schedule),
        "height": size if height is None else height,
        "width": size if width is None else width,
        "steps": steps,
        "guidance_scale": guidance,
        "guidance_style": None if guidance_style is None else guidance_style.value,
        "top_k": top_k,
        "top_p": top_p,
        "published_greedy_quirk": published_greedy_quirk,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    if size is not None and (height is not None or width is not None):
        raise ValueError(f"generate: --size must be left out where --height or --width is given, got {size}")
    target = commands.check_target(out, grid=grid)
    pipe = _load(model, device, backend)
    commands.generate(
        pipe, labels or [], num=num, seed=seed, batch=batch, dtype=dtype.value, options=given, model=model,
        target=target, grid=grid, columns=columns,
    )  # fmt: skip


@app.command()
def reconstruct(
    photo: Annotated[Path, typer.Argument(help="Any picture: JPEG, PNG, WebP, TIFF, GIF, …")],
    out: Annotated[Path, typer.Option(help="The sheet, a `.png`.")] = Path("reconstruction.png"),
    steps: StepsOption = None,
    schedule: ScheduleOption = None,
    max_side: Annotated[int, typer.Option(help="Larger pictures are shrunk to this first; 0 is never.")] = 256,
    columns: Annotated[int | None, typer.Option(help="Pictures a row of the sheet.")] = None,
    model: ModelOption = "demo",
    device: DeviceOption = "auto",
    dtype: PrecisionOption = Precision.float32,
    backend: BackendOption = Backend.native,
) -> None:
    """Show what the tokenizer keeps of a picture at every scale, side by side.

    ```
    flexvar reconstruct photo.jpg
    flexvar reconstruct photo.jpg --steps 5 --max-side 512 --out scales.png
    ```

    Pictures in any mode and orientation, of any size: EXIF orientation is applied, transparency becomes white, and
    sides that are not multiples of the patch size are padded and cropped back.
    """
    from flexvar import commands

    target = commands.check_target(out, grid=False)
    if target.suffix.lower() != ".png":
        raise ValueError(f"reconstruct: --out must end in .png, got {str(out)!r}")
    picture = commands.open_photo(photo, max_side)
    pipe = _load(model, device, backend)
    parsed = commands.parse_schedule(schedule)
    commands.reconstruct(pipe, picture, target, schedule=parsed, steps=steps, dtype=dtype.value, columns=columns)


@app.command()
def doctor() -> None:
    """Say what was built, for what, and which path each op takes on each device, by running it.

    Exit code 1 where something is broken. With `FLEXVAR_STRICT=1` also where something slower stands in, such as the
    CPU for a GPU that the build has no kernels for.
    """
    from flexvar.doctor import examine

    report = examine()
    print(report)
    if not report.healthy:
        raise typer.Exit(1)


def _load(model: str, device: str, backend: Backend) -> FlexVARPipeline:
    from flexvar.commands import choose_device
    from flexvar.generation import FlexVARPipeline

    return FlexVARPipeline.from_pretrained(model, device=choose_device(device), backend=backend.value)
