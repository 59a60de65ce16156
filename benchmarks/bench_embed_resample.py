"""Codes to the next scale's tokens: gather, normalise, resize, token layout; alone and with the codebook's gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flexvar_ext
from flexvar_ext import reference

CODES, DIM = 8912, 32
# (batch, side of the codes' grid, side of the tokens'): the last steps of 256 and 512 pixel images
SHAPES = [(1, 13, 16), (64, 13, 16), (1, 23, 32), (64, 10, 13)]


def check(name: str, result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize(("batch", "grid", "side"), SHAPES)
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_forward(compare, device, batch, grid, side, mode):
    random = torch.Generator().manual_seed(0)
    codebook = torch.randn(CODES, DIM, generator=random).to(device)
    indices = torch.randint(CODES, (batch, grid, grid), generator=random).to(device)
    compiled = torch.compile(reference.embed_resample, fullgraph=True)

    def call(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(indices, codebook, (side, side), mode=mode)

    with torch.inference_mode():
        compare(
            {
                "native": call(flexvar_ext.embed_resample),
                "reference": call(reference.embed_resample),
                "compiled": call(compiled),
            },
            check=check,
            bytes_moved=4 * batch * DIM * (grid**2 + side**2),
            targets={"compiled": 3 if device.type == "cuda" else 4},
        )


@pytest.mark.parametrize(("batch", "grid", "side"), [(8, 13, 16), (64, 13, 16)])
def test_forward_and_backward(compare, device, batch, grid, side):
    random = torch.Generator().manual_seed(0)
    codebook = torch.randn(CODES, DIM, generator=random).to(device).requires_grad_()
    indices = torch.randint(CODES, (batch, grid, grid), generator=random).to(device)
    weight = torch.randn(batch, side * side, DIM, generator=random).to(device)
    compiled = torch.compile(reference.embed_resample, fullgraph=True)

    def call(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            return torch.autograd.grad(function(indices, codebook, (side, side)), codebook, weight)[0]

        return run

    compare(
        {
            "native": call(flexvar_ext.embed_resample),
            "reference": call(reference.embed_resample),
            "compiled": call(compiled),
        },
        check=check,
        bytes_moved=4 * (2 * batch * DIM * (grid**2 + side**2) + CODES * DIM),
    )
