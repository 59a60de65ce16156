"""Tokens that are not drawn because their codes are known."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class KnownTokens:
    """What is known of every step.

    Args:
        codes: for every step int64 [B, h_i, w_i], or with B = 1 for all images; read where they are known.
        cells: for every step bool [B, h_i, w_i], or with B = 1, True where the code is known.

    Attributes:
        complete: for every step, whether every code of every image is known.
        num_drawn_steps: steps up to and with the last that is not complete; those after it need no model.
    """

    codes: list[Tensor]
    cells: list[Tensor]
    complete: tuple[bool, ...] = field(init=False)
    num_drawn_steps: int = field(init=False)

    def __post_init__(self) -> None:
        complete = tuple(bool(cells.all()) for cells in self.cells)
        object.__setattr__(self, "complete", complete)
        drawn = [step + 1 for step, is_complete in enumerate(complete) if not is_complete]
        object.__setattr__(self, "num_drawn_steps", max(drawn, default=0))

    def force(self, step: int, drawn: Tensor) -> Tensor:
        """int64 [B, h, w] with the known codes of a step in their places."""
        return torch.where(self.cells[step], self.codes[step], drawn)

    def whole(self, step: int, batch: int) -> Tensor:
        """All codes of a complete step, int64 [batch, h, w]."""
        return self.codes[step].expand(batch, -1, -1).clone()
