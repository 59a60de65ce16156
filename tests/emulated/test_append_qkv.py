"""The CUDA kernel of append_qkv, run on the CPU."""

import numpy as np
import pytest
import torch

from flexvar_ext import reference

# Name of the binding, dtypes of qkv and of the caches, head dim, tolerance.
KERNELS = [
    ("append_qkv_float32_32", torch.float32, torch.float32, 32, 2e-6),
    ("append_qkv_float32_float16_96", torch.float32, torch.float16, 96, 2e-3),
    ("append_qkv_float32_bfloat16_128", torch.float32, torch.bfloat16, 128, 2e-2),
    ("append_qkv_float16_128", torch.float16, torch.float16, 128, 2e-3),
    ("append_qkv_float16_float32_64", torch.float16, torch.float32, 64, 2e-6),
    ("append_qkv_float16_bfloat16_32", torch.float16, torch.bfloat16, 32, 2e-2),
    ("append_qkv_bfloat16_64", torch.bfloat16, torch.bfloat16, 64, 2e-2),
    ("append_qkv_bfloat16_float32_96", torch.bfloat16, torch.float32, 96, 2e-6),
    ("append_qkv_bfloat16_float16_32", torch.bfloat16, torch.float16, 32, 2e-3),
    ("append_qkv_float64_128", torch.float64, torch.float64, 128, 1e-12),
]


def as_array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def as_tensor(array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("batch", "tokens", "heads", "position"), [(1, 1, 1, 0), (2, 5, 3, 2), (1, 11, 2, 1)])
@pytest.mark.parametrize(("name", "dtype", "cache_dtype", "dim", "tolerance"), KERNELS)
@pytest.mark.parametrize("misalignment", [0, 1])
def test_matches_float64(
    emulated, run_in_every_order, name, dtype, cache_dtype, dim, tolerance, batch, tokens, heads, position, normalize,
    misalignment,
):  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 3, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    caches = [torch.randn(batch, 12, heads, dim, generator=generator).to(cache_dtype) for _ in range(2)]
    scale = torch.rand(heads, generator=generator, dtype=torch.float64) * 4
    if dtype != torch.float64:
        scale = scale.float()
    exact = [cache.double() for cache in caches]
    expected = reference.append_qkv(qkv.double(), *exact, position, q_scale=scale.double() if normalize else None)
    found = run_in_every_order(
        lambda *arguments: tuple(getattr(emulated, name)(*arguments)),
        *(as_array(qkv), *map(as_array, caches), position, scale.numpy() if normalize else None),
        misalignment=misalignment,
    )
    for array, right in zip(found, (expected, *exact), strict=True):
        torch.testing.assert_close(as_tensor(array).double(), right, rtol=tolerance, atol=tolerance)
