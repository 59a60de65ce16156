"""A small convolutional classifier: the judge of whether generated images show the class that was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar.data.dataset import ImageDataset, to_model_range
from flexvar.training.config import TrainingConfig
from flexvar.training.loop import Losses, initialized_from, train

DEFAULT_CONFIG = TrainingConfig(steps=500, batch_size=48, learning_rate=2e-3, warmup_steps=20, ema_decay=0.98)


class ShapeClassifier(nn.Module):
    """[B, 3, H, W] in [-1, 1], of any size -> logits [B, num_classes]."""

    def __init__(self, num_classes: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out_channels in (width, 2 * width, 4 * width, 4 * width):
            layers += [
                nn.Conv2d(channels, out_channels, 3, stride=2, padding=1),
                nn.GroupNorm(8, out_channels),
                nn.SiLU(),
                nn.Conv2d(out_channels, out_channels, 3, padding=1),
                nn.GroupNorm(8, out_channels),
                nn.SiLU(),
            ]
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        # The largest response over all places: a shape is somewhere, and the image may have any size.
        return self.head(self.features(images).amax(dim=(2, 3)))


def train_classifier(
    datasets: list[ImageDataset],
    folder: str | Path,
    config: TrainingConfig = DEFAULT_CONFIG,
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: bool = True,
) -> ShapeClassifier:
    """Trains a classifier on data sets that share their classes. Errors as :func:`flexvar.training.loop.train`."""
    device = torch.device(device)
    names = datasets[0].class_names
    with initialized_from(config.seed):
        model = ShapeClassifier(len(names))

    def compute_losses(step: int, rng: np.random.Generator) -> Losses:
        dataset = datasets[int(rng.integers(len(datasets)))]
        images, labels = dataset.batch(rng.integers(len(dataset), size=config.batch_size).tolist())
        logits = model(to_model_range(images.to(device))).float()
        labels = labels.to(device)
        return {"loss": F.cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}

    train(
        model,
        compute_losses,
        config,
        folder,
        description="classifier",
        values={"classes": list(names)},
        device=device,
        resume=resume,
        progress=progress,
    )
    return model


@torch.inference_mode()
def accuracy(model: ShapeClassifier, images: Tensor, labels: Tensor, batch_size: int = 64) -> float:
    """The part of the images (float [N, 3, H, W] in [-1, 1]) whose label (int64 [N]) the model names."""
    right = 0
    for part, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        right += int((model(part).argmax(1) == truth).sum())
    return right / len(labels)
