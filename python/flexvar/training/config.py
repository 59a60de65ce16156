"""What can be set about a training run."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from flexvar._config import JsonConfig


@dataclass(frozen=True)
class TrainingConfig(JsonConfig):
    """What both trainings share: AdamW with betas (0.9, 0.95), linear warm-up, then linear decay to a tenth.

    Attributes:
        steps: optimiser steps in all.
        batch_size: images a step.
        learning_rate: the highest, reached at the end of the warm-up.
        warmup_steps: steps over which the learning rate rises from 0.
        weight_decay: of matrices and convolutions; biases, norms and embeddings have none.
        gradient_clip: largest norm of all gradients together.
        ema_decay: of the moving average of the weights, which is what a run delivers.
        bfloat16: matrix products and convolutions in bfloat16 (autocast); weights stay float32. Where torch multiplies
            bfloat16 in a loop of scalars, on CPUs without AVX-512, a run warns: it takes many times as long as in
            float32.
        seed: of everything random. Step s draws from a generator of (seed, s) alone.
        checkpoint_every: steps between checkpoints; the last step always has one.
    """

    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.05
    gradient_clip: float = 2.0
    ema_decay: float = 0.99
    bfloat16: bool = True
    seed: int = 0
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        self._check_int("steps", 1, 1 << 40)
        self._check_int("batch_size", 1, 1 << 20)
        self._check_int("warmup_steps", 0, 1 << 40)
        self._check_int("seed", 0, 1 << 62)
        self._check_int("checkpoint_every", 1, 1 << 40)
        self._check_bool("bfloat16")
        self._check_probability("ema_decay")
        for name in ("learning_rate", "gradient_clip"):
            self._check_number(name)
            if getattr(self, name) <= 0:
                raise ValueError(f"{type(self).__name__}: {name} must be above 0, got {getattr(self, name)}")
        self._check_weight("weight_decay")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step 0, 1, …"""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (1 - 0.9 * done)

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{type(self).__name__}: {name} must be a float, got {value!r}")
        if not abs(value) <= sys.float_info.max:  # NaN, infinity, or an int that is no float
            raise ValueError(f"{type(self).__name__}: {name} must be finite, got {value}")

    def _check_weight(self, name: str) -> None:
        self._check_number(name)
        if getattr(self, name) < 0:
            raise ValueError(f"{type(self).__name__}: {name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class TokenizerTrainingConfig(TrainingConfig):
    """Training of the tokenizer.

    Attributes:
        num_scales: sizes at which each batch is quantised and decoded; the last is the full grid (the paper's K).
        gradient_weight: of the L1 distance between image gradients, which keeps edges sharp.
        codebook_weight: of the loss that pulls codes to latents.
        commitment_weight: of the loss that pulls latents to codes.
        continuous_steps: the first steps leave latents unquantised; the codebook then starts from latents of the data.
        revive_every: steps between moves of unused codes onto latents of the data, in the first half; 0 is never.
    """

    num_scales: int = 5
    gradient_weight: float = 1.0
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    continuous_steps: int = 100
    revive_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_int("num_scales", 1, 64)
        self._check_int("continuous_steps", 0, 1 << 40)
        self._check_int("revive_every", 0, 1 << 40)
        for name in ("gradient_weight", "codebook_weight", "commitment_weight"):
            self._check_weight(name)


@dataclass(frozen=True)
class TransformerTrainingConfig(TrainingConfig):
    """Training of the transformer.

    Attributes:
        step_dropout: part of the steps left out of a schedule; the first and last stay.
        short_steps: the first steps of the run train on schedules without the scales above half of the grid: a prefix
            of the full schedules that costs a quarter, and decides what the image shows.
        short_batch_size: images a step during these.
    """

    step_dropout: float = 0.1
    short_steps: int = 0
    short_batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_probability("step_dropout")
        self._check_int("short_steps", 0, 1 << 40)
        self._check_int("short_batch_size", 1, 1 << 20)
