"""Nearest code of a codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from flexvar_ext._checks import check_same_device, check_tensor
from flexvar_ext._registration import register_autocast


def vq_lookup(latents: Tensor, codebook: Tensor, *, normalize: bool = True) -> Tensor:
    """Index of the nearest code by Euclidean distance, the lowest on ties."""
    check_tensor("vq_lookup", "latents", latents, "[N, C]")
    check_tensor("vq_lookup", "codebook", codebook, "[V, C]")
    check_same_device("vq_lookup", latents=latents, codebook=codebook)
    result: Tensor = torch.ops.flexvar.vq_lookup(latents.float(), codebook.float(), normalize)
    return result


@torch.library.register_fake("flexvar::vq_lookup")
def _(latents: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    return latents.new_empty(latents.shape[0], dtype=torch.int64)


register_autocast("vq_lookup", to=torch.float32)
