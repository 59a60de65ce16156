"""Inputs of the attention tests."""

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAPER_LENGTHS = [side * side for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]  # 680 tokens


def make_qkv(batch, tokens, heads, dim, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3, heads, dim, dtype=torch.float64, generator=generator)
    return qkv.to(device, dtype).unbind(2)


def gradient_of(q, dtype):
    return torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(q.device, dtype)


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def make_q_scale(heads, dtype, device="cpu"):
    scale = torch.linspace(4, -0.5, heads, dtype=torch.float64)  # below zero, too
    return scale.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
