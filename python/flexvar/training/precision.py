"""What a device multiplies in."""

from __future__ import annotations

import torch


def multiplies_bfloat16(device: str | torch.device) -> bool:
    """Whether torch's products of bfloat16 are worth having there: on a CPU without AVX-512 they are a loop of scalars,
    some hundred times slower than float32."""
    if torch.device(device).type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
