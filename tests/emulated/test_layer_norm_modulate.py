"""The CUDA kernels of layer_norm_modulate, its residual form and its backward, run on the CPU against float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from flexvar_ext import reference

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# (batch, tokens, channels): one channel, rows not in vectors of four, several warps, more rows than one sum takes.
SHAPES = [(1, 1, 1), (2, 3, 7), (1, 2, 36), (2, 19, 64), (1, 3, 300), (2, 2, 1024), (1, 1, 4096)]


def array(tensor: Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def tensor(values: np.ndarray) -> Tensor:
    found = torch.from_numpy(values)
    return found.view(torch.bfloat16) if found.dtype == torch.uint16 else found


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> Tensor:
    return (draw(*shape, seed=seed) + 0.5).to(dtype)


def vectors(shape: tuple[int, int, int], shared: bool, number: int) -> list[Tensor]:
    return [draw(1 if shared else shape[0], shape[2], seed=seed) for seed in range(number)]


def assert_close(found: np.ndarray, exact: Tensor) -> None:
    result = tensor(found)
    bound = TOLERANCE[result.dtype] * max(1.0, exact.abs().max().item())
    torch.testing.assert_close(result.double(), exact.view(result.shape), rtol=0, atol=bound)


@pytest.mark.parametrize("misalignment", [0, 1])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(emulated, run_in_every_order, shape, shared, misalignment):
    x = tokens(shape, torch.float32, 9)
    scale, shift = vectors(shape, shared, 2)
    (out,) = run_in_every_order(
        emulated.layer_norm_modulate, array(x), array(scale), array(shift), EPS, array(x), misalignment=misalignment
    )
    exact = reference.layer_norm_modulate(x.double(), scale.double()[:, None], shift.double()[:, None], eps=EPS)
    assert_close(out, exact)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 2, 320)])
def test_residual(emulated, run_in_every_order, shape, dtypes):
    x, branch = tokens(shape, dtypes[0], 9), tokens(shape, dtypes[1], 10)
    gate, scale, shift = vectors(shape, False, 3)
    out_like = torch.empty(0, dtype=dtypes[1])
    y, out = run_in_every_order(
        emulated.residual_layer_norm_modulate,
        *map(array, (x, branch, gate, scale, shift)),
        EPS,
        array(out_like),
    )
    wide = [t.double() for t in (x, branch)] + [t.double()[:, None] for t in (gate, scale, shift)]
    exact_y, exact = reference.residual_layer_norm_modulate(*wide, eps=EPS)
    assert_close(y, exact_y)
    assert tensor(y).dtype == dtypes[0]
    assert tensor(out).dtype == dtypes[1]
    if dtypes[0] == torch.float32:
        assert_close(out, exact)
    # The norm is that of the y that was stored, bit for bit.
    (again,) = run_in_every_order(emulated.layer_norm_modulate, y, array(scale), array(shift), EPS, array(out_like))
    assert out.tobytes() == again.tobytes()


@pytest.mark.parametrize("misalignment", [0, 1])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(emulated, run_in_every_order, shape, shared, misalignment):
    check_backward(emulated, run_in_every_order, shape, shared, (torch.float32, torch.float32), misalignment)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_backward_of_other_dtypes(emulated, run_in_every_order, dtypes):
    check_backward(emulated, run_in_every_order, (2, 3, 40), False, dtypes, 0)


def check_backward(emulated, run_in_every_order, shape, shared, dtypes, misalignment):
    x, grad = tokens(shape, dtypes[0], 9), tokens(shape, dtypes[1], 10)
    scale, shift = vectors(shape, shared, 2)
    found = run_in_every_order(
        emulated.layer_norm_modulate_backward, array(grad), array(x), array(scale), EPS, misalignment=misalignment
    )
    leaves = [x.double().requires_grad_(), *(v.double()[:, None].requires_grad_() for v in (scale, shift))]
    out = reference.layer_norm_modulate(*leaves, eps=EPS)
    for values, exact in zip(found, torch.autograd.grad(out, leaves, grad.double()), strict=True):
        assert_close(values, exact)
