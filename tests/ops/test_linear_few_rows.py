"""linear of few rows on CUDA, whose weight is fetched while earlier kernels still run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flexvar_ext
from flexvar_ext import reference

pytestmark = pytest.mark.cuda
REPEATS = 250


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def layer(columns: int, depth: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return randn(columns, depth, seed=1, dtype=dtype) / depth**0.5, randn(columns, seed=2, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize(("columns", "depth"), [(8, 32), (3072, 1024), (1024, 4096), (1536, 6144), (8912, 1280)])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 50])
def test_is_as_accurate_as_torch(rows, columns, depth, activation, dtype):
    x, (weight, bias) = randn(rows, depth, dtype=dtype), layer(columns, depth, dtype)
    exact = reference.linear(x.double(), weight.double(), bias.double(), activation=activation)
    own = (reference.linear(x, weight, bias, activation=activation) - exact).norm()
    found = torch.ops.flexvar.linear_few_rows(x, weight, bias, activation, True)
    assert (found - exact).norm() <= 1.1 * own


def test_a_row_depends_on_nothing_else():
    x, (weight, bias) = randn(64, 1024), layer(4096, 1024)
    whole = torch.ops.flexvar.linear_few_rows(x, weight, bias, "none", True)
    for begin, end in [(0, 1), (3, 20), (30, 64)]:
        part = torch.ops.flexvar.linear_few_rows(x[begin:end], weight, bias, "none", True)
        assert torch.equal(part, whole[begin:end])


def chain(x: Tensor, scale: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Kernels that all begin before the one before has ended, each of which needs what that writes."""
    for first, second in zip(layers[::2], layers[1::2], strict=True):
        x = flexvar_ext.layer_norm_modulate(x, scale, scale)
        x = flexvar_ext.linear(x, *first, activation="gelu_tanh", constant_weight=True)
        x = flexvar_ext.linear(x, *second, constant_weight=True)
    return x


def test_chains_see_what_the_kernel_before_wrote_also_in_a_graph():
    layers = [layer(*shape) for _ in range(4) for shape in ((2048, 512), (512, 2048))]
    x, scale = randn(1, 4, 512), randn(1, 1, 512, dtype=torch.float32)
    with torch.inference_mode():
        expected = chain(x, scale, layers)
        one_by_one = x
        for first, second in zip(layers[::2], layers[1::2], strict=True):
            one_by_one = flexvar_ext.layer_norm_modulate(one_by_one, scale, scale)
            torch.cuda.synchronize()
            for parameters, activation in ((first, "gelu_tanh"), (second, "none")):
                one_by_one = torch.ops.flexvar.linear_few_rows(one_by_one, *parameters, activation, False)
                torch.cuda.synchronize()
        assert torch.equal(expected, one_by_one)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain(x, scale, layers)
        for _ in range(REPEATS):
            graph.replay()
        for _ in range(REPEATS):
            assert torch.equal(chain(x, scale, layers), expected)
        torch.cuda.synchronize()
        assert torch.equal(out, expected)


def test_a_weight_that_the_op_before_writes_is_waited_for():
    x, made = randn(2, 1024), randn(1, 4096, 1024, dtype=torch.float32)
    scale = torch.ones(1, 1, 1024, device="cuda")
    with torch.inference_mode():
        for _ in range(REPEATS):
            weight = flexvar_ext.layer_norm_modulate(made, scale, scale, dtype=torch.bfloat16)[0]
            out = flexvar_ext.linear(x, weight)
            assert torch.equal(out, flexvar_ext.linear(x, weight.clone()))
            del weight, out
