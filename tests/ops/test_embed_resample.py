"""embed_resample: codes gathered, resized and laid out as tokens; the gradient of the codebook."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import flexvar_ext
from flexvar_ext import _host, reference
from tests.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, assert_as_accurate_as_torch

MODES = ["nearest", "bilinear", "bicubic", "area"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Grids of 1 2 3 7 63 64 65 127 129 255 257 680 681 1704 tokens.
GRIDS = [(1, 1), (1, 2), (3, 1), (1, 7), (9, 7), (8, 8), (13, 5), (1, 127), (3, 43), (17, 15), (257, 1), (20, 34)]
GRIDS += [(3, 227), (24, 71)]
INSTRUCTION_SETS = _host.build_info()["cpu_instruction_sets"].split()
INSTRUCTION_SETS = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_host.cpu_isa()) + 1]


def randn(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def random_indices(*shape: int, codes: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    return torch.randint(codes, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def forward_and_gradient(function, indices, codebook, size, out_gradient, **options) -> tuple[Tensor, Tensor]:
    leaf = codebook.detach().requires_grad_()
    out = function(indices, leaf, size, **options)
    (grad,) = torch.autograd.grad(out, leaf, out_gradient.to(out.dtype))
    return out.detach(), grad


def assert_accurate(indices, codebook, size, **options) -> None:
    out_gradient = randn(indices.shape[0], size[0] * size[1], codebook.shape[1], seed=2, device=codebook.device)
    arguments = (size, out_gradient.to(codebook.dtype))
    out, grad = forward_and_gradient(flexvar_ext.embed_resample, indices, codebook, *arguments, **options)
    own, own_grad = forward_and_gradient(reference.embed_resample, indices, codebook, *arguments, **options)
    exact, exact_grad = forward_and_gradient(
        reference.embed_resample, indices, codebook.double(), *arguments, **options
    )
    assert_as_accurate_as_torch(out, own, exact, factor=FORWARD_FACTOR)
    assert_as_accurate_as_torch(grad, own_grad, exact_grad, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", GRIDS)
def test_as_accurate_as_torch(device, size, mode, dtype):
    codebook = randn(50, 32, seed=1, device=device).to(dtype)
    for grid in ((13, 13), (4, 9)):
        indices = random_indices(2, *grid, codes=50, device=device)
        for normalize in (True, False):
            assert_accurate(indices, codebook, size, mode=mode, normalize=normalize)


@pytest.mark.parametrize(("codes", "dim"), [(8912, 32), (1, 4), (300, 8), (40, 1), (40, 37), (20, 130)])
def test_codebook_sizes(device, codes, dim):
    codebook = randn(codes, dim, seed=1, device=device)
    indices = random_indices(3, 10, 6, codes=codes, device=device)
    for normalize in (True, False) if dim > 1 else (False,):  # at dim 1 the normalised gradient is all rounding
        assert_accurate(indices, codebook, (13, 8), normalize=normalize)


def test_is_the_next_scales_input(device):
    """Every step of the paper's default schedule, against the definition."""
    codebook = randn(512, 32, seed=1, device=device)
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    for side, next_side in pairwise(sides):
        indices = random_indices(2, side, side, codes=512, device=device)
        tokens = flexvar_ext.embed_resample(indices, codebook, (next_side, next_side))
        grid = torch.nn.functional.normalize(codebook)[indices].permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(grid, (next_side, next_side), mode="bicubic")
        torch.testing.assert_close(tokens, expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("grid", "size"), [((3, 4), (3, 7)), ((5, 2), (1, 1)), ((1, 1), (2, 3))])
def test_gradients(device, mode, normalize, grid, size):
    codebook = randn(6, 5, device=device).double().requires_grad_()
    indices = random_indices(2, *grid, codes=6, device=device)
    assert torch.autograd.gradcheck(
        lambda c: flexvar_ext.embed_resample(indices, c, size, mode=mode, normalize=normalize), codebook
    )


