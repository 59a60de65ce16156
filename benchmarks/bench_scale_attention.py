"""Block-causal attention against SDPA with a mask and SDPA scale by scale, also with normalised queries and keys; the
cached step against SDPA on slices."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import flexvar_ext
from flexvar_ext import reference

LENGTHS = [side * side for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]  # one 256 px image, 680 tokens
BATCH, HEADS, DIM = 2, 16, 64
PAIRS = sum(length * end for length, end in zip(LENGTHS, itertools.accumulate(LENGTHS), strict=True))
PRODUCT = 2 * BATCH * HEADS * DIM * PAIRS  # floating-point operations of one matrix product over the visible pairs
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def per_scale_sdpa(q, k, v, scale=None):
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    bounds = itertools.pairwise([0, *itertools.accumulate(LENGTHS)])
    parts = [F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], scale=scale) for a, b in bounds]
    return torch.cat(parts, dim=2).transpose(1, 2)


def make_qkv(dtype, device, requires_grad=False):
    qkv = torch.randn(BATCH, sum(LENGTHS), 3, HEADS, DIM, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return [part.detach().requires_grad_(requires_grad) for part in qkv.unbind(2)]


def close(dtype):
    def check(name, result, expected):
        torch.testing.assert_close(result, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])

    return check


@pytest.mark.parametrize("dtype", DTYPES, ids=["forward float32", "forward bfloat16"])
def test_forward(compare, device, dtype):
    q, k, v = make_qkv(dtype, device)
    with torch.inference_mode():
        compare(
            {
                "native": lambda: flexvar_ext.scale_attention(q, k, v, LENGTHS),
                "reference": lambda: reference.scale_attention(q, k, v, LENGTHS),
                "per-scale SDPA": lambda: per_scale_sdpa(q, k, v),
            },
            check=close(dtype),
            flops=2 * PRODUCT,
            gemm=str(dtype).removeprefix("torch."),
            targets={"reference": 1.5, "per-scale SDPA": 1.5},
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=["forward and backward float32", "forward and backward bfloat16"])
def test_forward_and_backward(compare, device, dtype):
    inputs = make_qkv(dtype, device, requires_grad=True)
    grad_out = torch.randn_like(inputs[0])

    def gradients(out):
        return torch.autograd.grad(out, inputs, grad_out)

    compare(
        {
            "native": lambda: gradients(flexvar_ext.scale_attention(*inputs, LENGTHS)),
            "reference": lambda: gradients(reference.scale_attention(*inputs, LENGTHS)),
            "per-scale SDPA": lambda: gradients(per_scale_sdpa(*inputs)),
        },
        check=close(dtype),
        flops=7 * PRODUCT,
        gemm=str(dtype).removeprefix("torch."),
        targets={"reference": 1.6, "per-scale SDPA": 1.6},
        seconds=4.0,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=["normalised forward float32", "normalised forward bfloat16"])
def test_normalized_forward(compare, device, dtype):
    """Normalised queries and keys. The reference is F.normalize and SDPA with a mask."""
    q, k, v = make_qkv(dtype, device)
    q_scale = torch.linspace(4, 20, HEADS, device=device)

    def per_scale():
        normalized_q = (F.normalize(q.float(), dim=-1) * q_scale[:, None]).to(dtype)
        return per_scale_sdpa(normalized_q, F.normalize(k.float(), dim=-1).to(dtype), v, scale=1.0)

    with torch.inference_mode():
        compare(
            {
                "native": lambda: flexvar_ext.scale_attention(q, k, v, LENGTHS, softmax_scale=1.0, q_scale=q_scale),
                "reference": lambda: reference.scale_attention(q, k, v, LENGTHS, softmax_scale=1.0, q_scale=q_scale),
                "per-scale SDPA": per_scale,
            },
            check=close(dtype),
            flops=2 * PRODUCT,
            gemm=str(dtype).removeprefix("torch."),
            targets={"reference": 1.5, "per-scale SDPA": 1.5},
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=["step float32", "step bfloat16"])
@pytest.mark.parametrize(("queries", "kv_length"), [(1, 1), (16, 30), (100, 255), (256, 680)])
def test_step(compare, device, queries, kv_length, dtype):
    q, k, v = make_qkv(dtype, device)
    k_cache, v_cache = k.contiguous(), v.contiguous()
    q = q[:, :queries]
    with torch.inference_mode():
        compare(
            {
                "native": lambda: flexvar_ext.scale_attention_step(q, k_cache, v_cache, kv_length),
                "reference": lambda: reference.scale_attention_step(q, k_cache, v_cache, kv_length),
            },
            check=close(dtype),
            flops=4 * BATCH * HEADS * DIM * queries * kv_length,
            gemm=str(dtype).removeprefix("torch."),
            seconds=1.0,
        )
