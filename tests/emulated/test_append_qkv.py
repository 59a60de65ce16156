"""The CUDA launcher of append_qkv, run on the CPU."""

import pytest
import torch

from flexvar_ext import reference

# dtypes of qkv and of the caches, head dim, tolerance: every pair of dtypes, every head dim.
KERNELS = [
    (torch.float32, torch.float32, 32, 2e-6),
    (torch.float32, torch.float16, 96, 2e-3),
    (torch.float32, torch.bfloat16, 128, 2e-2),
    (torch.float16, torch.float16, 128, 2e-3),
    (torch.float16, torch.float32, 64, 2e-6),
    (torch.float16, torch.bfloat16, 32, 2e-2),
    (torch.bfloat16, torch.bfloat16, 64, 2e-2),
    (torch.bfloat16, torch.float32, 96, 2e-6),
    (torch.bfloat16, torch.float16, 32, 2e-3),
    (torch.float64, torch.float64, 128, 1e-12),
]


def check(launch, qkv, caches, position, scale, tolerance, **options):
    exact = [cache.double() for cache in caches]
    expected = reference.append_qkv(qkv.double(), *exact, position, q_scale=None if scale is None else scale.double())
    found = launch("append_qkv", qkv, *caches, position, scale, **options)
    for tensor, right in zip(found, (expected, *exact), strict=True):
        torch.testing.assert_close(tensor.double(), right, rtol=tolerance, atol=tolerance)


def problem(batch, tokens, heads, dim, dtype, cache_dtype):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 3, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    caches = [torch.randn(batch, 12, heads, dim, generator=generator).to(cache_dtype) for _ in range(2)]
    scale = torch.rand(heads, generator=generator, dtype=torch.float64) * 4
    return qkv, caches, scale if dtype == torch.float64 else scale.float()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("batch", "tokens", "heads", "position"), [(1, 1, 1, 0), (2, 5, 3, 2), (1, 11, 2, 1)])
@pytest.mark.parametrize(("dtype", "cache_dtype", "dim", "tolerance"), KERNELS)
@pytest.mark.parametrize("misalignment", [0, 1])
def test_matches_float64(
    launch_in_every_order, dtype, cache_dtype, dim, tolerance, batch, tokens, heads, position, normalize, misalignment
):
    qkv, caches, scale = problem(batch, tokens, heads, dim, dtype, cache_dtype)
    scale = scale if normalize else None
    check(launch_in_every_order, qkv, caches, position, scale, tolerance, misalignment=misalignment)


def test_inputs_that_lie_otherwise(launch_in_every_order):
    """Caches that are slices of larger ones, each in its own way; qkv and scale strided."""
    qkv, (k, v), scale = problem(2, 5, 3, 32, torch.float32, torch.float16)
    k = torch.nn.functional.pad(k, (0, 0, 0, 1))[:, :, :3]
    v = torch.nn.functional.pad(v, (0, 0, 0, 0, 2, 1))[:, 2:-1]
    qkv, scale = qkv.transpose(0, 3).contiguous().transpose(0, 3), scale[:, None].expand(3, 2).contiguous()[:, 0]
    check(launch_in_every_order, qkv, (k, v), 3, scale, 2e-3)


def test_nothing_to_do(launch_in_every_order):
    qkv, caches, scale = problem(2, 0, 3, 32, torch.float32, torch.float16)
    check(launch_in_every_order, qkv, caches, 12, scale, 0)
