"""append_qkv at two steps of 256 px images with guidance, d16."""

import pytest
import torch

import flexvar_ext
from flexvar_ext import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "position"), [(16, 14), (256, 424)])
@pytest.mark.parametrize("rows", [2, 128] if torch.cuda.is_available() else [2])
def test_append_qkv(compare, device, rows, tokens, position, dtype):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, tokens, 3, 16, 64, generator=generator).to(device, dtype)
    caches = [torch.zeros(rows, 680, 16, 64, dtype=dtype, device=device) for _ in range(2)]
    scale = torch.full((16,), 4.0, device=device)
    with torch.inference_mode():
        compare(
            {
                "native": lambda: flexvar_ext.append_qkv(qkv, *caches, position, q_scale=scale),
                "reference": lambda: reference.append_qkv(qkv, *caches, position, q_scale=scale),
            },
            check=lambda name, found, expected: torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2),
            bytes_moved=2 * qkv.nbytes,
            seconds=1.0,
        )
