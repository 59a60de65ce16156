"""Block-causal attention against SDPA with a mask, SDPA scale by scale and FlexAttention, also with normalised queries
and keys; the cached step against SDPA on slices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from flexvar import ScaleSchedule
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flexvar_ext
from benchmarks.measure import PRODUCT_DTYPES
from flexvar_ext import reference

HEADS, DIM = 16, 64
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    schedule: ScaleSchedule
    batch: int

    @property
    def lengths(self) -> list[int]:
        return list(self.schedule.lengths)

    @property
    def product(self) -> int:
        """Floating-point operations of one matrix product over the visible pairs."""
        ends = itertools.accumulate(self.lengths)
        pairs = sum(length * end for length, end in zip(self.lengths, ends, strict=True))
        return 2 * self.batch * HEADS * DIM * pairs

    @property
    def gemm(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        beside = "" if self.batch == 2 else f" {self.schedule.num_tokens} tokens, batch {self.batch}"
        return self.gemm + beside


SCHEDULE = ScaleSchedule.preset(steps=10)  # one 256 px image, 680 tokens
CPU_CASES = [Case(dtype, SCHEDULE, 2) for dtype in PRODUCT_DTYPES]
CUDA_CASES = [
    Case(torch.float32, SCHEDULE, 2),
    Case(torch.bfloat16, SCHEDULE, 2),
    Case(torch.bfloat16, SCHEDULE, 64),
    Case(torch.bfloat16, ScaleSchedule.preset(steps=12, image_size=512), 16),  # 2,233 tokens
]


CASES = CUDA_CASES if torch.cuda.is_available() else CPU_CASES
in_every_case = pytest.mark.parametrize("case", CASES, ids=str)


def make_qkv(case: Case, device: torch.device, requires_grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    qkv = torch.randn(case.batch, sum(case.lengths), 3, HEADS, DIM, device=device).to(case.dtype)
    return [part.detach().requires_grad_(requires_grad) for part in qkv.unbind(2)]


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


def per_scale_sdpa(case: Case, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = heads_first(q, k, v)
    bounds = itertools.pairwise([0, *itertools.accumulate(case.lengths)])
    parts = [F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], scale=scale) for a, b in bounds]
    return torch.cat(parts, dim=2).transpose(1, 2)


def scale_of_tokens(case: Case, device: torch.device) -> Tensor:
    lengths = torch.tensor(case.lengths, device=device)
    return torch.arange(len(lengths), device=device).repeat_interleave(lengths)


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_flex_attention(case: Case, device: torch.device) -> Attention:
    scale_of = scale_of_tokens(case, device)
    tokens = len(scale_of)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return scale_of[query] >= scale_of[key]

    mask = create_block_mask(sees, None, None, tokens, tokens, device=device)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(*heads_first(q, k, v), block_mask=mask).transpose(1, 2)


def make_cudnn_sdpa(case: Case, device: torch.device) -> Attention:
    scale_of = scale_of_tokens(case, device)
    mask = scale_of[:, None] >= scale_of

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(*heads_first(q, k, v), attn_mask=mask).transpose(1, 2)

    return run


def make_implementations(case: Case, device: torch.device, *, backward: bool = False) -> dict[str, Attention]:
    found: dict[str, Attention] = {
        "native": lambda q, k, v: flexvar_ext.scale_attention(q, k, v, case.lengths),
        "reference": lambda q, k, v: reference.scale_attention(q, k, v, case.lengths),
        "per-scale SDPA": lambda q, k, v: per_scale_sdpa(case, q, k, v),
    }
    if device.type == "cuda" or not backward:  # on a CPU it has no backward pass
        found["FlexAttention"] = make_flex_attention(case, device)
    if device.type == "cuda" and case.dtype != torch.float32:
        found["SDPA by cuDNN"] = make_cudnn_sdpa(case, device)
    return found


def targets_of(implementations: Mapping[str, object], target: float) -> dict[str, float]:
    return {name: target for name in implementations if name != "native"}


def target_of(case: Case, device: torch.device, *, backward: bool = False) -> float:
    if device.type == "cpu":
        return 1.6 if backward else 1.5
    if case.schedule.num_tokens > 2000:
        return 1.2
    return 1.4 if backward else 1.6


def close(dtype: torch.dtype) -> Callable[[str, object, object], None]:
    def check(name: str, result: object, expected: object) -> None:
        torch.testing.assert_close(result, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])

    return check


@in_every_case
def test_forward(compare, device, case):
    qkv = make_qkv(case, device)
    implementations = make_implementations(case, device)
    with torch.inference_mode():
        compare(
            {name: partial(attention, *qkv) for name, attention in implementations.items()},
            check=close(case.dtype),
            flops=2 * case.product,
            gemm=case.gemm,
            targets=targets_of(implementations, target_of(case, device)),
        )


@in_every_case
def test_forward_and_backward(compare, device, case):
    inputs = make_qkv(case, device, requires_grad=True)
    grad_out = torch.randn_like(inputs[0])
    implementations = make_implementations(case, device, backward=True)

    def gradients(attention: Attention) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(*inputs), inputs, grad_out)

    compare(
        {name: partial(gradients, attention) for name, attention in implementations.items()},
        check=close(case.dtype),
        flops=7 * case.product,
        gemm=case.gemm,
        targets=targets_of(implementations, target_of(case, device, backward=True)),
        seconds=4.0,
    )


@in_every_case
def test_normalized_forward(compare, device, case):
    """Normalised queries and keys. The reference is F.normalize and SDPA with a mask."""
    q, k, v = make_qkv(case, device)
    q_scale = torch.linspace(4, 20, HEADS, device=device)
    settings = {"softmax_scale": 1.0, "q_scale": q_scale}

    def per_scale():
        normalized_q = (F.normalize(q.float(), dim=-1) * q_scale[:, None]).to(case.dtype)
        return per_scale_sdpa(case, normalized_q, F.normalize(k.float(), dim=-1).to(case.dtype), v, scale=1.0)

    target = target_of(case, device)
    with torch.inference_mode():
        compare(
            {
                "native": lambda: flexvar_ext.scale_attention(q, k, v, case.lengths, **settings),
                "reference": lambda: reference.scale_attention(q, k, v, case.lengths, **settings),
                "per-scale SDPA": per_scale,
            },
            check=close(case.dtype),
            flops=2 * case.product,
            gemm=case.gemm,
            targets={"reference": target, "per-scale SDPA": target},
        )


@pytest.mark.parametrize("case", [case for case in CASES if case.schedule == SCHEDULE], ids=str)
@pytest.mark.parametrize(("queries", "kv_length"), [(1, 1), (16, 30), (100, 255), (256, 680)])
def test_step(compare, device, queries, kv_length, case):
    q, k, v = make_qkv(case, device)
    k_cache, v_cache = k.contiguous(), v.contiguous()
    q = q[:, :queries]
    with torch.inference_mode():
        compare(
            {
                "native": lambda: flexvar_ext.scale_attention_step(q, k_cache, v_cache, kv_length),
                "reference": lambda: reference.scale_attention_step(q, k_cache, v_cache, kv_length),
            },
            check=close(case.dtype),
            flops=4 * case.batch * HEADS * DIM * queries * kv_length,
            gemm=case.gemm,
            targets={"reference": 1.5} if device.type == "cpu" else {},
            seconds=1.0,
        )
