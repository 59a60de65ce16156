"""The command ``flexvar``. Torch is imported when a command needs it, so that ``--help`` is quick."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from flexvar._errors import is_out_of_memory
from flexvar.cli_edit import add_edit_commands
from flexvar.cli_options import (
    DEFAULT_MAX_SIDE,
    Backend,
    BackendOption,
    ColumnsOption,
    DeviceOption,
    DrawOptions,
    HeightOption,
    LabelsArgument,
    MaxSideOption,
    ModelOption,
    Precision,
    PrecisionOption,
    ScheduleOption,
    SizeOption,
    StepsOption,
    WidthOption,
    load_pipeline,
    pixel_sides,
    with_options,
)
from flexvar.cli_train import train_app
from flexvar.cli_web import web

BAD_INPUT = 2  # exit code, the one that wrong arguments have
STOPPED = 130  # exit code after Ctrl+C, the one that shells give it

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # click's; where it is depends on typer's version

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.add_typer(train_app, name="train")


def main() -> None:
    """Entry point: whatever a user can cause is one line on stderr and exit code 2, without a traceback or a box.

    Ctrl+C is one line, too, and exit code 130.
    """
    from PIL.Image import DecompressionBombWarning

    warnings.simplefilter("ignore", DecompressionBombWarning)  # pictures beyond that size are refused
    try:
        code = app(standalone_mode=False)
    except _UsageError as error:
        _fail_usage(error)
    except typer.Abort as error:  # what some versions of typer make of Ctrl+C, and all of an EOFError, which is a bug
        if isinstance(error.__cause__, EOFError):
            raise
        code = STOPPED
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        _fail(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        _fail(error)
    if code == STOPPED:
        print("flexvar: stopped", file=sys.stderr)
    raise SystemExit(code)


def _fail_usage(error: Any) -> NoReturn:
    text = error.format_message()
    if hasattr(error.__cause__, "errors"):  # pydantic's, by which typer parses numbers: its text leaves out the value
        value = repr(error.__cause__.errors()[0]["input"])
        text += "" if value in text else f", got {value:.100}"
    if type(error).__name__ != "NoArgsIsHelpError":
        command = error.ctx.command_path if error.ctx else "flexvar"
        text = f"flexvar: error: {' '.join(text.split()).rstrip('.')}; see {command} --help"
    if text:  # without any arguments: the help, unless rich has printed it already
        print(text, file=sys.stderr)
    raise SystemExit(BAD_INPUT)


def _fail(error: Exception) -> NoReturn:
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
    flexvar inpaint photo.png mask.png star   # paint a star where the mask is white; outpaint, expand, refine
    flexvar rerun star.png                    # draw a picture again from the settings it carries
    flexvar reconstruct photo.jpg             # what the tokenizer keeps of a photograph, scale by scale
    flexvar web                               # all of it on a page in a browser
    flexvar train tokenizer                   # your own model, or the bundled one again
    flexvar doctor                            # what was built, and what runs where
    ```
    """


@app.command()
@with_options(DrawOptions)
def generate(
    labels: LabelsArgument = None,
    size: SizeOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    *,
    options: DrawOptions,
) -> None:
    """Draw images of classes.

    ```
    flexvar generate star
    flexvar generate star heart --num 8 --seed 7 --out sheet.png
    flexvar generate 3 --height 64 --width 128 --steps 12      # wide
    flexvar generate star --schedule 1,2,4,8,16                # any schedule
    flexvar generate --num 100 --out images --grid             # a folder, all classes in turn
    ```

    Each PNG carries its settings in the text chunk `flexvar`; `flexvar rerun` draws it again from them.
    """
    from flexvar import commands

    rows, columns = pixel_sides("generate", size, height, width)
    sizes = {name: side for name, side in (("height", rows), ("width", columns)) if side is not None}
    target = commands.check_target(options.out, grid=options.grid)
    pipe = options.load()
    parsed = commands.parse_labels(labels or [], pipe.transformer.config.num_classes, pipe.class_names)
    drawing = options.drawing("generate", parsed, sizes)
    commands.generate(pipe, drawing, model=options.model, target=target, grid=options.grid, columns=options.columns)


@app.command()
def reconstruct(
    photo: Annotated[Path, typer.Argument(help="Any picture: JPEG, PNG, WebP, TIFF, GIF, …")],
    out: Annotated[Path, typer.Option(help="The sheet, a `.png`.")] = Path("reconstruction.png"),
    steps: StepsOption = None,
    schedule: ScheduleOption = None,
    max_side: MaxSideOption = DEFAULT_MAX_SIDE,
    columns: ColumnsOption = None,
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
    from flexvar.photos import open_photo

    target = commands.check_target(out, grid=False)
    if target.suffix.lower() != ".png":
        raise ValueError(f"reconstruct: --out must end in .png, got {str(out)!r}")
    picture = open_photo(photo, max_side, op="reconstruct")
    pipe = load_pipeline(model, device, backend)
    parsed = commands.parse_schedule(schedule)
    commands.reconstruct(pipe, picture, target, schedule=parsed, steps=steps, dtype=dtype.value, columns=columns)


add_edit_commands(app)
app.command()(web)


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
