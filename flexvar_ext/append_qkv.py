"""Queries, keys and values of a generation step: normalised, and the latter two put into their cache, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from flexvar_ext._checks import WITH_FLOAT64, check_integer, check_no_tangent, check_same_device, check_tensor
from flexvar_ext.scale_attention import HEAD_DIMS


def append_qkv(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, position: int, *, q_scale: Tensor | None = None
) -> Tensor:
    """Writes a step's keys and values behind those of the steps before, and returns its queries.

    With ``q_scale`` queries and keys are normalised (arXiv 2502.20313's code): ``q[b, n, h] = q_scale[h] * e(q)`` and
    ``k = e(k)``, where ``e(x) = x / max(|x|, 1e-12)``; without it they are copied. Lengths are computed in float32
    (float64 for float64) in a fixed order: a token's result depends on nothing but itself.

    Args:
        qkv: [B, l, 3, H, D], a fused projection's output; D one of 32, 64, 96, 128; float32, float16, bfloat16 or
            float64.
        k_cache, v_cache: [B, L_max, H, D], written in place from ``position`` to ``position + l``; float32, float16 or
            bfloat16 (float64 where qkv is), both alike, whatever qkv's. A token's [H, D] must be contiguous, and every
            token of both have memory of its own.
        position: tokens in the cache already, at most L_max - l.
        q_scale: [H], floating; used in float32 (float64).

    Returns: the queries [B, l, H, D], contiguous, in the caches' dtype: what :func:`scale_attention_step` takes. Has no
        gradient.

    Raises: TypeError, ValueError for arguments that break the rules above, and when a gradient would be needed.
    """
    _check(qkv, k_cache, v_cache, position, q_scale)
    if q_scale is not None:
        q_scale = q_scale.to(torch.float64 if qkv.dtype == torch.float64 else torch.float32)
    q: Tensor = torch.ops.flexvar.append_qkv(qkv, k_cache, v_cache, position, q_scale)
    return q


def _check(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, position: int, q_scale: Tensor | None) -> None:
    op = "append_qkv"
    check_tensor(op, "qkv", qkv, "[B, l, 3, H, D]", WITH_FLOAT64)
    batch, length, three, heads, dim = qkv.shape
    if three != 3 or dim not in HEAD_DIMS:
        raise ValueError(
            f"{op}: qkv must have shape [B, l, 3, H, D] with D = 32, 64, 96 or 128, got {tuple(qkv.shape)}"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(op, name, cache, "[B, L_max, H, D]", WITH_FLOAT64)
        if cache.shape != (batch, k_cache.shape[1], heads, dim):
            raise ValueError(
                f"{op}: {name} must have shape [B, L_max, H, D] with B, H, D as in qkv, {tuple(qkv.shape)}, and one "
                f"L_max, got {tuple(cache.shape)}"
            )
        if cache.dtype != k_cache.dtype or (cache.dtype == torch.float64) != (qkv.dtype == torch.float64):
            raise TypeError(
                f"{op}: {name} must have the dtype of k_cache, {k_cache.dtype}, and float64 only where qkv has, "
                f"{qkv.dtype}, got {cache.dtype}"
            )
        strides = cache.stride()
        if strides[3] != 1 or strides[2] != dim:
            raise ValueError(f"{op}: {name} must be contiguous in H and D, got strides {strides}")
        if (strides[0] == 0 and batch > 1) or (strides[1] == 0 and cache.shape[1] > 1):
            raise ValueError(f"{op}: {name} must have memory for every token, got strides {strides}")
    if _is_same_memory(k_cache, v_cache):
        raise ValueError(f"{op}: v_cache must have memory of its own, got that of k_cache")
    check_integer(op, "position", position, 0, 2**63)
    if position > k_cache.shape[1] - length:
        raise ValueError(
            f"{op}: position must leave room for {length} tokens in a cache of {k_cache.shape[1]}, got {position}"
        )
    given = {"qkv": qkv, "k_cache": k_cache, "v_cache": v_cache}
    if q_scale is not None:
        check_tensor(op, "q_scale", q_scale, "[H]", WITH_FLOAT64)
        if q_scale.shape[0] != heads:
            raise ValueError(f"{op}: q_scale must have shape [H] with H = {heads}, got {tuple(q_scale.shape)}")
        given["q_scale"] = q_scale
    check_same_device(op, **given)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given.values()):
        raise ValueError(f"{op}: {', '.join(given)} must not require a gradient (use torch.no_grad), got one that does")
    check_no_tangent(op, *given.values())


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return a.numel() > 0
    # Only what holds values has an address: not the fake tensors of torch.compile and torch.export.
    if type(a) is not Tensor or type(b) is not Tensor or torch.compiler.is_compiling():
        return False
    return a.data_ptr() == b.data_ptr() != 0  # 0: without elements, or on the meta device


@torch.library.register_fake("flexvar::append_qkv")
def _(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, position: int, q_scale: Tensor | None) -> Tensor:
    batch, length, _, heads, dim = qkv.shape
    return k_cache.new_empty(batch, length, heads, dim)


def kept_empty(sizes: tuple[int, ...], *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Memory for a cache of keys or values: uninitialised, contiguous, of shape ``sizes``, as ``torch.empty`` gives it.

    On a CPU, where it is a megabyte or more, it is what earlier results were done with, and its storage cannot be
    resized: the system would take up to a third of a second to hand out what FlexVAR d16 needs for an image.

    Raises: RuntimeError where there is no such memory.
    """
    like = torch.empty(0, dtype=dtype, device=device)
    return torch.ops.flexvar.kept_empty(like, sizes) if like.is_cpu else like.new_empty(sizes)


@torch.library.register_fake("flexvar::kept_empty")
def _(like: Tensor, sizes: list[int]) -> Tensor:
    return like.new_empty(sizes)
