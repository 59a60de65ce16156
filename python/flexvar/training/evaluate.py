"""How often a classifier names the class that was asked for: the table that ``flexvar train evaluate`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from flexvar.data import SHAPE_NAMES, ImageDataset, ShapeDataset
from flexvar.data.dataset import to_model_range
from flexvar.generation import FlexVARPipeline
from flexvar.schedule import ScaleSchedule
from flexvar.training.checkpoint import has_checkpoint, load_checkpoint
from flexvar.training.classifier import DEFAULT_CONFIG, ShapeClassifier, accuracy, train_classifier
from flexvar.training.precision import multiplies_bfloat16

STEPS = range(4, 13)
DEFAULT_STEPS = 10
SQUARE, WIDE, TALL = (64, 64), (48, 96), (96, 48)  # (height, width) in pixels
LARGER = ((1.5, (96, 96)), (2, (128, 128)), (3, (192, 192)))  # than in training, by a factor
REAL_IMAGES = 600
BATCH = 48  # images of 64 x 64; fewer of larger ones
TRAINING_SEED, TEST_SEED = 1, 2  # of the classifier's data; the models' own data is of seed 0


def classifier_data(seed: int, squares: int, others: int) -> list[ImageDataset]:
    """Square, wide and tall images of shapes."""
    return [
        ShapeDataset(squares, *SQUARE, seed=seed),
        ShapeDataset(others, *WIDE, seed=seed),
        ShapeDataset(others, *TALL, seed=seed),
    ]


def check_classes(pipeline: FlexVARPipeline) -> None:
    """Raises ValueError unless a model's classes are those that the classifier knows, in their order."""
    if pipeline.class_names != SHAPE_NAMES:
        raise ValueError(
            f"evaluate: the model's classes must be the shapes {', '.join(SHAPE_NAMES)}, "
            f"got {', '.join(pipeline.class_names) or 'none with a name'}"
        )


def shape_classifier(folder: str | Path) -> ShapeClassifier:
    """The classifier of a run in ``folder``, trained there first where there is none (about a minute)."""
    folder = Path(folder)
    resume, bfloat16 = has_checkpoint(folder), multiplies_bfloat16("cpu")
    if resume:  # as it was begun, be it on another machine
        bfloat16 = load_checkpoint(folder)[2].get("training", {}).get("bfloat16", bfloat16)
    config = replace(DEFAULT_CONFIG, bfloat16=bfloat16)
    return train_classifier(classifier_data(TRAINING_SEED, 48_000, 12_000), folder, config, resume=resume)


def real_accuracy(classifier: ShapeClassifier, dataset: ImageDataset) -> float:
    """The part of a data set that the classifier names rightly."""
    images, labels = dataset.batch(range(len(dataset)))
    return accuracy(classifier, as_judged(to_model_range(images)), labels)


def as_judged(images: Tensor) -> Tensor:
    """[N, 3, H, W] as the classifier knows images: those larger than it was trained on are shrunk to squares of 64."""
    if images.shape[2] * images.shape[3] <= SQUARE[0] * SQUARE[1] * 1.2:
        return images
    return F.interpolate(images, SQUARE, mode="bilinear", antialias=True)


def generated_accuracy(
    pipeline: FlexVARPipeline,
    classifier: ShapeClassifier,
    size: tuple[int, int],
    steps: int | None,
    images_per_class: int,
) -> float:
    """The part of the generated images, of ``size`` (height, width) px, whose class the classifier names rightly.

    ``steps`` is the number of steps; None is the default schedule of the size.
    """
    labels = [label for label in range(len(pipeline.class_names)) for _ in range(images_per_class)]
    right = 0
    batch = max(1, BATCH * SQUARE[0] * SQUARE[1] // (size[0] * size[1]))
    for start in range(0, len(labels), batch):
        part = labels[start : start + batch]
        ids = list(range(start, start + len(part)))
        images = pipeline(
            part, seed=0, image_ids=ids, height=size[0], width=size[1], steps=steps, output_type="pt"
        ).images
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"generated_accuracy: images must be a tensor, got {type(images).__name__}")
        right += round(len(part) * accuracy(classifier, as_judged(images.clamp(-1, 1).cpu()), torch.tensor(part)))
    return right / len(labels)


def evaluation_table(
    pipeline: FlexVARPipeline, classifier: ShapeClassifier, images_per_class: int, steps: Sequence[int] = STEPS
) -> str:
    """The Markdown table: real images, numbers of steps, aspect ratios, sizes beyond those of training.

    Raises ValueError for a model of other classes.
    """
    check_classes(pipeline)
    jobs: list[tuple[str, tuple[int, int], int | None]] = []
    jobs += [(f"{n} steps{' (default)' if n == DEFAULT_STEPS else ''}", SQUARE, n) for n in steps]
    jobs += [("1:2, 10 steps", TALL, DEFAULT_STEPS), ("2:1, 10 steps", WIDE, DEFAULT_STEPS)]
    for factor, size in LARGER:
        schedule = ScaleSchedule.for_image(*size, patch_size=pipeline.patch_size)
        jobs.append((f"{factor:g} times the trained size, {len(schedule)} steps", size, None))
    lines = ["| images | size | named rightly |", "|---|---|---|"]
    for size in (SQUARE, TALL, WIDE, *(size for _, size in LARGER)):
        real = real_accuracy(classifier, ShapeDataset(REAL_IMAGES, *size, seed=TEST_SEED))
        lines.append(f"| real | {size[1]} × {size[0]} | {100 * real:.1f} % |")
    for name, size, count in tqdm(jobs, desc="evaluating", unit="schedule"):
        part = generated_accuracy(pipeline, classifier, size, count, images_per_class)
        lines.append(f"| {name} | {size[1]} × {size[0]} | {100 * part:.1f} % |")
    return "\n".join(lines)
