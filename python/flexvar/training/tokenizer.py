"""Training of the multi-scale tokenizer.

Each batch is encoded once; the latent is resampled to a few random sizes and to its own, quantised and decoded at each,
and every reconstruction is compared with the image at that size (arXiv 2502.20313, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flexvar._backend import ops
from flexvar.data.dataset import ImageDataset, check_datasets, describe, shares, to_model_range
from flexvar.schedule import ScaleSchedule
from flexvar.storage import save_model
from flexvar.tokenizer import MultiScaleTokenizer, TokenizerConfig
from flexvar.training.config import TokenizerTrainingConfig
from flexvar.training.curves import CURVES_NAME, draw_curves
from flexvar.training.loop import LOG_NAME, Losses, initialized_from, train
from flexvar.training.losses import gradient_loss, reconstruction_loss

REVIVE_BATCHES = 8


def train_tokenizer(
    datasets: Sequence[ImageDataset],
    folder: str | Path,
    model_config: TokenizerConfig,
    config: TokenizerTrainingConfig,
    *,
    device: str | torch.device = "cpu",
    backend: str = "native",
    resume: bool = False,
    progress: bool = True,
) -> MultiScaleTokenizer:
    """Trains a tokenizer from scratch.

    Args:
        datasets: images. Each has images of one size, multiples of the tokenizer's patch size. A batch comes from one
            of them, each as often as it is long. Labels are not used.
        folder: gets the model (:func:`flexvar.storage.load_tokenizer`), loss curves, the log and the checkpoint.
        resume: continue the run in ``folder``, which must have had these configs and data sets.
        progress: show a progress bar.

    Returns:
        The tokenizer with averaged weights, in eval mode, on ``device``.

    Raises:
        ValueError: an empty data set, an image size that does not fit, or as :func:`flexvar.training.loop.train`.
    """
    check_datasets("train_tokenizer", datasets, model_config.patch_size)
    proportions = shares(datasets)
    device = torch.device(device)
    with initialized_from(config.seed):
        tokenizer = MultiScaleTokenizer(model_config, backend=backend)

    def draw_images(rng: np.random.Generator) -> Tensor:
        dataset = datasets[rng.choice(len(datasets), p=proportions)]
        images, _ = dataset.batch(rng.integers(len(dataset), size=config.batch_size).tolist())
        return to_model_range(images.to(device))

    def compute_losses(step: int, rng: np.random.Generator) -> Losses:
        images = draw_images(rng)
        latent = tokenizer.encode(images).float()
        sizes = random_sizes(rng, (latent.shape[2], latent.shape[3]), config.num_scales)
        codebook = commitment = latent.new_zeros(())
        if step < config.continuous_steps:
            codes = [continuous_codes(tokenizer, latent, size) for size in sizes]
        else:
            revive(step, rng)
            scales = tokenizer.quantize_straight_through(latent, sizes)
            codes = [scale.codes for scale in scales]
            codebook = torch.stack([scale.codebook_loss for scale in scales]).mean()
            commitment = torch.stack([scale.commitment_loss for scale in scales]).mean()
        differences = []
        for grid_codes in codes:
            decoded = tokenizer.decode(grid_codes).float()
            target = F.interpolate(images, decoded.shape[2:], mode="bilinear", align_corners=False, antialias=True)
            differences.append(decoded - target)
        reconstruction = torch.stack([reconstruction_loss(d) for d in differences]).mean()
        gradient = torch.stack([gradient_loss(d) for d in differences]).mean()
        loss = (
            reconstruction
            + config.gradient_weight * gradient
            + config.codebook_weight * codebook
            + config.commitment_weight * commitment
        )
        return {
            "loss": loss,
            "reconstruction": reconstruction,
            "gradient": gradient,
            "codebook": codebook,
            "mean_absolute_error": differences[-1].abs().mean(),  # at the full size, of images in [-1, 1]
        }

    @torch.no_grad()
    def revive(step: int, rng: np.random.Generator) -> None:
        starts = step == config.continuous_steps
        if not starts and (not config.revive_every or step % config.revive_every or 2 * step >= config.steps):
            return
        # One batch holds too few latents to tell which codes are unused.
        latents = [tokenizer.encode(draw_images(rng)).float() for _ in range(REVIVE_BATCHES)]
        every_code = torch.arange(model_config.codebook_size, device=device)
        move_codes_to_latents(
            tokenizer, every_code if starts else unused_codes(tokenizer, latents, rng, config.num_scales), latents
        )

    train(
        tokenizer,
        compute_losses,
        config,
        folder,
        description="tokenizer",
        values={"tokenizer": model_config.to_dict(), "data": [describe(dataset) for dataset in datasets]},
        device=device,
        resume=resume,
        progress=progress,
    )
    save_model(tokenizer, folder)
    draw_curves(Path(folder) / LOG_NAME, Path(folder) / CURVES_NAME)
    return tokenizer


def random_sizes(rng: np.random.Generator, grid: tuple[int, int], count: int) -> ScaleSchedule:
    """``count`` sizes in rising order: random ones of the grid's aspect ratio, from one token up, then the grid."""
    height, width = grid
    longer = max(grid)
    sides = np.sort(rng.integers(1, longer, size=count - 1, endpoint=True)).tolist()
    return ScaleSchedule(
        [(max(1, height * side // longer), max(1, width * side // longer)) for side in sides] + [(height, width)]
    )


def continuous_codes(tokenizer: MultiScaleTokenizer, latent: Tensor, size: tuple[int, int]) -> Tensor:
    """A latent [B, codebook_dim, H, W] at a size (h, w), as it goes to the codebook: [B, codebook_dim, h, w]."""
    config = tokenizer.config
    codes = ops(tokenizer.backend).resample2d(
        latent, size, mode=config.downsample_mode, antialias=config.downsample_antialias
    )
    return F.normalize(codes, dim=1) if config.normalize_codes else codes


@torch.no_grad()
def unused_codes(
    tokenizer: MultiScaleTokenizer, latents: Sequence[Tensor], rng: np.random.Generator, num_scales: int
) -> Tensor:
    """int64 [N]: the codes that none of the latents [B, codebook_dim, h, w] uses, each at random sizes and its own."""
    used = torch.zeros(len(tokenizer.codebook), dtype=torch.bool, device=latents[0].device)
    for latent in latents:
        sizes = random_sizes(rng, (latent.shape[2], latent.shape[3]), num_scales)
        for indices in tokenizer.quantize(latent, sizes):
            used[indices.flatten()] = True
    return (~used).nonzero().squeeze(1)


@torch.no_grad()
def move_codes_to_latents(tokenizer: MultiScaleTokenizer, codes: Tensor, latents: Sequence[Tensor]) -> None:
    """Sets each code of ``codes`` (int64 [N]) to a random vector of the latents [B, codebook_dim, h, w]."""
    vectors = torch.cat([latent.movedim(1, -1).flatten(0, 2) for latent in latents]).to(tokenizer.codebook.dtype)
    if tokenizer.config.normalize_codes:
        vectors = F.normalize(vectors, dim=1)
    tokenizer.codebook[codes] = vectors[torch.randint(len(vectors), (len(codes),), device=vectors.device)]
