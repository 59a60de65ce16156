"""The linear layers of a d16 block: a step's tokens by width, with what follows in the block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flexvar_ext
from benchmarks.measure import PRODUCT_DTYPES
from flexvar_ext import reference

# (K, N, what follows)
LAYERS = {"qkv": (1024, 3072), "proj": (1024, 1024), "fc1": (1024, 4096), "fc2": (4096, 1024), "head": (1024, 8912)}
TOKENS = [2, 8, 18, 32, 50, 72, 128, 200, 338, 512]  # both guided images of each step of the 10-step schedule
if torch.cuda.is_available():
    TOKENS = [2, 18, 50, 128, 200, 512, 32768]


def arguments(layer: str, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | str]:
    depth, columns = LAYERS[layer]
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    given: dict[str, Tensor | str] = {
        "x": randn(2, tokens // 2, depth),
        "weight": randn(columns, depth) * depth**-0.5,
        "bias": randn(columns),
    }
    if layer == "fc1":
        given["activation"] = "gelu_tanh"
    if layer in ("proj", "fc2"):
        given |= {"gate": randn(2, 1, columns), "residual": randn(2, tokens // 2, columns)}
    return given


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_linear(compare, device, layer, tokens, dtype):
    given = arguments(layer, tokens, dtype, device)

    def call(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        @torch.inference_mode()
        def run() -> Tensor:
            return function(**given)

        return run

    def check(name: str, result: Tensor, expected: Tensor) -> None:
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")

    depth, columns = LAYERS[layer]
    compare(
        {"native": call(flexvar_ext.linear), "reference": call(reference.linear)},
        check=check,
        flops=2 * tokens * depth * columns,
        gemm=str(dtype).removeprefix("torch."),
        bytes_moved=given["weight"].nbytes,
        seconds=0.5,
    )
