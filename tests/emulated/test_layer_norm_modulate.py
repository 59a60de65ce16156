"""The CUDA launchers of layer_norm_modulate, its residual form and its backward, run on the CPU against float64."""

import pytest
import torch
from torch import Tensor

from flexvar_ext import reference

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# (batch, tokens, channels): one channel, rows not in vectors of four, several warps, more rows than one sum takes.
SHAPES = [(1, 1, 1), (2, 3, 7), (1, 2, 36), (2, 19, 64), (1, 3, 300), (2, 2, 1024), (1, 1, 4096)]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> Tensor:
    return (draw(*shape, seed=seed) + 0.5).to(dtype)


def vectors(shape: tuple[int, int, int], shared: bool, number: int) -> list[Tensor]:
    return [draw(1 if shared else shape[0], 1, shape[2], seed=seed) for seed in range(number)]


def assert_close(result: Tensor, exact: Tensor) -> None:
    bound = TOLERANCE[result.dtype] * max(1.0, exact.abs().max().item())
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("misalignment", [0, 1])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(launch_in_every_order, shape, shared, misalignment):
    arguments = (tokens(shape, torch.float32, 9), *vectors(shape, shared, 2))
    dtype = torch.float32
    (out,) = launch_in_every_order("layer_norm_modulate", *arguments, EPS, dtype, misalignment=misalignment)
    assert_close(out, reference.layer_norm_modulate(*(t.double() for t in arguments), eps=EPS))


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 2, 320)])
def test_residual(launch_in_every_order, shape, dtypes):
    x, branch = tokens(shape, dtypes[0], 9), tokens(shape, dtypes[1], 10)
    gate, scale, shift = vectors(shape, False, 3)
    arguments = (x, branch, gate, scale, shift)
    y, out = launch_in_every_order("residual_layer_norm_modulate", *arguments, EPS, dtypes[1])
    exact_y, exact = reference.residual_layer_norm_modulate(*(t.double() for t in arguments), eps=EPS)
    assert_close(y, exact_y)
    assert y.dtype == dtypes[0]
    assert out.dtype == dtypes[1]
    if dtypes[0] == torch.float32:
        assert_close(out, exact)
    # The norm is that of the y that was stored, bit for bit.
    (again,) = launch_in_every_order("layer_norm_modulate", y, scale, shift, EPS, dtypes[1])
    assert torch.equal(out, again)


@pytest.mark.parametrize("misalignment", [0, 1])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(launch_in_every_order, shape, shared, misalignment):
    check_backward(launch_in_every_order, shape, shared, (torch.float32, torch.float32), misalignment)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_backward_of_other_dtypes(launch_in_every_order, dtypes):
    check_backward(launch_in_every_order, (2, 3, 40), False, dtypes, 0)


def check_backward(launch, shape, shared, dtypes, misalignment):
    x, grad = tokens(shape, dtypes[0], 9), tokens(shape, dtypes[1], 10)
    scale, shift = vectors(shape, shared, 2)
    found = launch("layer_norm_modulate_backward", grad, x, scale, EPS, misalignment=misalignment)
    leaves = [x.double().requires_grad_(), *(v.double().requires_grad_() for v in (scale, shift))]
    out = reference.layer_norm_modulate(*leaves, eps=EPS)
    for result, exact in zip(found, torch.autograd.grad(out, leaves, grad.double()), strict=True):
        assert_close(result, exact)


@pytest.mark.parametrize("misalignment", [0, 1])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_backward(launch_in_every_order, shape, shared, misalignment):
    check_residual_backward(launch_in_every_order, shape, shared, (torch.float32, torch.float32), misalignment)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_residual_backward_of_other_dtypes(launch_in_every_order, dtypes):
    check_residual_backward(launch_in_every_order, (2, 3, 40), False, dtypes, 0)


def check_residual_backward(launch, shape, shared, dtypes, misalignment):
    """``dtypes`` of the stream (y and its gradients) and of the branch (and what follows the norm)."""
    y, branch, grad_y, grad = (tokens(shape, dtypes[number % 2], 9 + number) for number in range(4))
    gate, scale, shift = vectors(shape, shared, 3)
    found = launch(
        "residual_layer_norm_modulate_backward", grad_y, grad, y, branch, gate, scale, EPS, misalignment=misalignment
    )
    branch, gate, scale, shift = (t.double().requires_grad_() for t in (branch, gate, scale, shift))
    x = (y.double() - gate * branch).detach().requires_grad_()
    outputs = reference.residual_layer_norm_modulate(x, branch, gate, scale, shift, eps=EPS)
    leaves = (x, branch, gate, scale, shift)
    exact = torch.autograd.grad(outputs, leaves, (grad_y.double(), grad.double()))
    for result, right in zip(found, exact, strict=True):
        assert_close(result, right)
    assert [t.dtype for t in found] == [dtypes[0], dtypes[1], *[torch.float32] * 3]


def test_inputs_that_lie_otherwise(launch_in_every_order):
    """Tokens that are copied; vectors that are slices of one tensor, as the transformer's are, in fours and not."""
    x, branch, grad = (tokens((2, 8, 3), torch.float32, seed).transpose(1, 2) for seed in range(3))
    for modulation in (draw(2, 1, 24, seed=9), draw(2, 1, 25, seed=9)):
        gate, scale, shift = modulation[..., :8], modulation[..., 8:16], modulation[..., 16:24]
        arguments = (x, branch, gate, scale, shift)
        exact = reference.residual_layer_norm_modulate(*(t.double() for t in arguments), eps=EPS)
        found = launch_in_every_order("residual_layer_norm_modulate", *arguments, EPS, torch.float32)
        leaves = [t.double().requires_grad_() for t in (x, scale, shift)]
        out = reference.layer_norm_modulate(*leaves, eps=EPS)
        found += launch_in_every_order("layer_norm_modulate_backward", grad, x, scale, EPS)
        exact += torch.autograd.grad(out, leaves, grad.double())
        leaves = [t.double().requires_grad_() for t in arguments]
        outputs = reference.residual_layer_norm_modulate(*leaves, eps=EPS)
        y = outputs[0].float().detach().transpose(1, 2).contiguous().transpose(1, 2)
        found += launch_in_every_order("residual_layer_norm_modulate_backward", grad, x, y, branch, gate, scale, EPS)
        exact += torch.autograd.grad(outputs, leaves, (grad.double(), x.double()))
        for result, right in zip(found, exact, strict=True):
            assert_close(result, right.detach())


def test_nothing_to_do(launch_in_every_order):
    x, scale = torch.empty(2, 0, 8), torch.empty(2, 1, 8)
    assert launch_in_every_order("layer_norm_modulate", x, scale, scale, EPS, torch.half)[0].shape == x.shape
    grad_x, *grads = launch_in_every_order("layer_norm_modulate_backward", x, x, scale, EPS)
    assert grad_x.shape == x.shape
    assert all(torch.equal(grad, torch.zeros(2, 1, 8)) for grad in grads)
    *grads, _, _, _ = launch_in_every_order("residual_layer_norm_modulate_backward", x, x, x, x, scale, scale, EPS)
    assert all(grad.shape == x.shape for grad in grads)
