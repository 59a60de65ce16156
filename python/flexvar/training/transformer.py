"""Training of the transformer: cross-entropy of every scale's codes, on random schedules.

The tokenizer is frozen, so the latents of the whole data set are computed once. Every step then draws a batch and a
schedule, quantises the latents at the schedule's sizes and predicts all of its codes at once (teacher forcing).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from flexvar.data.dataset import ImageDataset, check_datasets, describe, shares, to_model_range
from flexvar.schedule import ScaleSchedule
from flexvar.storage import save_model, weights_checksum
from flexvar.tokenizer import MultiScaleTokenizer
from flexvar.training.config import TransformerTrainingConfig
from flexvar.training.curves import CURVES_NAME, draw_curves
from flexvar.training.loop import LOG_NAME, Losses, initialized_from, train
from flexvar.transformer import FlexVARTransformer, TransformerConfig, next_scale_inputs

ENCODE_BATCH = 64


def train_transformer(
    datasets: Sequence[ImageDataset],
    folder: str | Path,
    tokenizer: MultiScaleTokenizer,
    model_config: TransformerConfig,
    config: TransformerTrainingConfig,
    *,
    device: str | torch.device = "cpu",
    start_from: FlexVARTransformer | None = None,
    backend: str = "native",
    resume: bool = False,
    progress: bool = True,
) -> FlexVARTransformer:
    """Trains a transformer on the codes of a trained tokenizer.

    Args:
        datasets: labelled images with the same classes. Each has images of one size; several make a model that knows
            several aspect ratios. A batch comes from one of them, each as often as it is long.
        folder: gets the model (:func:`flexvar.storage.load_transformer`), loss curves, the log and the checkpoint.
        tokenizer: is moved to ``device`` and left in eval mode, otherwise unchanged.
        model_config: its codebook and upsampling mode must be the tokenizer's, its classes those of the data sets.
        start_from: a trained model of the same config whose weights to start from, for further training; else random.
        resume: continue the run in ``folder``, which must have had these configs, data sets and tokenizer.
        progress: show progress bars.

    On a CPU set LRU_CACHE_CAPACITY and ONEDNN_PRIMITIVE_CACHE_CAPACITY to 64 before torch is imported, as ``flexvar
    train`` does: torch keeps about a megabyte for each of the last 1024 shapes of a bfloat16 product, and random
    schedules bring new ones at every step.

    Returns:
        The transformer with averaged weights, in eval mode, on ``device``.

    Raises:
        ValueError: no images, configs that do not fit together, or as :func:`flexvar.training.loop.train`.
    """
    _check(datasets, tokenizer, model_config)
    device = torch.device(device)
    tokenizer = tokenizer.to(device).eval()
    encoded = [encode_dataset(dataset, tokenizer, bfloat16=config.bfloat16, progress=progress) for dataset in datasets]
    proportions = shares(datasets)
    with initialized_from(config.seed):
        model = FlexVARTransformer(model_config, backend=backend)
    if start_from is not None:
        if start_from.config != model_config:
            raise ValueError(
                f"train_transformer: start_from must have the config {model_config}, got {start_from.config}"
            )
        model.load_state_dict(start_from.state_dict())
    codebook = tokenizer.codebook.detach()

    def compute_losses(step: int, rng: np.random.Generator) -> Losses:
        short = step < config.short_steps
        latents, labels = encoded[rng.choice(len(encoded), p=proportions)]
        indices = torch.from_numpy(
            rng.integers(len(labels), size=config.short_batch_size if short else config.batch_size)
        )
        latent, class_labels = latents[indices].to(device).float(), labels[indices].to(device)
        schedule = random_schedule(rng, (latent.shape[2], latent.shape[3]), config.step_dropout, short=short)
        pyramid = tokenizer.quantize(latent, schedule)
        inputs = next_scale_inputs(
            pyramid,
            codebook,
            schedule,
            normalize=tokenizer.config.normalize_codes,
            mode=model_config.upsample_mode,
            backend=backend,
        )
        logits = model(class_labels, inputs, schedule).float()
        targets = torch.cat([grid.flatten(1) for grid in pyramid], dim=1)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        last = schedule.lengths[-1]
        with torch.no_grad():
            accuracy = (logits[:, -last:].argmax(-1) == targets[:, -last:]).float().mean()
            first_loss = F.cross_entropy(logits[:, :-last].flatten(0, 1), targets[:, :-last].flatten())
        return {"loss": loss, "loss_before_last_scale": first_loss, "accuracy_of_last_scale": accuracy}

    train(
        model,
        compute_losses,
        config,
        folder,
        description="transformer",
        values={
            "transformer": model_config.to_dict(),
            "tokenizer": tokenizer.config.to_dict(),
            "tokenizer_weights": weights_checksum(tokenizer.state_dict()),
            "data": [describe(dataset) for dataset in datasets],
        },
        device=device,
        resume=resume,
        progress=progress,
    )
    save_model(model, folder)
    draw_curves(Path(folder) / LOG_NAME, Path(folder) / CURVES_NAME)
    return model


@torch.no_grad()
def encode_dataset(
    dataset: ImageDataset, tokenizer: MultiScaleTokenizer, *, bfloat16: bool = False, progress: bool = True
) -> tuple[Tensor, Tensor]:
    """The latents of all images, float16 [N, codebook_dim, h, w], and their labels, int64 [N]; both on the CPU."""
    device = tokenizer.codebook.device
    patch_size, dim = tokenizer.config.patch_size, tokenizer.config.codebook_dim
    shape = (len(dataset), dim, dataset.height // patch_size, dataset.width // patch_size)
    latents, labels = torch.empty(shape, dtype=torch.float16), torch.empty(len(dataset), dtype=torch.int64)
    size = f"{dataset.width}x{dataset.height}"
    for start in tqdm(
        range(0, len(dataset), ENCODE_BATCH), desc=f"encoding {size}", unit="batch", disable=not progress
    ):
        part = slice(start, min(start + ENCODE_BATCH, len(dataset)))
        images, labels[part] = dataset.batch(range(part.start, part.stop))
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            latents[part] = tokenizer.encode(to_model_range(images.to(device))).half().cpu()
    return latents, labels


def random_schedule(
    rng: np.random.Generator, grid: tuple[int, int], step_dropout: float, *, short: bool = False
) -> ScaleSchedule:
    """A schedule that ends at ``grid``: one of the preset lengths 4 to 12, with steps dropped at random.

    Args:
        grid: (h, w) of the full latent.
        step_dropout: probability that a step is left out; the first and last stay.
        short: leave out the steps above half of the grid, unless all are, as of a grid of one token.
    """
    height, width = grid
    sizes = list(ScaleSchedule.for_image(height, width, steps=int(rng.integers(4, 12, endpoint=True)), patch_size=1))
    if short:
        sizes = [size for size in sizes if 2 * max(size) <= max(grid)] or sizes
    kept = rng.random(len(sizes)) >= step_dropout
    kept[[0, -1]] = True
    return ScaleSchedule(size for size, keep in zip(sizes, kept, strict=True) if keep)


def _check(datasets: Sequence[ImageDataset], tokenizer: MultiScaleTokenizer, model_config: TransformerConfig) -> None:
    check_datasets("train_transformer", datasets, tokenizer.config.patch_size)
    names = datasets[0].class_names
    if any(dataset.class_names != names for dataset in datasets) or len(names) != model_config.num_classes:
        raise ValueError(
            f"train_transformer: datasets must all have num_classes = {model_config.num_classes} classes, the same, "
            f"got {[dataset.class_names for dataset in datasets]}"
        )
    for name in ("codebook_size", "codebook_dim", "upsample_mode"):
        wanted, got = getattr(tokenizer.config, name), getattr(model_config, name)
        if got != wanted:
            raise ValueError(f"train_transformer: {name} must be that of the tokenizer, {wanted!r}, got {got!r}")
