"""The decoder: codes to 256 px pictures, against torch's channels-last convolutions, compiled."""

from __future__ import annotations

import pytest
import torch
from flexvar import MultiScaleTokenizer, TokenizerConfig

from benchmarks.measure import PRODUCT_DTYPES

CPU_CASES = [(dtype, 1) for dtype in PRODUCT_DTYPES]
CUDA_CASES = [(torch.bfloat16, 1), (torch.bfloat16, 64)]
FLOPS = 225.9e9  # of an image's convolutions, with upsampling folded into them


def make_tokenizer(
    backend: str, device: torch.device, dtype: torch.dtype, weights: MultiScaleTokenizer | None = None
) -> MultiScaleTokenizer:
    """Random weights, or those of another tokenizer."""
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(TokenizerConfig(), backend=backend).eval()
    if weights is not None:
        tokenizer.load_state_dict(weights.state_dict())
    return tokenizer.to(device, dtype)


def case_id(value: torch.dtype | int) -> str:
    return f"batch {value}" if isinstance(value, int) else str(value).removeprefix("torch.")


@pytest.mark.parametrize(("dtype", "batch"), CUDA_CASES if torch.cuda.is_available() else CPU_CASES, ids=case_id)
def test_decode(compare, device, dtype, batch):
    native = make_tokenizer("native", device, dtype)
    reference = make_tokenizer("reference", device, dtype, weights=native)
    channels_last = make_tokenizer("reference", device, dtype, weights=native).to(memory_format=torch.channels_last)
    compiled = torch.compile(channels_last.decode)
    codes = torch.randint(native.config.codebook_size, (batch, 16, 16), device=device)

    def check(name, result, expected):
        tolerance = 1e-3 if dtype == torch.float32 else 0.2
        torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)

    with torch.inference_mode():
        compare(
            {
                "native": lambda: native.decode(codes),
                "reference": lambda: reference.decode(codes),
                "compiled": lambda: compiled(codes),
            },
            check=check,
            flops=FLOPS * batch,
            gemm=str(dtype).removeprefix("torch."),
            targets={"compiled": 1.5} if device.type == "cuda" else None,
            images=batch,
        )
