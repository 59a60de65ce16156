"""The commands ``flexvar train …``. Torch is imported when a command needs it, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from flexvar.cli_options import Backend, BackendOption, DeviceOption

if TYPE_CHECKING:
    import torch

    from flexvar.data import ImageDataset
    from flexvar.training import TrainingConfig

    ConfigT = TypeVar("ConfigT", bound=TrainingConfig)

train_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Train a tokenizer, then a transformer on its codes; see what they are worth.",
)


class TrainingPrecision(str, Enum):
    """What matrix products and convolutions are computed in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


DataOption = Annotated[
    Path | None,
    typer.Option(help="A folder with one sub-folder of pictures for each class; by default shapes, drawn on the fly."),
]
HeightOption = Annotated[int, typer.Option(help="Height in pixels that pictures of --data are cropped and resized to.")]
WidthOption = Annotated[int, typer.Option(help="Their width.")]
StepsOption = Annotated[int | None, typer.Option(help="Optimiser steps.")]
BatchOption = Annotated[int | None, typer.Option(help="Images a step.")]
RateOption = Annotated[float | None, typer.Option(help="Highest learning rate.")]
SeedOption = Annotated[int | None, typer.Option(help="Of everything random.")]
DtypeOption = Annotated[
    TrainingPrecision | None,
    typer.Option(
        "--dtype",
        help="What is multiplied in; weights are float32. Default: bfloat16 where torch multiplies it fast.",
    ),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in --out after a stop or a crash.")]


@train_app.command()
def tokenizer(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/tokenizer"),
    data: DataOption = None,
    height: HeightOption = 64,
    width: WidthOption = 64,
    steps: StepsOption = None,
    batch_size: BatchOption = None,
    learning_rate: RateOption = None,
    seed: SeedOption = None,
    dtype: DtypeOption = None,
    resume: ResumeOption = False,
    device: DeviceOption = "auto",
    backend: BackendOption = Backend.native,
) -> None:
    """Train a tokenizer. Without options: the bundled demo's, in a quarter of an hour on two CPU cores.

    ```
    flexvar train tokenizer
    flexvar train tokenizer --data photos --steps 20000 --out runs/photos-tokenizer
    ```

    The folder gets the model, the log (`log.jsonl`), loss curves (`curves.png`) and a checkpoint for `--resume`.
    """
    from flexvar.commands import choose_device
    from flexvar.training import presets, train_tokenizer

    chosen = choose_device(device)
    config = _override(
        presets.DEMO_TOKENIZER_TRAINING, steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed
    )
    datasets = [_folder(data, height, width)] if data else presets.demo_tokenizer_data()
    train_tokenizer(
        datasets,
        out,
        presets.DEMO_TOKENIZER,
        replace(config, bfloat16=_takes_bfloat16(dtype, chosen)),
        device=chosen,
        backend=backend.value,
        resume=resume,
    )


@train_app.command()
def transformer(
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer's run.")] = Path("runs/tokenizer"),
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/transformer"),
    start_from: Annotated[
        Path | None, typer.Option(help="Folder of a transformer to train further, instead of random weights.")
    ] = None,
    data: DataOption = None,
    height: HeightOption = 64,
    width: WidthOption = 64,
    steps: StepsOption = None,
    batch_size: BatchOption = None,
    learning_rate: RateOption = None,
    seed: SeedOption = None,
    dtype: DtypeOption = None,
    resume: ResumeOption = False,
    device: DeviceOption = "auto",
    backend: BackendOption = Backend.native,
) -> None:
    """Train a transformer on a tokenizer's codes. Without options: the bundled demo's, in under an hour on two cores.

    ```
    flexvar train transformer
    flexvar train transformer --start-from runs/transformer --data shapes --out runs/further
    flexvar train transformer --tokenizer runs/photos-tokenizer --data photos --out runs/photos-transformer
    ```
    """
    _bound_product_caches()
    from flexvar.commands import choose_device
    from flexvar.storage import load_tokenizer, load_transformer
    from flexvar.training import presets, train_transformer

    chosen = choose_device(device)
    config = _override(
        presets.DEMO_TRANSFORMER_TRAINING, steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed
    )
    frozen = load_tokenizer(tokenizer, backend=backend.value)
    datasets = [_folder(data, height, width)] if data else presets.demo_transformer_data()
    model_config = replace(
        presets.DEMO_TRANSFORMER,
        num_classes=len(datasets[0].class_names),
        class_names=datasets[0].class_names,
        codebook_size=frozen.config.codebook_size,
        codebook_dim=frozen.config.codebook_dim,
        upsample_mode=frozen.config.upsample_mode,
    )
    trained = load_transformer(start_from, backend=backend.value) if start_from else None
    config = replace(config, bfloat16=_takes_bfloat16(dtype, chosen))  # nothing is wrong with what was given
    train_transformer(
        datasets, out, frozen, model_config, config, device=chosen, backend=backend.value, resume=resume,
        start_from=trained,
    )  # fmt: skip


@train_app.command()
def export(
    out: Annotated[Path, typer.Option(help="The model's folder: what `flexvar generate --model` takes.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer's run.")] = Path("runs/tokenizer"),
    transformer: Annotated[Path, typer.Option(help="Folder of the transformer's run.")] = Path("runs/transformer"),
) -> None:
    """Put a tokenizer and a transformer together, in half precision: `flexvar train export --out my-model`.

    The folder's `generation.json` says which guidance suits the model, at first what suits the demo; edit it freely.
    """
    import torch

    from flexvar.generation import FlexVARPipeline
    from flexvar.storage import load_tokenizer, load_transformer
    from flexvar.training.presets import DEMO_GENERATION

    FlexVARPipeline(load_tokenizer(tokenizer), load_transformer(transformer), defaults=DEMO_GENERATION).save_pretrained(
        out, dtype=torch.float16
    )


@train_app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="`demo`, or a folder; its classes must be the shapes'.")] = "demo",
    images_per_class: Annotated[int, typer.Option(help="Images of each class and schedule.", min=1)] = 20,
    classifier: Annotated[Path, typer.Option(help="Folder of the classifier's run; trained there if need be.")] = Path(
        "runs/classifier"
    ),
    backend: BackendOption = Backend.native,
) -> None:
    """Print how often a classifier names the class that was asked for, by schedule and aspect ratio, as Markdown."""
    from flexvar.generation import FlexVARPipeline
    from flexvar.training.evaluate import check_classes, evaluation_table, shape_classifier

    pipeline = FlexVARPipeline.from_pretrained(model, backend=backend.value)
    check_classes(pipeline)  # before the classifier is trained
    print(evaluation_table(pipeline, shape_classifier(classifier), images_per_class))


