"""Every op of :mod:`flexvar_ext` in plain PyTorch: the specification.

Slow and clear on purpose. Each function has the name, arguments and result of the native op. Call it by name, or build
a model with ``backend="reference"``; an op itself runs as this file only where its docstring says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flexvar_ext._checks import int64_per_image

__all__ = [
    "append_qkv",
    "conv3x3",
    "embed_resample",
    "group_norm_silu",
    "guided_sample",
    "layer_norm_modulate",
    "linear",
    "resample2d",
    "residual_layer_norm_modulate",
    "scale_attention",
    "scale_attention_step",
    "vq_lookup",
    "vq_lookup_multiscale",
]


def vq_lookup(latents: Tensor, codebook: Tensor, *, normalize: bool = True) -> Tensor:
    """[N, C], [V, C] -> int64 [N]: the code at the smallest Euclidean distance, the lowest index on ties."""
    x, codes = latents.float(), codebook.float()
    if normalize:
        x, codes = F.normalize(x, dim=-1), F.normalize(codes, dim=-1)
    if codes.shape[0] == 0:
        raise ValueError("vq_lookup: codebook must hold at least one code, got shape (0, C)")
    squared_distance = x.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * x @ codes.T
    return squared_distance.argmin(dim=1)


def resample2d(x: Tensor, size: tuple[int, int], *, mode: str, antialias: bool = False) -> Tensor:
    """[B, C, H, W] -> [B, C, h, w], as ``torch.nn.functional.interpolate`` with ``align_corners=False``."""
    if mode in ("nearest", "area"):
        return F.interpolate(x, size=size, mode=mode)
    if antialias and x.dtype in (torch.float16, torch.bfloat16):  # torch has no CPU kernel for them
        return resample2d(x.float(), size, mode=mode, antialias=True).to(x.dtype)
    if antialias and size[1] == 1 and size[0] > 1:  # torch 2.13's CPU kernel is wrong for such columns, not for rows
        return resample2d(x.transpose(2, 3), (1, size[0]), mode=mode, antialias=True).transpose(2, 3)
    return F.interpolate(x, size=size, mode=mode, align_corners=False, antialias=antialias)


def vq_lookup_multiscale(
    latent: Tensor,
    codebook: Tensor,
    scales: Sequence[tuple[int, int]],
    *,
    normalize: bool = True,
    mode: str = "area",
    antialias: bool = False,
) -> Tensor:
    """[B, C, H, W] -> int64 [B, L]: the latent resampled to every scale and looked up, scale after scale, row-major."""
    batch, channels = latent.shape[:2]
    tokens = []
    for height, width in scales:
        resampled = resample2d(latent.float(), (height, width), mode=mode, antialias=antialias)
        flat = resampled.permute(0, 2, 3, 1).reshape(-1, channels)
        tokens.append(vq_lookup(flat, codebook, normalize=normalize).view(batch, height * width))
    return torch.cat(tokens, dim=1)


def embed_resample(
    indices: Tensor,
    codebook: Tensor,
    size: tuple[int, int],
    *,
    normalize: bool = True,
    mode: str = "bicubic",
) -> Tensor:
    """int64 [B, h0, w0] -> tokens [B, h*w, C]: look codes up, resample the grid, lay it out as tokens.

    As with the native op, an index that is no code makes NaN on CUDA, where looking would mean waiting.
    """
    wide = codebook if codebook.dtype == torch.float64 else codebook.float()
    codes = F.normalize(wide, dim=-1).to(codebook.dtype) if normalize else codebook
    if indices.is_cuda:  # F.embedding asserts there, after which the process can use the device no more
        is_code = (indices >= 0) & (indices < codes.shape[0])
        grid = torch.where(is_code[..., None], F.embedding(torch.where(is_code, indices, 0), codes), torch.nan)
    else:
        grid = F.embedding(indices, codes)
    return resample2d(grid.permute(0, 3, 1, 2), size, mode=mode).flatten(2).transpose(1, 2)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    constant_weight: bool = False,
) -> Tensor:
    """[..., K], [N, K] -> [..., N]: residual + gate * activation(x @ weight.T + bias), in the residual's dtype.

    ``constant_weight`` changes nothing here.
    """
    if not torch.is_autocast_enabled(x.device.type):  # autocast casts them itself, the weight once for many calls
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    out = F.linear(x, weight, bias)
    if activation == "gelu_tanh":
        out = F.gelu(out, approximate="tanh")
    if residual is None:
        return out if gate is None else out * gate.to(out.dtype)
    out = out.to(residual.dtype)
    return residual + out if gate is None else torch.addcmul(residual, gate.to(residual.dtype), out)


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, resize: str = "none", residual: Tensor | None = None
) -> Tensor:
    """[B, C, H, W], [N, C, 3, 3] -> [B, N, h, w]: residual + conv2d(x), perhaps at half or twice the resolution."""
    if not torch.is_autocast_enabled(x.device.type):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if resize == "down":
        out = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2)
    else:
        out = F.conv2d(
            x if resize == "none" else F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1
        )
    return out if residual is None else residual + out


def result_dtype(x: Tensor) -> torch.dtype:
    """That of x; under autocast, autocast's, unless x is float64."""
    device = "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type  # a device's string is slow to make
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor:
    """[B, L, C], [B or 1, 1, C] twice -> [B, L, C]: LayerNorm(x) * scale + shift, no parameters of its own."""
    norm = F.layer_norm(x, x.shape[-1:], eps=eps)  # autocast runs it in float32
    return torch.addcmul(shift, norm, scale).to(dtype or result_dtype(x))


