"""AdaLN of a d16 block: a step's tokens, alone, under autocast, with gradients, and behind a gated residual."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import flexvar_ext
from flexvar_ext import reference

WIDTH = 1024
# Rows, and tokens of each: both guided images at steps of a generation, all steps in training.
SIZES = [(2, 1), (2, 100), (2, 256), (2, 680)]
if torch.cuda.is_available():
    SIZES.append((64, 680))


def arguments(rows: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    given = {name: randn(rows, tokens, WIDTH) for name in ("x", "branch")}
    return given | {name: randn(rows, 1, WIDTH) for name in ("gate", "scale", "shift")}


def check(name: str, result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(result, expected, strict=True):
        tolerance = 1e-4 if a.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("residual", [False, True], ids=["norm", "residual"])
@pytest.mark.parametrize(("rows", "tokens"), SIZES)
def test_layer_norm_modulate(compare, device, rows, tokens, residual, autocast):
    given = arguments(rows, tokens, device)
    if autocast:
        given["branch"] = given["branch"].bfloat16()

    def call(ops) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            context = torch.autocast(device.type, dtype=torch.bfloat16) if autocast else nullcontext()
            with torch.inference_mode(), context:
                if residual:
                    return ops.residual_layer_norm_modulate(**given)
                return (ops.layer_norm_modulate(given["x"], given["scale"], given["shift"]),)

        return run

    written = 2 if autocast else 4
    moved = 4 + written + (4 + written if residual else 0)
    compare(
        {"native": call(flexvar_ext), "reference": call(reference)},
        check=check,
        bytes_moved=moved * given["x"].numel(),
        seconds=0.5,
    )


@pytest.mark.parametrize("residual", [False, True], ids=["norm", "residual"])
@pytest.mark.parametrize(("rows", "tokens"), SIZES[2:])
def test_forward_and_backward(compare, device, rows, tokens, residual):
    given = arguments(rows, tokens, device)
    weight = given["branch"].clone()
    names = ("x", "branch", "gate", "scale", "shift") if residual else ("x", "scale", "shift")
    leaves = [given[name].requires_grad_() for name in names]

    def call(ops) -> Callable[[], tuple[Tensor, ...]]:
        op = ops.residual_layer_norm_modulate if residual else ops.layer_norm_modulate
        weights = (weight, weight) if residual else (weight,)

        def run() -> tuple[Tensor, ...]:
            out = op(*leaves)
            return torch.autograd.grad(out if residual else (out,), leaves, weights)

        return run

    compare(
        {"native": call(flexvar_ext), "reference": call(reference)},
        check=lambda name, result, expected: [
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(result, expected, strict=True)
        ],
        bytes_moved=(10 if residual else 5) * given["x"].nbytes,
        seconds=1.0,
    )
