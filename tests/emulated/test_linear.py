"""The CUDA launcher of linear for few rows, run on the CPU."""

import pytest
import torch
import torch.nn.functional as F

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def problem(rows, columns, depth, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*rows, depth, generator=generator).to(dtype)
    weight = (torch.randn(columns, depth, generator=generator) / depth**0.5).to(dtype)
    return x, weight, torch.randn(columns, generator=generator).to(dtype)


def expected(x, weight, bias, activation):
    out = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return F.gelu(out, approximate="tanh") if activation == "gelu_tanh" else out


def check(launch, x, weight, bias, activation="none", constant=False, **options):
    (found,) = launch("linear_few_rows", x, weight, bias, activation, constant, **options)
    assert found.dtype == x.dtype
    right = expected(x, weight, bias, activation)
    torch.testing.assert_close(found.double(), right, rtol=TOLERANCE[x.dtype], atol=TOLERANCE[x.dtype], equal_nan=True)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns", "depth"),
    [((1,), 8, 32), ((2, 1), 24, 64), ((2, 8), 40, 288), ((17,), 72, 512), ((3, 11), 64, 1056), ((2, 25), 136, 96)],
)
@pytest.mark.parametrize(("activation", "with_bias"), [("none", True), ("none", False), ("gelu_tanh", True)])
@pytest.mark.parametrize("constant", [False, True])
def test_matches_float64(launch_in_every_order, dtype, rows, columns, depth, activation, with_bias, constant):
    x, weight, bias = problem(rows, columns, depth, dtype)
    check(launch_in_every_order, x, weight, bias if with_bias else None, activation, constant)


# Features of a block, by the multiprocessors of the device: 1 to 4, and fewer where the weight is deep.
@pytest.mark.parametrize("columns", [8, 16, 24, 32, 40, 200])
@pytest.mark.parametrize("depth", [32, 2048])
def test_every_number_of_features(launch_in_every_order, columns, depth):
    x, weight, bias = problem((5,), columns, depth, torch.bfloat16)
    check(launch_in_every_order, x, weight, bias, multiprocessors=1)


def test_inputs_that_lie_otherwise(launch_in_every_order):
    x, weight, bias = problem((2, 5), 48, 64, torch.float16)
    check(launch_in_every_order, x, weight, bias, misalignment=1)
    x, weight, bias = problem((5, 2), 48, 64, torch.float16)
    check(launch_in_every_order, x.transpose(0, 1), weight.t().contiguous().t(), bias.repeat_interleave(2)[::2])


def test_a_row_depends_on_nothing_else(launch_once):
    x, weight, bias = problem((40,), 40, 544, torch.bfloat16)
    (whole,) = launch_once("linear_few_rows", x, weight, bias, "none", True)
    for begin, end in [(0, 1), (3, 20), (7, 40)]:
        (part,) = launch_once("linear_few_rows", x[begin:end], weight, bias, "none", True)
        assert torch.equal(part, whole[begin:end])


def test_what_is_not_finite_stays_in_its_row_and_column(launch_once):
    x, weight, bias = problem((18,), 24, 64, torch.bfloat16)
    x[17, 3], weight[5, 40], bias[9] = float("nan"), float("inf"), float("-inf")
    found = check(launch_once, x, weight, bias)
    assert found.isfinite().sum() == 17 * 22


def test_nothing_to_do(launch_once):
    x, weight, bias = problem((2, 0), 24, 64, torch.bfloat16)
    check(launch_once, x, weight, bias)
    x, weight, bias = problem((2, 3), 0, 64, torch.bfloat16)
    check(launch_once, x, weight, bias)
