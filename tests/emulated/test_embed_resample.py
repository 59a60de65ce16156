"""The CUDA kernels of embed_resample and its backward, run on the CPU against float64."""

import numpy as np
import pytest
import torch

from flexvar_ext import reference

MODES = {"nearest": 0, "bilinear": 1, "bicubic": 3, "area": 4}  # the C++ enumeration ResampleMode
# (batch, grid, size, codes, channels): one cell, the next scale, unfilled tiles, several patches, channel blocks.
SHAPES = [
    (2, (1, 1), (2, 3), 4, 8),
    (1, (10, 10), (13, 13), 30, 32),
    (2, (5, 3), (9, 17), 9, 7),
    (1, (20, 17), (5, 3), 50, 4),
    (1, (3, 4), (4, 6), 6, 70),
]


def as_array(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def as_tensor(array: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(array)
    return x.view(torch.bfloat16) if x.dtype == torch.uint16 else x


def problem(shape, dtype=torch.float32):
    batch, grid, size, codes, channels = shape
    random = np.random.default_rng(0)
    indices = torch.from_numpy(random.integers(0, codes, (batch, *grid)))
    codebook = torch.from_numpy(random.standard_normal((codes, channels))).to(dtype)
    out_gradient = torch.from_numpy(random.standard_normal((batch, size[0] * size[1], channels))).to(dtype)
    return indices, codebook, out_gradient


def check(emulated, run_in_every_order, shape, mode, normalize, dtype, tolerance, **options):
    size, emulated_mode = shape[2], MODES[mode]
    indices, codebook, out_gradient = problem(shape, dtype)
    leaf = codebook.detach().clone().double().requires_grad_()
    expected = reference.embed_resample(indices, leaf, size, mode=mode, normalize=normalize)
    (expected_grad,) = torch.autograd.grad(expected, leaf, out_gradient.double())

    arguments = (indices.numpy(), as_array(codebook), *size, normalize, emulated_mode)
    (tokens,) = run_in_every_order(emulated.embed_resample, *arguments, **options)
    torch.testing.assert_close(as_tensor(tokens).double(), expected.detach(), rtol=0, atol=tolerance)

    ordered, cells = torch.sort(indices.flatten(), stable=True)
    arguments = (as_array(out_gradient), *shape[1], ordered.numpy(), cells.numpy(), as_array(codebook), *size)
    (grad,) = run_in_every_order(emulated.embed_resample_backward, *arguments, normalize, emulated_mode, **options)
    # Sums are not rounded to 16 bits here, only their terms' source is: float32's accuracy for all but float64.
    grad_tolerance = min(tolerance, 1e-5) * max(1.0, expected_grad.abs().max().item())
    torch.testing.assert_close(torch.from_numpy(grad).double(), expected_grad, rtol=0, atol=grad_tolerance)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(emulated, run_in_every_order, shape, mode, normalize):
    check(emulated, run_in_every_order, shape, mode, normalize, torch.float32, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_other_dtypes(emulated, run_in_every_order, dtype, tolerance):
    check(emulated, run_in_every_order, (2, (5, 3), (9, 10), 9, 7), "bicubic", True, dtype, tolerance, misalignment=1)


def test_index_outside_the_codebook_gives_nan(emulated, run_in_every_order):
    indices, codebook, _ = problem(SHAPES[1])
    mode = MODES["bilinear"]
    (expected,) = run_in_every_order(emulated.embed_resample, indices.numpy(), codebook.numpy(), 13, 13, True, mode)
    for bad in (-1, 30, 2**62, -(2**63)):
        indices[0, 0, 0] = bad
        (tokens,) = run_in_every_order(emulated.embed_resample, indices.numpy(), codebook.numpy(), 13, 13, True, mode)
        reached = np.isnan(tokens).any(axis=2)
        assert np.isnan(tokens[0, 0]).all()
        assert 1 <= reached.sum() <= 9
        assert np.array_equal(tokens[~reached], expected[~reached])


def test_zero_and_unused_codes(emulated, run_in_every_order):
    indices = torch.tensor([[[2, 1], [2, 0]]])
    codebook = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 8))).float()
    codebook[2] = 0
    out_gradient = torch.ones(1, 9, 8)
    leaf = codebook.clone().requires_grad_()
    reference.embed_resample(indices, leaf, (3, 3)).backward(out_gradient)
    ordered, cells = torch.sort(indices.flatten(), stable=True)
    (grad,) = run_in_every_order(
        emulated.embed_resample_backward,
        *(out_gradient.numpy(), 2, 2, ordered.numpy(), cells.numpy(), codebook.numpy()),
        *(3, 3, True, MODES["bicubic"]),
    )
    torch.testing.assert_close(torch.from_numpy(grad), leaf.grad, rtol=1e-5, atol=1e-5)
    assert not grad[3].any()