def residual_layer_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x + gate * branch, in x's dtype, and its :func:`layer_norm_modulate`."""
    y = torch.addcmul(x, gate, branch).to(x.dtype)
    return y, layer_norm_modulate(y, scale, shift, eps=eps, dtype=dtype)


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, silu: bool = True
) -> Tensor:
    """[B, C, H, W], [C] twice -> [B, C, H, W]: SiLU(GroupNorm(x)), or GroupNorm(x); in float32, rounded once."""
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), bias.dtype)
    wide = torch.promote_types(wide, torch.float32)
    out = torch.group_norm(_for_group_norm(x, weight, bias).to(wide), num_groups, weight.to(wide), bias.to(wide), eps)
    out = (F.silu(out) if silu else out).to(result_dtype(x))
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return out.contiguous(memory_format=torch.channels_last) if is_channels_last else out


def _for_group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Contiguous where torch (2.13) may crash: its gradients of channels-last maps do where that of x is not asked for.

    That is not known here, and copies are slow: in float32 only maps that need no gradient are taken for such.
    """
    if (weight.requires_grad or bias.requires_grad) and not (x.requires_grad and x.dtype != torch.float64):
        return x.contiguous()
    return x


def scale_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_lengths: Sequence[int],
    *,
    softmax_scale: float | None = None,
    q_scale: Tensor | None = None,
) -> Tensor:
    """[B, L, H, D] each -> [B, L, H, D]: a token of scale i attends to every token of the scales <= i.

    Where k and v are finite: a mask takes what is not seen times 0, and 0 times a NaN or an infinity is NaN, which the
    native op, that does not look at what is not seen, does not give.
    """
    if q_scale is not None:
        dtype, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
        q = (F.normalize(q.to(wide), dim=-1) * q_scale.to(wide)[:, None]).to(dtype)
        k = F.normalize(k.to(wide), dim=-1).to(dtype)
    scale_of_token = torch.repeat_interleave(
        torch.arange(len(scale_lengths), device=q.device),
        torch.tensor(scale_lengths, device=q.device),
        output_size=sum(scale_lengths),  # a known size: no look at the device, and torch.compile can trace it
    )
    visible = scale_of_token[:, None] >= scale_of_token[None, :]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible, scale=softmax_scale
    )
    return out.transpose(1, 2)


def append_qkv(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, position: int, *, q_scale: Tensor | None = None
) -> Tensor:
    """[B, l, 3, H, D], caches [B, L_max, H, D] -> queries [B, l, H, D]; keys and values go into their caches."""
    wide = qkv if qkv.dtype == torch.float64 else qkv.float()
    q, k, v = wide.unbind(2)
    if q_scale is not None:
        q, k = F.normalize(q, dim=-1) * q_scale.to(wide.dtype)[:, None], F.normalize(k, dim=-1)
    k_cache[:, position : position + qkv.shape[1]] = k
    v_cache[:, position : position + qkv.shape[1]] = v
    return q.to(k_cache.dtype)


def scale_attention_step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_length: int,
    *,
    softmax_scale: float | None = None,
    logit_bound: Tensor | None = None,
) -> Tensor:
    """[B, l, H, D], caches [B, L_max, H, D] -> [B, l, H, D]: attention to the first ``kv_length`` cached tokens.

    ``logit_bound`` does not change what is computed.
    """
    k, v = k_cache[:, :kv_length], v_cache[:, :kv_length]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=softmax_scale)
    return out.transpose(1, 2)


# Sampling: a token's softmax weight is the integer floor(2**30 * 2**t), t = log2(e) * (logit - row maximum) rounded to
# multiples of 2**-18. Integer sums do not depend on their order, so every backend finds the same cumulative sums.
_LOG2_E = float.fromhex("0x1.715476p0")  # float32(log2(e))
_EXP2_COEFFICIENTS = tuple(
    map(float.fromhex, ("0x1.04d2a4p-1", "0x1.41077ep-2", "0x1.5226b4p-3", "-0x1.7fd96ap-10", "0x1.b7f730p-7"))
)


def _integer_weights(x: Tensor) -> Tensor:
    """float32 [..., V] without NaN -> int64 [..., V], at most 2**30; 0 below 2**-30 of the largest, and at -inf.

    The arithmetic of csrc/guided_sample/arithmetic.h. Its ``fma`` rounds once, and so does ``.float()`` here: what
    comes before it is a multiple of 2**-48 below 4, hence exact in float64.
    """
    maximum = x.amax(-1, keepdim=True)
    difference = torch.where(x == maximum, 0.0, x - maximum)  # inf - inf is 0 here
    t = (difference.double() * (_LOG2_E * 2**18)).round().clamp(min=-31 * 2**18).long()  # in units of 2**-18
    whole, fraction = t >> 18, t & (2**18 - 1)
    g = 1 + fraction.double() * 2**-18
    power = torch.full_like(g, _EXP2_COEFFICIENTS[-1])  # 2**(g - 1), in [1, 2)
    for coefficient in reversed(_EXP2_COEFFICIENTS[:-1]):
        power = (power * g + coefficient).float().double()
    weights = (power * 2**30).long() >> -whole
    return torch.where(x == -torch.inf, 0, weights)


def _philox4x32(counter: Sequence[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four counter words and two key words to four random words (in int64)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    word = 2**32 - 1
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products, wrapped into the sign
        c0, c1, c2, c3 = (p1 >> 32 & word) ^ c1 ^ k0, p1 & word, (p0 >> 32 & word) ^ c3 ^ k1, p0 & word
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    return [c0, c1, c2, c3]


def _scaled_draw(low: Tensor, high: Tensor, total: Tensor) -> Tensor:
    """floor(r * total / 2**64) for the 64-bit number r = high * 2**32 + low and 0 <= total < 2**63."""
    word = 2**32 - 1
    total_low, total_high = total & word, total >> 32
    middle = high * total_low  # 64 bits, wrapped into the sign
    carry = (middle & word) + low * total_high + (low * total_low >> 32 & word)
    return high * total_high + (middle >> 32 & word) + (carry >> 32)


def guided_sample(
    logits: Tensor,
    *,
    top_k: int = 0,
    top_p: float = 0.0,
    seed: int | Sequence[int] | Tensor,
    image_ids: Sequence[int] | Tensor,
    step: int,
) -> Tensor:
    """[B, l, V] -> int64 [B, l]: one token a row from its top-k, top-p softmax; -1 for a row without mass."""
    batch, length, _ = logits.shape
    seeds = int64_per_image("guided_sample", "seed", seed, batch, logits.device)[:, None]
    images = int64_per_image("guided_sample", "image_ids", image_ids, batch, logits.device)[:, None]
    x = logits.float() + 0.0  # -0 ties with +0
    values, tokens = torch.where(x.isnan(), -torch.inf, x).sort(dim=-1, descending=True, stable=True)
    weights = _integer_weights(values)
    if top_k > 0:
        weights[..., top_k:] = 0
    if top_p > 0:
        limit = (weights.sum(-1, keepdim=True).double() * top_p).ceil().clamp(min=1).long()
        weights[weights.cumsum(-1) - weights >= limit] = 0
    sums = torch.zeros_like(weights).scatter_(-1, tokens, weights).cumsum(-1)
    total = sums[..., -1]
    positions = torch.arange(length, device=logits.device)
    word = 2**32 - 1
    counter = [positions, torch.full_like(positions, step), images & word, images >> 32 & word]
    low, high, _, _ = _philox4x32(counter, (seeds & word, seeds >> 32 & word))
    drawn = torch.searchsorted(sums, _scaled_draw(low, high, total)[..., None], right=True)[..., 0]
    return torch.where(total > 0, drawn, -1)
