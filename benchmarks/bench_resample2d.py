"""Latents and images resized in every mode, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flexvar_ext
from flexvar_ext import reference

# (mode, antialias, shape, size): latents to a coarser scale, latents to a finer one, photographs to the training size
CASES = [
    ("area", False, (16, 32, 16, 16), (10, 10)),
    ("bilinear", True, (16, 32, 16, 16), (10, 10)),
    ("bicubic", False, (16, 32, 13, 13), (16, 16)),
    ("bilinear", False, (16, 32, 13, 13), (16, 16)),
    ("nearest", False, (4, 128, 64, 64), (128, 128)),
    ("bilinear", True, (4, 3, 640, 480), (256, 256)),
    ("bicubic", False, (4, 3, 256, 256), (512, 512)),
]
if torch.cuda.is_available():
    CASES.append(("area", False, (64, 32, 16, 16), (8, 8)))


def check(name: str, result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize(("mode", "antialias", "shape", "size"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_forward(compare, device, mode, antialias, shape, size, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    if antialias and dtype != torch.float32 and device.type == "cpu":
        pytest.skip("torch has no 16-bit antialiasing on the CPU")

    def call(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        @torch.inference_mode()
        def run() -> Tensor:
            return function(x, size, mode=mode, antialias=antialias)

        return run

    compare(
        {"native": call(flexvar_ext.resample2d), "reference": call(reference.resample2d)},
        check=check if dtype == torch.float32 else check_16_bit,
        bytes_moved=x.element_size() * (x.numel() + shape[0] * shape[1] * size[0] * size[1]),
        seconds=1.0,
    )


def check_16_bit(name: str, result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=4e-2, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize(("mode", "antialias", "shape", "size"), CASES[:4])
def test_backward(compare, device, mode, antialias, shape, size):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    weight = torch.randn(*shape[:2], *size, generator=torch.Generator().manual_seed(1)).to(device)

    def call(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        out = function(x, size, mode=mode, antialias=antialias)
        return lambda: torch.autograd.grad(out, x, weight, retain_graph=True)[0]

    compare(
        {"native": call(flexvar_ext.resample2d), "reference": call(reference.resample2d)},
        check=check,
        bytes_moved=4 * (x.numel() + weight.numel()),
        seconds=1.0,
    )