def _bound_product_caches() -> None:
    """On a CPU, 16-bit matrix products: torch and oneDNN each keep what they made for the last 1024 shapes.

    That is about a megabyte a shape, and a random schedule has new ones at every step: gigabytes of what is never used
    again. A step itself has fewer than these. Both are read when torch is loaded; what the user has set stays.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def _takes_bfloat16(dtype: TrainingPrecision | None, device: torch.device) -> bool:
    """Whether to multiply in bfloat16: as asked for, else where that is fast."""
    from flexvar.training.precision import multiplies_bfloat16

    if dtype is not None:
        return dtype == TrainingPrecision.bfloat16
    is_fast = multiplies_bfloat16(device)
    if not is_fast:
        print("flexvar: note: torch multiplies bfloat16 slowly on this CPU; training in float32", file=sys.stderr)
    return is_fast


def _override(config: ConfigT, **values: Any) -> ConfigT:
    """The config with the values that were given. Schedules of the run shrink and grow with its steps."""
    given = {name: value for name, value in values.items() if value is not None}
    if "steps" in given:
        for name in ("warmup_steps", "continuous_steps", "short_steps"):
            if hasattr(config, name):
                given[name] = getattr(config, name) * given["steps"] // config.steps
    return replace(config, **given)


def _folder(root: Path, height: int, width: int) -> ImageDataset:
    from flexvar.data import ImageFolder

    return ImageFolder(root, height, width)
