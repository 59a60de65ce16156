"""The CUDA launchers of resample2d, run on the CPU against float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from flexvar_ext import reference

MODES = [("nearest", False), ("bilinear", False), ("bilinear", True), ("bicubic", False), ("area", False)]
# (planes, (height, width) in, (height, width) out): one pixel, tiles that end inside the image, more taps than a chain,
# several groups of planes in a block, more taps than there is room for in both directions, and in one.
SHAPES = [
    (3, (1, 1), (3, 2)),
    (5, (16, 13), (1, 1)),
    (2, (5, 7), (9, 40)),
    (9, (10, 10), (13, 13)),
    (2, (40, 35), (3, 4)),
    (21, (6, 7), (4, 4)),
    (1, (70, 101), (2, 3)),
    (5, (4, 90), (5, 2)),
]


def planes_of(planes: int, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    numbers = np.random.default_rng(0).standard_normal((1, planes, *size))
    return torch.from_numpy(numbers).to(dtype)


def check(launch, x: Tensor, size, mode, adjoint=False, rtol=1e-5, atol=5e-6, **options) -> None:
    if adjoint:
        leaf = torch.zeros(*x.shape[:2], *size, dtype=torch.float64, requires_grad=True)
        out = reference.resample2d(leaf, tuple(x.shape[2:]), mode=mode[0], antialias=mode[1])
        (expected,) = torch.autograd.grad(out, leaf, x.double())
    else:
        expected = reference.resample2d(x.double(), size, mode=mode[0], antialias=mode[1])
    (out,) = launch("resample2d_backward" if adjoint else "resample2d", x, *size, *mode, **options)
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(launch_in_every_order, shape, mode, adjoint):
    planes, *sizes = shape
    in_size, out_size = reversed(sizes) if adjoint else sizes
    atol = 5e-7 * max(10, *in_size)  # coordinates are rounded, too
    check(launch_in_every_order, planes_of(planes, in_size), out_size, mode, adjoint, atol=atol)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("mode", [("bicubic", False), ("nearest", False)])
def test_several_rounds_of_planes(launch_once, mode, adjoint):
    """Tiles and planes enough for 8 blocks on each of 2 multiprocessors. The adjoint has the longest sums."""
    sizes = ((5, 7), (50, 57)) if adjoint else ((50, 57), (5, 7))
    x = planes_of(43, sizes[1])
    check(launch_once, x, sizes[0], mode, adjoint, atol=2e-5 if adjoint else 5e-6, multiprocessors=2)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_longer_than_a_tile_holds(launch_once, mode, adjoint):
    in_size, out_size = ((2, 2200), (2, 2))
    x = planes_of(2, in_size)
    check(launch_once, x, out_size, mode, adjoint, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_results_do_not_depend_on_how_the_work_is_divided(launch_once, mode):
    x = planes_of(43, (9, 70))
    for size in ((50, 57), (3, 2)):
        (all_planes,) = launch_once("resample2d", x, *size, *mode, multiprocessors=1)
        (alone,) = launch_once("resample2d", x[:, 20:21], *size, *mode, multiprocessors=100)
        assert torch.equal(alone, all_planes[:, 20:21])


@pytest.mark.parametrize("width", [8, 12, 6, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_nearest_stores_as_many_pixels_as_divide_a_row(launch_in_every_order, dtype, width):
    x = planes_of(9, (3, 7), dtype)
    (out,) = launch_in_every_order("resample2d", x, 5, width, "nearest", False, misalignment=1)
    assert torch.equal(out, reference.resample2d(x, (5, width), mode="nearest"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_other_dtypes(launch_in_every_order, mode, dtype, tolerance):
    x = planes_of(5, (6, 9), dtype)
    check(launch_in_every_order, x, (8, 5), mode, rtol=0, atol=tolerance, misalignment=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_nearest_copies_bits(launch_in_every_order, dtype):
    x = planes_of(3, (5, 7), dtype)
    x[0, 0, 0] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-7, -1e-7, -0.0])
    for size in ((5, 7), (10, 21), (2, 3)):
        (out,) = launch_in_every_order("resample2d", x, *size, "nearest", False)
        expected = reference.resample2d(x, size, mode="nearest")
        assert torch.equal(out, expected)
        assert torch.equal(out.signbit(), expected.signbit())


def test_a_pixel_that_nothing_reads_has_the_gradient_0(launch_in_every_order):
    (grad,) = launch_in_every_order("resample2d_backward", -planes_of(1, (1, 1)).abs(), 2, 2, "nearest", False)
    assert not grad.flatten()[1:].any()
    assert not grad.flatten()[1:].signbit().any()


def test_inputs_that_lie_otherwise(launch_in_every_order):
    x = planes_of(6, (5, 7)).view(2, 3, 5, 7)
    for other in (x.to(memory_format=torch.channels_last), x[:, :, ::2, 1:], x[:, :1].expand(2, 3, 5, 7), x[:0]):
        check(launch_in_every_order, other, (4, 9), ("bicubic", False))
