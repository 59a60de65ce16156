"""The CUDA launcher of linear, run on the CPU, against the reference in float64. Clusters are single blocks here: a
device of one multiprocessor has no use for others."""

import pytest
import torch

from flexvar_ext import reference
from tests.tolerances import assert_as_accurate_as_torch


def random(shape, dtype, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(launch, x, weight, bias, activation, **options):
    (out,) = launch("linear", x, weight, bias, activation, None, None, **options)
    same, exact = (
        reference.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide), activation=activation)
        for wide in (x.dtype, torch.float64)
    )
    assert_as_accurate_as_torch(out, same, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns", "depth", "with_bias", "activation"),
    [
        (1, 64, 64, False, "none"),
        (5, 128, 192, True, "gelu_tanh"),
        (64, 64, 832, True, "none"),
        (67, 128, 128, True, "none"),
        (3, 76, 64, True, "none"),
    ],
)
def test_few_rows(launch_in_every_order, rows, columns, depth, with_bias, activation, dtype):
    x, weight = random((1, rows, depth), dtype), random((columns, depth), dtype, seed=1) / depth**0.5
    bias = random((columns,), dtype, seed=2) if with_bias else None
    check(launch_in_every_order, x, weight, bias, activation, multiprocessors=1)


def test_misaligned(launch_once):
    x, weight, bias = (random(shape, torch.bfloat16) for shape in ((3, 64), (64, 64), (64,)))
    check(launch_once, x, weight, bias, "none", multiprocessors=1, misalignment=1)


def test_bias_of_another_dtype(launch_once):
    x, weight, bias = random((3, 64), torch.bfloat16), random((64, 64), torch.bfloat16), random((64,), torch.float32)
    check(launch_once, x, weight, bias, "none", multiprocessors=1)


def test_no_rows(launch_once):
    (out,) = launch_once("linear", *(torch.zeros(shape, dtype=torch.float16) for shape in ((0, 64), (64, 64))), None,
                         "none", None, None)  # fmt: skip
    assert out.shape == (0, 64)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 64), torch.zeros(64, 64), "must both be float16 or both bfloat16"),
        (torch.zeros(2, 60).half(), torch.zeros(64, 60).half(), "its columns of 64"),
        (torch.zeros(2, 64).half(), torch.zeros(70, 64).half(), "a multiple of 4"),
        (torch.zeros(2, 6720).half(), torch.zeros(64, 6720).half(), "at most 6656 columns, got 6720"),
    ],
)
def test_bad_arguments_do_not_reach_the_kernel(launch_once, x, weight, message):
    with pytest.raises(RuntimeError, match=message):
        launch_once("linear", x, weight, None, "none", None, None)
