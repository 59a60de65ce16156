"""The CUDA kernel of resample2d, run on the CPU against float64."""

import numpy as np
import pytest
import torch

from flexvar_ext import reference

MODES = {  # in the order of the C++ enumeration ResampleMode
    "nearest": ("nearest", False),
    "bilinear": ("bilinear", False),
    "bilinear_antialias": ("bilinear", True),
    "bicubic": ("bicubic", False),
    "area": ("area", False),
}
# (planes, (height, width) in, (height, width) out): one pixel, tiles that end inside the image, more taps than a chunk.
SHAPES = [
    (3, (1, 1), (3, 2)),
    (5, (16, 13), (1, 1)),
    (2, (5, 7), (9, 40)),
    (9, (10, 10), (13, 13)),
    (2, (40, 35), (3, 4)),
]


def exact(planes: np.ndarray, size: tuple[int, int], mode: str, adjoint: bool) -> torch.Tensor:
    name, antialias = MODES[mode]
    x = torch.from_numpy(planes).double()[None]
    if not adjoint:
        return reference.resample2d(x, size, mode=name, antialias=antialias)[0]
    leaf = torch.zeros(1, len(planes), *size, dtype=torch.float64, requires_grad=True)
    out = reference.resample2d(leaf, tuple(planes.shape[1:]), mode=name, antialias=antialias)
    return torch.autograd.grad(out, leaf, x)[0][0]


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(emulated, run_in_every_order, shape, mode, adjoint):
    planes, in_size, out_size = shape
    if adjoint:
        in_size, out_size = out_size, in_size
    x = np.random.default_rng(0).standard_normal((planes, *in_size)).astype(np.float32)
    expected = exact(x, out_size, mode, adjoint)
    for many_planes in (False, True):
        arguments = (*out_size, list(MODES).index(mode), adjoint, many_planes)
        (out,) = run_in_every_order(emulated.resample2d, x, *arguments)
        torch.testing.assert_close(torch.from_numpy(out).double(), expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_other_dtypes(emulated, run_in_every_order, mode, dtype, tolerance):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 6, 9))).to(dtype)
    expected = exact(x.double().numpy(), (8, 5), mode, False)
    array = x.view(torch.uint16).numpy() if dtype == torch.bfloat16 else x.numpy()
    (out,) = run_in_every_order(emulated.resample2d, array, 8, 5, list(MODES).index(mode), False, False, misalignment=1)
    result = torch.from_numpy(out).view(dtype) if dtype == torch.bfloat16 else torch.from_numpy(out)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)
