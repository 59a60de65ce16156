"""Position embeddings: one learned grid, resampled to the size of every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexvar._backend import ops
from flexvar.schedule import ScaleSchedule

_MAX_SCHEDULES = 8


def sine_grid(width: int, side: int) -> Tensor:
    """Initial position embeddings [1, width, side, side].

    Channel 2j holds sin(y w_j) and channel 2j + 1 cos(x w_j), with w_j = 10000^(-2j / width).
    """
    coordinate = torch.arange(side, dtype=torch.float64)
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    phase = frequency[:, None] * coordinate  # [ceil(width / 2), side]
    grid = torch.empty(width, side, side)
    grid[0::2] = phase.sin()[:, :, None]
    grid[1::2] = phase.cos()[: width // 2, None, :]
    return grid.unsqueeze(0)


def resample_positions(grid: Tensor, schedule: ScaleSchedule, backend: str) -> Tensor:
    """[1, width, side, side] -> [1, L, width]: the grid averaged down (or spread) to every step's size, as tokens."""
    resample2d = ops(backend).resample2d
    return (
        torch.cat([resample2d(grid, size, mode="area").flatten(2) for size in schedule], dim=2)
        .transpose(1, 2)
        .contiguous()
    )


class PositionCache:
    """Resampled position embeddings of the schedules used last, for as long as the grid's values stay.

    A change of the grid is noticed by its storage (``.to``, ``.cuda``) and by its version counter, which every in-place
    operation raises (optimizers, ``load_state_dict``, ``copy_``). Only writes through ``.data`` escape: call
    :meth:`clear` after such a write.
    """

    def __init__(self) -> None:
        self._entries: dict[ScaleSchedule, Tensor] = {}
        self._grid: Tensor | None = None  # keeps the storage alive, so that no other can take its address
        self._version = -1

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._grid = None

    def get(self, grid: nn.Parameter, schedule: ScaleSchedule, backend: str) -> Tensor:
        """:func:`resample_positions`, remembered unless gradients are being recorded or a graph is traced."""
        # Tensors made in inference mode count no versions, and a compiled graph must not hold what it was traced with.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or grid.is_inference():
            return resample_positions(grid, schedule, backend)
        if self._grid is None or self._grid.data_ptr() != grid.data_ptr() or self._version != grid._version:
            self.clear()
            self._grid, self._version = grid.detach(), grid._version
        positions = self._entries.get(schedule)
        if positions is None:
            if len(self._entries) >= _MAX_SCHEDULES:
                self._entries.clear()
            positions = self._entries[schedule] = resample_positions(grid, schedule, backend)
        return positions
