"""Options that several commands have, each said once. No torch here: ``--help`` is quick."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

if TYPE_CHECKING:
    from flexvar.drawing import Drawing
    from flexvar.generation import FlexVARPipeline

DEFAULT_MAX_SIDE = 256  # pixels

CommandT = TypeVar("CommandT", bound=Callable[..., None])


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
StepsOption = Annotated[int | None, typer.Option(help="How many steps. Default: 10, and more beyond 20 x 20 tokens.")]
ScheduleOption = Annotated[
    str | None,
    typer.Option(help="The grid of every step in tokens, sides or HEIGHTxWIDTH: `1,2,4,8` or `1x2,2x4,8x16`."),
]
ColumnsOption = Annotated[int | None, typer.Option(help="Images a row of the sheet.")]
MaxSideOption = Annotated[int, typer.Option(help="Larger pictures are shrunk to this first; 0 is never.")]
LabelsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="Classes by name or, where no class is called so, by number; `none` for no class. Default: all, in turn."
    ),
]
SizeOption = Annotated[int | None, typer.Option(help="Side of a square image in pixels.")]
HeightOption = Annotated[int | None, typer.Option(help="Height in pixels; any number.")]
WidthOption = Annotated[int | None, typer.Option(help="Width in pixels; any number.")]


@dataclass(frozen=True)
class DrawOptions:
    """The options of every command that draws."""

    num: Annotated[int | None, typer.Option(help="How many images (of each picture); the labels take turns.")] = None
    out: Annotated[
        Path, typer.Option(help="A `.png` (several images become one sheet), or a folder for one file each.")
    ] = Path("flexvar.png")
    grid: Annotated[bool, typer.Option("--grid", help="With a folder: a sheet of all images, grid.png, too.")] = False
    columns: ColumnsOption = None
    steps: StepsOption = None
    schedule: ScheduleOption = None
    guidance: Annotated[
        float | None,
        typer.Option(help="How strongly to insist on the class. This and the next three default to the model's."),
    ] = None
    guidance_style: Annotated[
        GuidanceStyle | None,
        typer.Option(help="`var` rises from 0 over the steps, `llamagen` is constant (1 is none), `off` is none."),
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest codes; 0 is all, 1 the likeliest.")] = (
        None
    )
    top_p: Annotated[
        float | None, typer.Option(help="Then among the likeliest with this probability together; 1 is all.")
    ] = None
    seed: Annotated[int, typer.Option(help="Image i of a seed is the same whatever --num and --batch are.")] = 0
    batch: Annotated[int, typer.Option(help="Images at a time.")] = 16
    published_greedy_quirk: Annotated[
        bool, typer.Option("--published-greedy-quirk", help="Greedy at the sides where the released code is.")
    ] = False
    model: ModelOption = "demo"
    device: DeviceOption = "auto"
    dtype: PrecisionOption = Precision.float32
    backend: BackendOption = Backend.native

    def drawing(self, task: str, labels: list[int | str | None], sizes: dict[str, int]) -> Drawing:
        """What to draw: as many images as there are labels unless ``num`` says; ``sizes``: height and width."""
        from flexvar.commands import parse_schedule
        from flexvar.drawing import Drawing

        values: dict[str, Any] = {
            **sizes,
            "schedule": parse_schedule(self.schedule),
            "steps": self.steps,
            "guidance_scale": self.guidance,
            "guidance_style": None if self.guidance_style is None else self.guidance_style.value,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "published_greedy_quirk": self.published_greedy_quirk,
        }
        return Drawing(
            task=task,
            labels=labels,
            num=len(labels) if self.num is None else self.num,
            batch=self.batch,
            seed=self.seed,
            dtype=self.dtype.value,
            options={name: value for name, value in values.items() if value is not None},
        )

    def load(self) -> FlexVARPipeline:
        """The model that was asked for."""
        return load_pipeline(self.model, self.device, self.backend)


def load_pipeline(model: str, device: str, backend: Backend) -> FlexVARPipeline:
    """A pipeline where ``--device`` says."""
    from flexvar.commands import choose_device
    from flexvar.generation import FlexVARPipeline

    return FlexVARPipeline.from_pretrained(model, device=choose_device(device), backend=backend.value)


def pixel_sides(command: str, size: int | None, height: int | None, width: int | None) -> tuple[int | None, int | None]:
    """(height, width) of ``--size`` or ``--height`` and ``--width``. Raises ValueError for both."""
    if size is not None and (height is not None or width is not None):
        raise ValueError(f"{command}: --size must be left out where --height or --width is given, got {size}")
    return (size, size) if size is not None else (height, width)


def with_options(group: type[Any]) -> Callable[[CommandT], CommandT]:
    """Gives a command the fields of a dataclass as options; its parameter ``options`` gets them as one value."""

    def decorate(function: CommandT) -> CommandT:
        own = inspect.signature(function, eval_str=True)
        hints = get_type_hints(group, include_extras=True)
        parameters = [parameter for name, parameter in own.parameters.items() if name != "options"]
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
            for field in fields(group)
        ]

        @wraps(function)
        def command(**values: Any) -> None:
            grouped = {field.name: values.pop(field.name) for field in fields(group)}
            function(**values, options=group(**grouped))

        # What typer reads instead of the wrapped function's.
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command  # type: ignore[return-value]

    return decorate
