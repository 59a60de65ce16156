"""GroupNorm and SiLU of the VQ-16 decoder's feature maps, in both memory formats, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flexvar_ext
from flexvar_ext import reference

SHAPES = [(1, 128, 256, 256), (1, 256, 128, 128), (1, 512, 32, 32)]
if torch.cuda.is_available():
    SHAPES.append((64, 128, 256, 256))
GROUPS = 32


def released(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """As the released model runs it: two torch ops in x's dtype."""
    return F.silu(F.group_norm(x, num_groups, weight, bias, 1e-6))


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, and a gradient of the result."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, grad = (randn(*shape).contiguous(memory_format=memory_format) for _ in range(2))
    return x, randn(shape[1]), randn(shape[1]), grad


def check(name: str, result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(result, expected, strict=True):
        tolerance = 1e-3 if a.dtype == torch.float32 else 2e-2
        scale = b.float().abs().max().item()  # bfloat16 rounds each of torch's steps, and weights sum 65,536 gradients
        assert (a.float() - b.float()).abs().max() <= tolerance * max(scale, 1.0), name


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(compare, device, shape, dtype, layout):
    x, weight, bias, _ = arguments(shape, dtype, layout == "channels last", device)

    def call(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor]]:
        @torch.inference_mode()
        def run() -> tuple[Tensor]:
            return (function(x, GROUPS, weight, bias),)

        return run

    compare(
        {
            "native": call(flexvar_ext.group_norm_silu),
            "reference": call(reference.group_norm_silu),
            "released": call(released),
            "compiled": call(torch.compile(released)),
        },
        check=check,
        bytes_moved=3 * x.nbytes,
        seconds=1.0,
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_forward_and_backward(compare, device, shape, dtype, layout):
    x, weight, bias, grad = arguments(shape, dtype, layout == "channels last", device)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]

    def call(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(function(x, GROUPS, weight, bias), leaves, grad)

    compare(
        {
            "native": call(flexvar_ext.group_norm_silu),
            "reference": call(reference.group_norm_silu),
            "released": call(released),
            "compiled": call(torch.compile(released)),
        },
        check=check,
        bytes_moved=8 * x.nbytes,
        seconds=1.0,
    )
