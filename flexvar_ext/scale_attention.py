"""Block-causal attention over scales, whole and step by step with a cache."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexvar_ext._checks import (
    WITH_FLOAT64,
    alike,
    check_no_tangent,
    check_same_device,
    check_tensor,
    is_readable,
)
from flexvar_ext._registration import differentiable, forbid_second_gradient, register_autocast

_STEP = torch.ops.flexvar.scale_attention_step.default  # looked up once: a call takes but ten microseconds
HEAD_DIMS = (32, 64, 96, 128)


def scale_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_lengths: Sequence[int],
    *,
    softmax_scale: float | None = None,
    q_scale: Tensor | None = None,
) -> Tensor:
    """Attention in which a token of scale i sees every token of the scales <= i: the teacher-forced pass of VAR models.

    ``out[b, n, h] = sum_m softmax_m(softmax_scale * <q[b, n, h], k[b, m, h]>) v[b, m, h]`` over the tokens m that
    token n sees (arXiv 2502.20313; the mask of arXiv 2404.02905). Only visible pairs are computed, in tiles that end
    where scales end; neither a mask nor a score matrix is ever held. Products are summed in float32 (float64 for
    float64). The result does not depend on the rest of the batch or on the number of threads, bit for bit. A query all
    of whose scores are -inf gets NaN, the 0 / 0 of the formula.

    With ``q_scale`` queries and keys are normalised (arXiv 2502.20313's code): ``q_scale[h] * e(q[b, n, h])`` and
    ``e(k[b, m, h])`` take their places, where ``e(x) = x / max(|x|, 1e-12)`` over D as in ``F.normalize``, computed in
    float32 (float64 for float64). On CUDA that happens inside the kernels, without a pass over q and k; logits are then
    bounded by ``|softmax_scale * q_scale[h]|``, and a head whose bound is small enough (35 in float32 and bfloat16, 10
    in float16) takes that for the softmax's maximum rather than search for it.

    Args:
        q, k, v: [B, L, H, D] each, D one of 32, 64, 96, 128; float32, float16, bfloat16 or float64, all alike. Any
            strides; slices of a fused [B, L, 3, H, D] are read in place.
        scale_lengths: tokens of every scale, in order; non-negative integers that sum to L. A scale of length 0 is
            allowed and has no effect.
        softmax_scale: finite; D ** -0.5 when None.
        q_scale: [H], floating; used in float32 (float64). None: q and k are taken as they are.

    Returns: [B, L, H, D], contiguous, dtype of ``q`` (autocast's dtype under autocast). Differentiable once in q, k,
        v and q_scale; the backward pass is deterministic.

    Raises: TypeError, ValueError for arguments that break the rules above.
    """
    op = "scale_attention"
    if not _tokens_fit(q, k, v):
        _check_tensors(op, q, {"k": k, "v": v})
        for name, tensor in (("k", k), ("v", v)):
            if tensor.shape != q.shape:
                raise ValueError(f"{op}: {name} must have the shape of q, {tuple(q.shape)}, got {tuple(tensor.shape)}")
    lengths = _check_scale_lengths(op, scale_lengths, q.shape[1])
    scale = _softmax_scale(op, q, softmax_scale)
    check_no_tangent(op, q, k, v, q_scale)
    q_scale = _of_heads(op, "q_scale", q_scale, q)
    out: Tensor = _scale_attention(*_as_autocast_takes(q, k, v), lengths, scale, q_scale)[0]
    return out


def scale_attention_step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_length: int,
    *,
    softmax_scale: float | None = None,
    logit_bound: Tensor | None = None,
) -> Tensor:
    """Attention of one scale's queries to the first ``kv_length`` tokens of a key/value cache: a step of generation.

    ``out[b, n, h] = sum_{m < kv_length} softmax_m(softmax_scale * <q[b, n, h], k_cache[b, m, h]>) v_cache[b, m, h]``.
    With the cache filled up to and including the queries' own scale it equals the rows of that scale of
    :func:`scale_attention`, which see no other tokens.

    On CUDA, where ``B * H`` and the queries make too few blocks for the device, 512 keys and more are cut into parts,
    whose sums are then added in a fixed order: the same arguments give the same bits, but another batch size may round
    otherwise.

    Args:
        q: [B, l, H, D], D one of 32, 64, 96, 128; float32, float16, bfloat16 or float64. Any strides.
        k_cache, v_cache: [B, L_max, H, D], dtype of ``q``. Tokens from ``kv_length`` on are not read.
        kv_length: 1 <= kv_length <= L_max.
        softmax_scale: finite; D ** -0.5 when None.
        logit_bound: [H], floating; used in float32 (float64). A promise about every head's logits:
            ``|softmax_scale * <q, k>| <= logit_bound[h]``, but for rounding. What :func:`append_qkv` normalises has the
            bound ``|softmax_scale * q_scale[h]|``. On CUDA a bound that is small enough (35 in float32 and bfloat16, 10
            in float16) saves the search for the maximum; the CPU searches all the same. Only rounding differs. Nobody
            checks the promise: where it is broken, the head's results may be inaccurate, infinite or NaN. None: no
            bound is known.

    Returns: [B, l, H, D], contiguous, dtype of ``q`` (autocast's dtype under autocast). Has no gradient.

    Raises: TypeError, ValueError for arguments that break the rules above, and when a gradient would be needed.
    """
    op = "scale_attention_step"
    is_left_to_the_kernel = is_readable(q, k_cache, v_cache) and q.dim() == k_cache.dim() == 4
    if not is_left_to_the_kernel and not _caches_fit(q, k_cache, v_cache):
        _check_caches(op, q, k_cache, v_cache)
    if isinstance(kv_length, bool) or not isinstance(kv_length, (int, torch.SymInt)):
        raise TypeError(f"{op}: kv_length must be an integer, got {type(kv_length).__name__}")
    if not 1 <= kv_length <= k_cache.shape[1]:
        raise ValueError(f"{op}: kv_length must be from 1 to L_max = {k_cache.shape[1]}, got {kv_length}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k_cache, v_cache)):
        raise ValueError(
            f"{op}: q, k_cache and v_cache must not require a gradient (use torch.no_grad), got one that does"
        )
    check_no_tangent(op, q, k_cache, v_cache)
    factor, bound = _softmax_scale(op, q, softmax_scale), _of_heads(op, "logit_bound", logit_bound, q)
    try:
        out: Tensor = _STEP(q, k_cache, v_cache, kv_length, factor, bound)
    except RuntimeError:
        _check_caches(op, q, k_cache, v_cache)
        raise
    return out


def _as_autocast_takes(*tokens: Tensor) -> tuple[Tensor, ...]:
    """What register_autocast does, too, but only for calls that go through what is registered."""
    device = tokens[0].device.type
    if not torch.is_autocast_enabled(device):
        return tokens
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tokens)


def _tokens_fit(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """A quick look (``alike``), right or not at all."""
    if not alike((q, k, v), 4, WITH_FLOAT64) or not q.dtype == k.dtype == v.dtype:
        return False
    shape = q.shape
    return shape == k.shape and shape == v.shape and shape[3] in HEAD_DIMS


def _caches_fit(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """A quick look (``alike``), right or not at all."""
    if not alike((q, k_cache, v_cache), 4, WITH_FLOAT64) or not q.dtype == k_cache.dtype == v_cache.dtype:
        return False
    batch, _, heads, dim = q.shape
    shape = k_cache.shape
    return shape == (batch, shape[1], heads, dim) and shape == v_cache.shape and dim in HEAD_DIMS


def _check_caches(op: str, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    _check_tensors(op, q, {"k_cache": k_cache, "v_cache": v_cache})
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape[0] != q.shape[0] or cache.shape[2:] != q.shape[2:] or cache.shape[1] != k_cache.shape[1]:
            raise ValueError(
                f"{op}: {name} must have shape [B, L_max, H, D] with B, H, D as in q, {tuple(q.shape)}, and one L_max, "
                f"got {tuple(cache.shape)}"
            )


def _check_tensors(op: str, q: Tensor, others: dict[str, Tensor]) -> None:
    check_tensor(op, "q", q, "[B, L, H, D]", WITH_FLOAT64)
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"{op}: q must have head dim D = 32, 64, 96 or 128, got {tuple(q.shape)}")
    for name, tensor in others.items():
        check_tensor(op, name, tensor, "[B, L, H, D]", WITH_FLOAT64)
        if tensor.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
            raise TypeError(f"{op}: {name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    check_same_device(op, q=q, **others)


def _check_scale_lengths(op: str, scale_lengths: object, tokens: int) -> list[int]:
    if isinstance(scale_lengths, str) or not isinstance(scale_lengths, Sequence):
        raise TypeError(f"{op}: scale_lengths must be a sequence of integers, got {type(scale_lengths).__name__}")
    for length in scale_lengths:
        if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
            raise TypeError(f"{op}: scale_lengths must hold integers, got {scale_lengths!r}")
        if length < 0:
            raise ValueError(f"{op}: scale_lengths must not be negative, got {scale_lengths!r}")
    if sum(scale_lengths) != tokens:
        raise ValueError(
            f"{op}: scale_lengths must sum to L = {tokens}, "
            f"got {list(scale_lengths)}, which sum to {sum(scale_lengths)}"
        )
    return list(scale_lengths)


def _of_heads(op: str, name: str, value: Tensor | None, q: Tensor) -> Tensor | None:
    """One number a head in the type of the arithmetic."""
    if value is None:
        return None
    check_tensor(op, name, value, "[H]", WITH_FLOAT64)
    if value.shape[0] != q.shape[2]:
        raise ValueError(f"{op}: {name} must have shape [H] with H = {q.shape[2]}, got {tuple(value.shape)}")
    check_same_device(op, **{"q": q, name: value})
    return value.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def _softmax_scale(op: str, q: Tensor, softmax_scale: float | None) -> float:
    if softmax_scale is None:
        return float(q.shape[3] ** -0.5)
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"{op}: softmax_scale must be a number or None, got {type(softmax_scale).__name__}")
    if not abs(softmax_scale) <= sys.float_info.max:  # NaN, infinity, or an int that is no float
        raise ValueError(f"{op}: softmax_scale must be finite, got {softmax_scale}")
    return float(softmax_scale)


@torch.library.register_fake("flexvar::scale_attention")
def _(
    q: Tensor, k: Tensor, v: Tensor, scale_lengths: list[int], softmax_scale: float, q_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    arithmetic = torch.float64 if q.dtype == torch.float64 else torch.float32
    logsumexp = q.new_empty(batch, heads, tokens, dtype=arithmetic)
    return q.new_empty(q.shape), logsumexp, logsumexp.new_empty(0 if q_scale is None else 2, batch, heads, tokens)


@torch.library.register_fake("flexvar::scale_attention_backward")
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale_lengths: list[int],
    softmax_scale: float,
    q_scale: Tensor | None,
    inverse_lengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_q_scale = logsumexp.new_empty(0 if q_scale is None else q.shape[2])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_q_scale


@torch.library.register_fake("flexvar::scale_attention_step")
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_length: int, softmax_scale: float, logit_bound: Tensor | None
) -> Tensor:
    return q.new_empty(q.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, ctx.scale_lengths, ctx.softmax_scale, q_scale = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of 0 for these
    ctx.save_for_backward(q, k, v, *output[:2], q_scale, output[2])


def _backward(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 6
    q, k, v, out, logsumexp, q_scale, inverse_lengths = ctx.saved_tensors
    *grads, grad_q_scale = torch.ops.flexvar.scale_attention_backward(
        grad_out, q, k, v, out, logsumexp, ctx.scale_lengths, ctx.softmax_scale, q_scale, inverse_lengths
    )
    return (*grads, None, None, None if q_scale is None else grad_q_scale)


_scale_attention = differentiable("scale_attention", _backward, _setup_context)
forbid_second_gradient("scale_attention")
register_autocast("scale_attention", only=("q", "k", "v"))
register_autocast("scale_attention_step", only=("q", "k_cache", "v_cache"))
