"""What the transformer reads: the codes of every step on the next step's grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexvar._backend import ops
from flexvar._checks import check_schedule, describe
from flexvar.schedule import ScaleSchedule


def next_scale_inputs(
    pyramid: Sequence[Tensor],
    codebook: Tensor,
    schedule: ScaleSchedule,
    *,
    normalize: bool = True,
    mode: str = "bicubic",
    backend: str = "native",
) -> Tensor:
    """Inputs of teacher forcing: the codes of step i, resampled to the size of step i + 1, for all steps but the first.

    Args:
        pyramid: for every step int64 [B, h_i, w_i]; the last grid is not needed and may be left out.
        codebook: [V, codebook_dim], as stored in the tokenizer.
        schedule: the size of every step.
        normalize: ``TokenizerConfig.normalize_codes`` of the tokenizer.
        mode: ``TransformerConfig.upsample_mode`` of the model.
        backend: "native", or "reference" for the plain-PyTorch ops.

    Returns:
        [B, L - L_0, codebook_dim] in the codebook's dtype, L_0 being the tokens of the first step. Differentiable in
        the codebook.

    Raises:
        TypeError: something else than a schedule, or a grid that is not an int64 tensor.
        ValueError: another number of grids than steps, another shape than the schedule's, or (on a CPU) an index
            outside the codebook.
    """
    check_schedule("next_scale_inputs", schedule)
    steps = len(schedule)
    if len(pyramid) not in (steps, steps - 1):
        raise ValueError(
            f"next_scale_inputs: pyramid must hold one grid per step, {steps} (or all but the last), got {len(pyramid)}"
        )
    for step, (grid, size) in enumerate(zip(pyramid, schedule, strict=False)):
        if not isinstance(grid, Tensor) or grid.dtype != torch.int64:
            raise TypeError(f"next_scale_inputs: pyramid[{step}] must be an int64 tensor, got {describe(grid)}")
        if grid.ndim != 3 or grid.shape[0] != pyramid[0].shape[0] or tuple(grid.shape[1:]) != size:
            raise ValueError(
                f"next_scale_inputs: pyramid[{step}] must have shape [B, h, w] with (h, w) = {size} as scheduled, "
                f"got {tuple(grid.shape)}"
            )
    if steps == 1:
        batch = pyramid[0].shape[0] if pyramid else 0
        return codebook.new_empty(batch, 0, codebook.shape[1])
    embed_resample = ops(backend).embed_resample
    return torch.cat(
        [
            embed_resample(grid, codebook, size, normalize=normalize, mode=mode)
            for grid, size in zip(pyramid, schedule[1:], strict=False)
        ],
        dim=1,
    )