def test_zero_code(device):
    """F.normalize leaves a zero code zero, and its gradient passes through the clamped norm."""
    codebook = randn(4, 8, device=device)
    codebook[2] = 0
    indices = torch.tensor([[[2, 1], [2, 0]]], device=device)
    out_gradient = randn(1, 9, 8, seed=2, device=device)
    arguments = (indices, codebook, (3, 3), out_gradient)
    out, grad = forward_and_gradient(flexvar_ext.embed_resample, *arguments)
    expected, expected_grad = forward_and_gradient(reference.embed_resample, *arguments)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)
    assert grad[3].eq(0).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_values_that_are_not_finite_stay_in_their_code(device, normalize):
    """Normalised, such a code has a component that is no number, or all are; its gradient is what it is otherwise."""
    codebook = randn(5, 19, device=device)
    codebook[1, 3], codebook[2, 7], codebook[4, 0] = torch.nan, torch.inf, torch.nan  # nobody asks for the last one
    indices = torch.arange(4, device=device).view(1, 1, 4)
    arguments = (indices, codebook, (1, 4), randn(1, 4, 19, seed=1, device=device))
    out, grad = forward_and_gradient(flexvar_ext.embed_resample, *arguments, mode="nearest", normalize=normalize)
    expected, expected_grad = forward_and_gradient(
        reference.embed_resample, *arguments, mode="nearest", normalize=normalize
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(grad[:4], expected_grad[:4], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert grad[4].eq(0).all()


def test_layouts(device):
    indices, codebook = random_indices(3, 6, 5, codes=40, device=device), randn(40, 24, seed=1, device=device)
    expected = flexvar_ext.embed_resample(indices, codebook, (8, 9))
    assert expected.is_contiguous()
    wide = torch.stack([codebook, -codebook], dim=2).flatten(1)
    offset = torch.cat([codebook.new_zeros(1), codebook.flatten()])[1:].view(40, 24)
    for same in (codebook.T.contiguous().T, wide[:, ::2], offset):
        assert torch.equal(flexvar_ext.embed_resample(indices, same, (8, 9)), expected)
    offset_indices = torch.cat([indices.new_zeros(1), indices.flatten()])[1:].view(3, 6, 5)
    for same in (indices.transpose(1, 2).contiguous().transpose(1, 2), offset_indices):
        assert torch.equal(flexvar_ext.embed_resample(same, codebook, (8, 9)), expected)
    repeated = flexvar_ext.embed_resample(indices[:1].expand(4, -1, -1), codebook, (8, 9))
    assert torch.equal(repeated, expected[:1].expand(4, -1, -1))
    leaf = codebook.clone().requires_grad_()
    flexvar_ext.embed_resample(indices, leaf, (8, 9)).sum().backward()  # an expanded gradient
    out = flexvar_ext.embed_resample(indices, leaf, (8, 9))
    assert torch.equal(leaf.grad, torch.autograd.grad(out, leaf, torch.ones_like(out), retain_graph=True)[0])
    assert torch.equal(leaf.grad, torch.autograd.grad(out, leaf, torch.ones_like(out.mT).mT)[0])


def test_empty_batch(device):
    codebook = randn(5, 8, device=device).requires_grad_()
    out = flexvar_ext.embed_resample(random_indices(0, 3, 3, codes=5, device=device), codebook, (4, 4))
    assert out.shape == (0, 16, 8)
    out.sum().backward()
    assert codebook.grad.eq(0).all()


@pytest.mark.parametrize("mode", MODES)
def test_repeats_are_bit_equal(device, mode):
    indices, codebook = random_indices(4, 8, 8, codes=10, device=device), randn(10, 32, seed=1, device=device)
    out_gradient = randn(4, 100, 32, seed=2, device=device)
    arguments = (indices, codebook, (10, 10), out_gradient)
    out, grad = forward_and_gradient(flexvar_ext.embed_resample, *arguments, mode=mode)
    for _ in range(250):
        again, grad_again = forward_and_gradient(flexvar_ext.embed_resample, *arguments, mode=mode)
        assert torch.equal(again, out)
        assert torch.equal(grad_again, grad)


def test_images_are_independent(device):
    indices, codebook = random_indices(7, 8, 5, codes=99, device=device), randn(99, 32, seed=1, device=device)
    tokens = flexvar_ext.embed_resample(indices, codebook, (11, 6))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(flexvar_ext.embed_resample(indices[order], codebook, (11, 6)), tokens[order])
    for n in (0, 3, 6):
        assert torch.equal(flexvar_ext.embed_resample(indices[n : n + 1], codebook, (11, 6)), tokens[n : n + 1])


def test_thread_count_changes_nothing():
    indices, codebook = random_indices(9, 16, 16, codes=70), randn(70, 32, seed=1)
    out_gradient = randn(9, 24 * 20, 32, seed=2)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(forward_and_gradient(flexvar_ext.embed_resample, indices, codebook, (24, 20), out_gradient))
    finally:
        torch.set_num_threads(threads)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_every_instruction_set_is_as_accurate(monkeypatch, instruction_set, dtype):
    monkeypatch.setenv("FLEXVAR_CPU_ISA", instruction_set)
    for mode in MODES:
        for dim in (32, 7, 17):
            codebook = randn(30, dim, seed=1).to(dtype)
            assert_accurate(random_indices(2, 5, 3, codes=30), codebook, (8, 7), mode=mode)


@pytest.mark.parametrize("bad", [-1, 50, 2**62, -(2**63)])
def test_index_outside_the_codebook(device, bad):
    codebook = randn(50, 32, device=device)
    indices = random_indices(3, 8, 8, codes=50, device=device)
    expected = flexvar_ext.embed_resample(indices, codebook, (12, 12), mode="bilinear")
    indices[1, 0, 0] = bad
    if device.type == "cpu":
        with pytest.raises(ValueError, match=rf"embed_resample: indices must lie in \[0, 50\), .*, got {bad}"):
            flexvar_ext.embed_resample(indices, codebook, (12, 12), mode="bilinear")
        arguments = (12, 12, True, "bilinear")
        with pytest.raises(RuntimeError, match="embed_resample: indices must lie in"):
            torch.ops.flexvar.embed_resample(indices, codebook, *arguments)
        with pytest.raises(RuntimeError, match="embed_resample_backward: indices must lie in"):
            torch.ops.flexvar.embed_resample_backward(randn(3, 144, 32), indices, codebook, *arguments)
    else:
        tokens = flexvar_ext.embed_resample(indices, codebook, (12, 12), mode="bilinear")
        assert tokens[1, 0].isnan().all()
        reached = tokens.isnan().any(dim=2)
        assert torch.equal(tokens[~reached], expected[~reached])
        assert not reached[0].any()
        assert not reached[1].view(12, 12)[3:].any()


def test_first_bad_index_is_named_whatever_the_threads():
    codebook, indices = randn(50, 32), random_indices(64, 16, 16, codes=50)
    indices[10, 3, 3], indices[60, 1, 1] = 77, 88
    with pytest.raises(ValueError, match="got 77"):
        flexvar_ext.embed_resample(indices, codebook, (16, 16))


@pytest.mark.parametrize("mode", MODES)
def test_infinite_gradient_stays_in_the_codes_that_it_sees(device, mode):
    """Shrinking by nearest and by two taps leaves cells that no token sees."""
    codebook = randn(64, 5, device=device)
    indices = torch.arange(64, device=device).view(1, 8, 8)
    out_gradient = randn(1, 4, 5, seed=1, device=device)
    out_gradient[0, 1] = float("inf")
    arguments = (indices, codebook, (2, 2), out_gradient)
    _, grad = forward_and_gradient(flexvar_ext.embed_resample, *arguments, mode=mode, normalize=False)
    _, expected = forward_and_gradient(reference.embed_resample, *arguments, mode=mode, normalize=False)
    assert torch.equal(grad.isfinite(), expected.isfinite())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("grid", "size", "normalize"), [((5, 7), (9, 4), True), ((1, 1), (3, 3), False)])
def test_opcheck(device, mode, grid, size, normalize):
    codebook = randn(20, 8, device=device).requires_grad_()
    indices = random_indices(2, *grid, codes=20, device=device)
    torch.library.opcheck(torch.ops.flexvar.embed_resample.default, (indices, codebook, *size, normalize, mode))
    grad = randn(2, size[0] * size[1], 8, device=device)
    arguments = (grad, indices, codebook.detach(), *size, normalize, mode)
    torch.library.opcheck(torch.ops.flexvar.embed_resample_backward.default, arguments)


def test_compiles_without_graph_breaks(device):
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(indices, codebook, height, width):
        return flexvar_ext.embed_resample(indices, codebook, (height, width))

    codebook = randn(60, 32, device=device).requires_grad_()
    for grid, size in (((4, 5), (7, 6)), ((6, 3), (9, 8))):
        indices = random_indices(2, *grid, codes=60, device=device)
        expected = flexvar_ext.embed_resample(indices, codebook, size)
        out = compiled(indices, codebook, *size)
        assert torch.equal(out, expected)
        assert torch.equal(
            torch.autograd.grad(out.sum(), codebook)[0], torch.autograd.grad(expected.sum(), codebook)[0]
        )


def test_autocast_keeps_the_dtype(device):
    indices, codebook = random_indices(2, 4, 4, codes=9, device=device), randn(9, 8, device=device)
    expected = flexvar_ext.embed_resample(indices, codebook, (6, 6))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(flexvar_ext.embed_resample(indices, codebook, (6, 6)), expected)


I, C = torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(5, 4)  # noqa: E741
MANY = torch.zeros(1, 1, 1, dtype=torch.int64).expand(2**22, 1, 1)


@pytest.mark.parametrize(
    ("indices", "codebook", "size", "options", "error", "message"),
    [
        (I.tolist(), C, (3, 3), {}, TypeError, "indices must be a torch.Tensor, got list"),
        (I[0], C, (3, 3), {}, ValueError, r"indices must have shape \[B, h0, w0\], got \(2, 2\)"),
        (I.int(), C, (3, 3), {}, TypeError, "indices must have dtype int64, got int32"),
        (I[:, :0], C, (3, 3), {}, ValueError, r"indices must have at least one cell, got shape \(1, 0, 2\)"),
        (I, C[0], (3, 3), {}, ValueError, r"codebook must have shape \[V, C\], got \(4,\)"),
        (I, C.int(), (3, 3), {}, TypeError, "codebook must have dtype float32, .*, got int32"),
        (I, C.to("meta"), (3, 3), {}, ValueError, "all tensors must be on one device, got indices on cpu"),
        (I, C[:0], (3, 3), {}, ValueError, r"indices must lie in \[0, 0\), .*, got 0"),
        (I, C, 3, {}, ValueError, r"size must be \(height, width\), got 3"),
        (I, C, (3, 0), {}, ValueError, r"size must be positive, got \(3, 0\)"),
        (I, C, (2**31 - 1, 2**31 - 1), {}, ValueError, r"size must make fewer than 2\*\*48 elements, got \(2147483647"),
        (MANY, C.repeat(1, 16), (4095, 4095), {}, ValueError, r"size must make fewer than 2\*\*48 elements"),
        (I, C, (3, 3), {"mode": "lanczos"}, ValueError, "mode must be one of .*, got 'lanczos'"),
        (I, C, (3, 3), {"normalize": 1}, TypeError, "normalize must be a bool, got int"),
    ],
)
def test_bad_input(indices, codebook, size, options, error, message):
    with pytest.raises(error, match="embed_resample: " + message):
        flexvar_ext.embed_resample(indices, codebook, size, **options)
    assert flexvar_ext.embed_resample(I, C, (3, 3)).shape == (1, 9, 4)


def test_bad_arguments_do_not_reach_the_kernel():
    for arguments in ((I[0], C, 3, 3), (I, C[0], 3, 3), (I.int(), C, 3, 3), (I, C, 0, 3), (I, C.int(), 3, 3)):
        with pytest.raises(RuntimeError, match="embed_resample: "):
            torch.ops.flexvar.embed_resample(*arguments, True, "area")
    for grad in (torch.zeros(1, 9, 5), torch.zeros(1, 8, 4), torch.zeros(2, 9, 4), torch.zeros(1, 9, 4).half()):
        with pytest.raises(RuntimeError, match="embed_resample_backward: grad must have the tokens' shape"):
            torch.ops.flexvar.embed_resample_backward(grad, I, C, 3, 3, True, "area")
