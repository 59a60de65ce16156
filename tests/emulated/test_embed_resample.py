"""The CUDA launchers of embed_resample and its backward, run on the CPU against float64."""

import numpy as np
import pytest
import torch

from flexvar_ext import reference

MODES = ("nearest", "bilinear", "bicubic", "area")
# (batch, grid, size, codes, channels): one cell, the next scale, unfilled tiles, several patches, channel blocks.
SHAPES = [
    (2, (1, 1), (2, 3), 4, 8),
    (1, (10, 10), (13, 13), 30, 32),
    (2, (5, 3), (9, 17), 9, 7),
    (1, (20, 17), (5, 3), 50, 4),
    (2, (3, 4), (4, 6), 6, 70),
]


def problem(shape, dtype=torch.float32):
    batch, grid, size, codes, channels = shape
    random = np.random.default_rng(0)
    indices = torch.from_numpy(random.integers(0, codes, (batch, *grid)))
    codebook = torch.from_numpy(random.standard_normal((codes, channels))).to(dtype)
    out_gradient = torch.from_numpy(random.standard_normal((batch, size[0] * size[1], channels))).to(dtype)
    return indices, codebook, out_gradient


def check(launch, indices, codebook, out_gradient, size, mode, normalize, tolerance, **options):
    leaf = codebook.detach().clone().double().requires_grad_()
    expected = reference.embed_resample(indices, leaf, size, mode=mode, normalize=normalize)
    (expected_grad,) = torch.autograd.grad(expected, leaf, out_gradient.double())

    (tokens,) = launch("embed_resample", indices, codebook, *size, normalize, mode, **options)
    torch.testing.assert_close(tokens.double(), expected.detach(), rtol=0, atol=tolerance)

    arguments = (out_gradient, indices, codebook, *size, normalize, mode)
    (grad,) = launch("embed_resample_backward", *arguments, **options)
    # Sums are float32's, rounded once at the end.
    grad_tolerance = min(tolerance, 1e-5) * max(1.0, expected_grad.abs().max().item())
    rounding = torch.finfo(codebook.dtype).eps / 2
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rounding, atol=grad_tolerance)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(launch_in_every_order, shape, mode, normalize):
    check(launch_in_every_order, *problem(shape), shape[2], mode, normalize, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_other_dtypes(launch_in_every_order, dtype, tolerance):
    arguments = problem((2, (5, 3), (9, 10), 9, 7), dtype)
    check(launch_in_every_order, *arguments, (9, 10), "bicubic", True, tolerance, misalignment=1)


def test_nearest_copies_bits(launch_in_every_order):
    indices, codebook, _ = problem((2, (5, 3), (9, 10), 9, 7))
    codebook[:, :3] = torch.tensor([-0.0, 0.0, 1e-7])
    (tokens,) = launch_in_every_order("embed_resample", indices, codebook, 5, 3, False, "nearest")
    expected = codebook[indices].flatten(1, 2)
    assert torch.equal(tokens, expected)
    assert torch.equal(tokens.signbit(), expected.signbit())


def test_inputs_that_lie_otherwise(launch_in_every_order):
    indices, codebook, out_gradient = problem((2, (5, 3), (9, 10), 9, 7))
    strided = (indices.mT.contiguous().mT, codebook.T.contiguous().T, out_gradient[:, :1].expand(out_gradient.shape))
    check(launch_in_every_order, *strided, (9, 10), "area", True, 1e-5)
    nothing = (indices[:0], codebook, out_gradient[:0])
    check(launch_in_every_order, *nothing, (9, 10), "area", True, 1e-5)


@pytest.mark.parametrize("channels", [32, 40])  # more than a block has: codes are read once more for their norms
def test_index_outside_the_codebook_gives_nan(launch_in_every_order, channels):
    indices, codebook, _ = problem((1, (10, 10), (13, 13), 30, channels))
    arguments = (codebook, 13, 13, True, "bilinear")
    (expected,) = launch_in_every_order("embed_resample", indices, *arguments)
    for bad in (-1, 30, 2**62, -(2**63)):
        indices[0, 0, 0] = bad
        (tokens,) = launch_in_every_order("embed_resample", indices, *arguments)
        reached = tokens.isnan().any(dim=2)
        assert tokens[0, 0].isnan().all()
        assert 1 <= reached.sum() <= 9
        assert torch.equal(tokens[~reached], expected[~reached])


def test_zero_and_unused_codes(launch_in_every_order):
    indices = torch.tensor([[[2, 1], [2, 0]]])
    codebook = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 8))).float()
    codebook[2] = 0
    out_gradient = torch.ones(1, 9, 8)
    leaf = codebook.clone().requires_grad_()
    reference.embed_resample(indices, leaf, (3, 3)).backward(out_gradient)
    arguments = (out_gradient, indices, codebook, 3, 3, True, "bicubic")
    (grad,) = launch_in_every_order("embed_resample_backward", *arguments)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-5, atol=1e-5)
    assert not grad[3].any()


@pytest.mark.parametrize("cells_of_codes", [[300], [64, 64, 1], [1, 63, 65, 128], [20, 200, 0, 36], [63, 1, 0, 192]])
def test_codes_with_many_cells(launch_in_every_order, cells_of_codes):
    """A warp sums 64 of the sorted cells: codes that end, begin and go on where the next warp's begin."""
    codes, cells = len(cells_of_codes), sum(cells_of_codes)
    random = np.random.default_rng(0)
    indices = torch.from_numpy(random.permutation(np.repeat(np.arange(codes), cells_of_codes))).reshape(1, 1, cells)
    codebook = torch.from_numpy(random.standard_normal((codes, 5))).float()
    out_gradient = torch.from_numpy(random.standard_normal((1, cells, 5))).float()
    check(launch_in_every_order, indices, codebook, out_gradient, (1, cells), "nearest", True, 1e-5)


def test_gradient_passes_by_an_index_outside_the_codebook(launch_in_every_order):
    indices, codebook, out_gradient = problem(SHAPES[1])
    indices[0, 0, 0] = 29
    for bad in (-1, 30, 2**62, -(2**63)):
        arguments = (13, 13, True, "nearest")
        (expected,) = launch_in_every_order("embed_resample_backward", out_gradient, indices, codebook, *arguments)
        wrong = torch.where(indices == 29, bad, indices)
        (grad,) = launch_in_every_order("embed_resample_backward", out_gradient, wrong, codebook, *arguments)
        assert not grad[29].any()
        torch.testing.assert_close(grad[:29], expected[:29], rtol=1e-5, atol=1e-5)
