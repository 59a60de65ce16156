"""No op reads behind its inputs: each ends where readable memory ends. In processes of their own, as a read too far
is a crash."""

import ctypes
import mmap
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import flexvar_ext
from flexvar_ext import _host

INSTRUCTION_SETS = _host.build_info()["cpu_instruction_sets"].split()
INSTRUCTION_SETS = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_host.cpu_isa()) + 1]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def at_the_end(tensor: Tensor) -> Tensor:
    """A contiguous copy whose last byte is the last one of a readable page."""
    bytes_used = tensor.numel() * tensor.element_size()
    pages = (bytes_used + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address + pages), mmap.PAGESIZE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    copy = torch.frombuffer(memory, dtype=tensor.dtype, offset=pages - bytes_used, count=tensor.numel())
    return copy.view(tensor.shape).copy_(tensor)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return at_the_end(torch.randn(shape).to(dtype))


def with_gradients(out: Tensor, *inputs: Tensor) -> None:
    torch.autograd.grad(out, inputs, randn(*out.shape, dtype=out.dtype))


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*shape, dtype=dtype).requires_grad_()


def lookups_and_resampling(channels: int) -> None:
    flexvar_ext.vq_lookup(randn(5, channels), randn(7, channels))
    flexvar_ext.vq_lookup(randn(131, channels), randn(19, channels), normalize=False)
    flexvar_ext.vq_lookup_multiscale(randn(1, channels, 3, 5), randn(7, channels), [(1, 1), (2, 3), (7, 4)])
    indices = at_the_end(torch.randint(7, (1, 5, 3)))
    for mode in ("nearest", "bilinear", "bicubic", "area"):
        for size in ((1, 1), (2, 1), (9, 4)):
            for dtype in DTYPES:
                x, codebook = leaf(1, channels, 5, 3, dtype=dtype), leaf(7, channels, dtype=dtype)
                with_gradients(flexvar_ext.resample2d(x, size, mode=mode), x)
                with_gradients(flexvar_ext.embed_resample(indices, codebook, size, mode=mode), codebook)


def layers(channels: int, dtype: torch.dtype) -> None:
    for tokens in (1, 3, 18):
        x, weight, bias = randn(1, tokens, channels, dtype=dtype), randn(11, channels, dtype=dtype), randn(11)
        gate, residual = randn(1, 1, 11), randn(1, tokens, 11, dtype=dtype)
        flexvar_ext.linear(x, weight, bias, activation="gelu_tanh", gate=gate, residual=residual)
        x = leaf(1, tokens, channels, dtype=dtype)
        scale, shift = leaf(1, 1, channels, dtype=dtype), leaf(1, 1, channels, dtype=dtype)
        with_gradients(flexvar_ext.layer_norm_modulate(x, scale, shift), x, scale, shift)
    for resize in ("none", "down", "up"):
        x, weight = randn(1, channels, 4, 3, dtype=dtype), randn(5, channels, 3, 3, dtype=dtype)
        flexvar_ext.conv3x3(x, weight, randn(5, dtype=dtype), resize=resize)
    x, weight, bias = leaf(1, channels, 3, 3, dtype=dtype), leaf(channels), leaf(channels)
    with_gradients(flexvar_ext.group_norm_silu(x, 1, weight, bias), x, weight, bias)


def attention(dim: int, dtype: torch.dtype) -> None:
    q, k, v = (leaf(1, 14, 1, dim, dtype=dtype) for _ in range(3))
    with_gradients(flexvar_ext.scale_attention(q, k, v, [1, 4, 9]), q, k, v)
    flexvar_ext.scale_attention_step(randn(1, 9, 1, dim, dtype=dtype), k.detach(), v.detach(), 14)
    caches = randn(1, 14, 1, dim, dtype=dtype), randn(1, 14, 1, dim, dtype=dtype)
    flexvar_ext.append_qkv(randn(1, 9, 3, 1, dim, dtype=dtype), *caches, 5, q_scale=randn(1))


def main() -> None:
    torch.manual_seed(0)
    for channels in (1, 3, 9, 24, 33):
        lookups_and_resampling(channels)
        for dtype in DTYPES:
            layers(channels, dtype)
    for dtype in DTYPES:
        for dim in (32, 96):
            attention(dim, dtype)
    ids = at_the_end(torch.arange(3))
    for top_k in (0, 5):
        flexvar_ext.guided_sample(randn(3, 4, 37), top_k=top_k, top_p=0.9, seed=1, image_ids=ids, step=0)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_inputs_that_end_where_memory_ends(instruction_set):
    run = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "FLEXVAR_CPU_ISA": instruction_set},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr


if __name__ == "__main__":
    main()
