"""The CUDA kernels of vq_lookup: their indices must equal the CPU kernel's, which is exact."""

import numpy as np
import pytest
import torch

import flexvar_ext

MODES = ("nearest", "bilinear", "bilinear_antialias", "bicubic", "area")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(run, emulated, latents, codebook, normalize=True, multiprocessors=1, **options) -> None:
    expected = torch.ops.flexvar.vq_lookup(latents, codebook, normalize)
    arguments = (latents.numpy(), codebook.numpy(), normalize, multiprocessors)
    (indices,) = run(emulated.vq_lookup, *arguments, **options)
    np.testing.assert_array_equal(indices, expected.numpy())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dim", [1, 8, 21, 32, 40, 64, 70])
def test_dims(run_in_every_order, emulated, dim, normalize):
    check(run_in_every_order, emulated, randn(33, dim), randn(150, dim, seed=1), normalize)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("count", "codes"), [(1, 1), (2, 127), (7, 129), (65, 300), (257, 130), (129, 64)])
def test_sizes(run_in_every_order, emulated, count, codes, normalize):
    check(run_in_every_order, emulated, randn(count, 32), randn(codes, 32, seed=1), normalize)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_split_codes(run_in_every_order, emulated, multiprocessors, normalize):
    check(run_in_every_order, emulated, randn(20, 32), randn(1000, 32, seed=1), normalize, multiprocessors)


def test_more_chunks_than_fit_a_block(emulated):
    latents, codebook = randn(3, 8), randn(2 * 16384 + 77, 8, seed=1)
    indices = emulated.vq_lookup(latents.numpy(), codebook.numpy(), True, 1, emulated.Options())
    np.testing.assert_array_equal(indices, flexvar_ext.vq_lookup(latents, codebook).numpy())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("distance", [1e-3, 1e-5, 1e-7])
def test_close_codes(run_in_every_order, emulated, distance, normalize):
    """Within the error of tensor cores, of packing, and of fp32: groups of candidates, up to whole subgroups."""
    centres = randn(20, 32)
    codebook = centres.repeat(30, 1) + distance * randn(600, 32, seed=1)
    check(run_in_every_order, emulated, centres + 1e-2 * randn(20, 32, seed=2), codebook, normalize)


@pytest.mark.parametrize("normalize", [True, False])
def test_equal_codes(run_in_every_order, emulated, normalize):
    check(run_in_every_order, emulated, randn(9, 32), randn(1, 32, seed=1).repeat(700, 1), normalize, 3)
    check(run_in_every_order, emulated, randn(9, 32), randn(50, 32, seed=1).repeat(9, 1), normalize, 3)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite(run_in_every_order, emulated, value, normalize):
    latents, codebook = randn(20, 32), randn(100, 32, seed=1)
    latents[3], latents[5, 1], codebook[0, 0], codebook[7] = value, -value, -value, value
    check(run_in_every_order, emulated, latents, codebook, normalize)
    check(run_in_every_order, emulated, latents, torch.full_like(codebook, value), normalize)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-15, 1e15, 1e25, 1e38])
def test_extreme_magnitudes(run_in_every_order, emulated, scale, normalize):
    latents, codebook = (randn(10, 16) * scale).clamp(-3e38, 3e38), (randn(150, 16, seed=1) * scale).clamp(-3e38, 3e38)
    check(run_in_every_order, emulated, latents, codebook, normalize)


def test_components_below_half_precision(run_in_every_order, emulated):
    """Rows of a few large components and many that fp16 rounds to nothing."""
    latents, codebook = randn(30, 32), randn(300, 32, seed=1)
    latents[:, 2:] *= 1e-6
    codebook[:, 2:] *= 1e-6
    codebook[:, :2] = codebook[:1, :2]
    check(run_in_every_order, emulated, latents, codebook)


def test_codes_at_the_error_bound(run_in_every_order, emulated):
    """fp16 rounds every component of rows and second nearest codes up, and every one of the nearest codes down."""
    middle, spacing = (1 + 2**-11) / 8, 2**-13  # of 1/8 and the next number of fp16
    signs = torch.where(randn(6, 64) < 0, -1.0, 1.0)

    def rows(components):  # of length 1: normalising changes no rounding
        last = (1 - components.double().square().sum()).sqrt().float()
        return signs * torch.cat([components, last[None]])

    up, down = torch.full((63,), middle + 2**-23), torch.full((63,), middle - 2**-23)
    further_up = up.clone()
    further_up[:8] += 2 * spacing
    others = torch.nn.functional.normalize(randn(294, 64, seed=1))
    latents, codebook = rows(up), torch.cat([rows(further_up), others, rows(down)])
    assert torch.equal((latents.half().double() @ codebook.half().double().T).argmax(1), torch.arange(6))
    assert torch.equal((latents.double() @ codebook.double().T).argmax(1), torch.arange(300, 306))
    check(run_in_every_order, emulated, latents, codebook)


def test_misaligned_inputs(run_in_every_order, emulated):
    check(run_in_every_order, emulated, randn(20, 21), randn(100, 21, seed=1), misalignment=1)


def check_multiscale(run, emulated, scales, mode, normalize):
    latent, codebook = randn(2, 8, 7, 5), randn(100, 8, seed=1)
    arguments = (latent.numpy(), codebook.numpy(), scales, normalize, MODES.index(mode))
    (indices,) = run(emulated.vq_lookup_multiscale, *arguments)
    expected = flexvar_ext.vq_lookup_multiscale(
        latent, codebook, scales, normalize=normalize, mode=mode.split("_")[0], antialias=mode.endswith("antialias")
    )
    np.testing.assert_array_equal(indices, expected.flatten().numpy())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalize", [True, False])
def test_multiscale(run_in_every_order, emulated, mode, normalize):
    check_multiscale(run_in_every_order, emulated, [(1, 1), (2, 3), (7, 5), (4, 9)], mode, normalize)


def test_more_scales_than_a_launch_takes(run_in_every_order, emulated):
    check_multiscale(run_in_every_order, emulated, [(1 + i % 3, 1 + i % 4) for i in range(33)], "area", True)
