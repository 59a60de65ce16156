"""Blocks of the transformer. Token tensors are [B, L, width]; module names are those of the published checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar._backend import ops
from flexvar._kept import Casts, Kept
from flexvar.schedule import ScaleSchedule
from flexvar.transformer.config import TransformerConfig
from flexvar.transformer.kv_cache import KVCache
from flexvar_ext.reference import result_dtype

_MAX_LOG_SCALE = math.log(100)  # bound of the learned log scale of normalised queries


class Norm(NamedTuple):
    """LN(x) * scale + shift: what AdaLN makes of x [B, l, width] on its way to the next linear layer."""

    scale: Tensor
    shift: Tensor
    dtype: torch.dtype | None = None  #: of the result: that of x, or autocast's, unless given

    def __call__(self, x: Tensor, backend: str) -> Tensor:
        normed: Tensor = ops(backend).layer_norm_modulate(x, self.scale, self.shift, dtype=self.dtype)
        return normed


class Modulation(NamedTuple):
    """What a block needs that does not depend on its tokens: computed once per image, used at every step.

    gamma, scale and shift are [B, 1, width] in float32 (or float64), index 1 for attention and 2 for the feed-forward
    network; 1 is already added to the scales. ``qkv_bias`` is [3 * width]; ``q_scale`` is [heads], in float32 (or
    float64), too, or None without QK normalisation.
    """

    gamma1: Tensor
    gamma2: Tensor
    scale1: Tensor
    scale2: Tensor
    shift1: Tensor
    shift2: Tensor
    qkv_bias: Tensor
    q_scale: Tensor | None

    @property
    def norm1(self) -> Norm:
        return Norm(self.scale1, self.shift1)

    @property
    def norm2(self) -> Norm:
        return Norm(self.scale2, self.shift2)


def activate(condition: Tensor) -> Tensor:
    """SiLU of class embeddings, which all AdaLN layers read: cast once where autocast would cast it for each."""
    return F.silu(condition).to(result_dtype(condition))


class _Activated(nn.Identity):
    """Stands where checkpoints count a SiLU as layer 0; :func:`activate` has been there for all layers."""


def _wide(vectors: Tensor) -> Tensor:
    """At least float32: what the ops take such vectors in, and where 1 can be added to a small scale."""
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))


class Linear(nn.Linear):
    """``nn.Linear`` on the backend's op, with the arguments of :func:`flexvar_ext.linear` for what follows it."""

    def __init__(self, in_features: int, out_features: int, backend: str, *, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.backend = backend
        self._casts = Casts(backend)

    def forward(
        self, input: Tensor, *, activation: str = "none", gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        bias = None if self.bias is None else self._casts.of("bias", self.bias)
        out: Tensor = ops(self.backend).linear(
            input, self.cast_weight(), bias, activation=activation, gate=gate, residual=residual, constant_weight=True
        )
        return out

    def add_and_norm(self, input: Tensor, gate: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """x = residual + gate * linear(input), and the norm of x, in the fewest passes over memory."""
        op = ops(self.backend)
        if input.device.type == "cuda":  # the product is torch's: all that follows is one pass behind it
            x, normed = op.residual_layer_norm_modulate(
                residual, self(input), gate, norm.scale, norm.shift, dtype=norm.dtype
            )
            return x, normed
        x = self(input, gate=gate, residual=residual)  # gate and residual belong to the product
        return x, norm(x, self.backend)

    def cast_weight(self) -> Tensor:
        """The weight as a product takes it."""
        return self._casts.of("weight", self.weight)


class SelfAttention(nn.Module):
    """Multi-head attention whose tokens see their own scale and all scales before (block-causal)."""

    def __init__(self, config: TransformerConfig, backend: str) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.heads = heads
        self.backend = backend
        self.qk_l2_norm = config.qk_l2_norm
        self.softmax_scale = 1.0 if config.qk_l2_norm else 0.25 / math.sqrt(config.head_dim)
        if config.qk_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.mat_qkv = Linear(width, 3 * width, backend, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width, backend)
        self._constants: Kept[tuple[Tensor, Tensor | None]] = Kept()
        self._casts = Casts(backend)

    def constants(self) -> tuple[Tensor, Tensor | None]:
        """``qkv_bias`` and ``q_scale`` of :class:`Modulation`."""
        parameters = [self.q_bias, self.v_bias, *([self.scale_mul_1H11] if self.qk_l2_norm else [])]
        bias, q_scale = self._constants.get(None, parameters, lambda: self._make_constants([self])[0])
        return self._casts.of("qkv_bias", bias), q_scale

    @staticmethod
    def constants_of(layers: Sequence[SelfAttention]) -> list[tuple[Tensor, Tensor | None]]:
        """Those of all: where gradients are recorded, which nothing is kept of, by ops on all layers at once."""
        if torch.is_grad_enabled():
            return SelfAttention._make_constants(layers)
        return [layer.constants() for layer in layers]

    @staticmethod
    def _make_constants(layers: Sequence[SelfAttention]) -> list[tuple[Tensor, Tensor | None]]:
        q_bias, v_bias = torch.stack([a.q_bias for a in layers]), torch.stack([a.v_bias for a in layers])
        biases = torch.cat((q_bias, torch.zeros_like(q_bias), v_bias), dim=1).unbind()
        if not layers[0].qk_l2_norm:
            return [(bias, None) for bias in biases]
        scales = torch.stack([layer.scale_mul_1H11.view(layer.heads) for layer in layers])
        return list(zip(biases, _wide(scales.clamp_max(_MAX_LOG_SCALE).exp()).unbind(), strict=True))

    def project(self, x: Tensor, modulation: Modulation) -> Tensor:
        """[B, l, width] -> queries, keys and values [B, l, 3, heads, head_dim]."""
        qkv: Tensor = ops(self.backend).linear(x, self.mat_qkv.cast_weight(), modulation.qkv_bias, constant_weight=True)
        return qkv.unflatten(-1, (3, self.heads, -1))

    def forward(
        self, x: Tensor, modulation: Modulation, schedule: ScaleSchedule, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All scales at once, x [B, L, width]: y = residual + gamma1 * attn(x), and norm2 of y."""
        q, k, v = self.project(x, modulation).unbind(2)
        out = ops(self.backend).scale_attention(
            q, k, v, schedule.lengths, softmax_scale=self.softmax_scale, q_scale=modulation.q_scale
        )
        return self.proj.add_and_norm(out.flatten(2), modulation.gamma1, residual, modulation.norm2)

    def step(
        self, x: Tensor, modulation: Modulation, cache: KVCache, layer: int, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forward` for one scale behind those in the cache, x [B, l, width]."""
        k_cache, v_cache, position = cache.room(layer, x.shape[1])
        q = ops(self.backend).append_qkv(
            self.project(x, modulation), k_cache, v_cache, position, q_scale=modulation.q_scale
        )
        out = ops(self.backend).scale_attention_step(
            q,
            k_cache,
            v_cache,
            position + x.shape[1],
            softmax_scale=self.softmax_scale,
            logit_bound=modulation.q_scale,  # rows of length 1 times q_scale, and softmax_scale is 1
        )
        return self.proj.add_and_norm(out.flatten(2), modulation.gamma1, residual, modulation.norm2)


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, config: TransformerConfig, backend: str) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, config.width * config.mlp_ratio, backend)
        self.fc2 = Linear(config.width * config.mlp_ratio, config.width, backend)

    def forward(self, x: Tensor, gate: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """y = residual + gate * ffn(x), and the norm of y: x and residual [B, L, width], gate [B, 1, width]."""
        return self.fc2.add_and_norm(self.fc1(x, activation="gelu_tanh"), gate, residual, norm)


class Block(nn.Module):
    """Attention and feed-forward network, each normalised, scaled, shifted and gated by the class (AdaLN).

    x += gamma1 * attn(LN(x) * (1 + scale1) + shift1); x += gamma2 * ffn(LN(x) * (1 + scale2) + shift2).
    """

    def __init__(self, config: TransformerConfig, drop_path: float, backend: str) -> None:
        super().__init__()
        self.width = config.width
        self.drop_path = drop_path
        self.backend = backend
        self.attn = SelfAttention(config, backend)
        self.ffn = FeedForward(config, backend)
        self.shared_adaln = config.shared_adaln
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.width) / math.sqrt(config.width))
        else:
            self.ada_lin = nn.Sequential(_Activated(), Linear(config.width, 6 * config.width, backend))

    @staticmethod
    def modulations(
        blocks: Sequence[Block], condition: Tensor, generator: torch.Generator | None = None
    ) -> list[Modulation]:
        """The :class:`Modulation` of every block for a batch of images, by ops on all blocks at once.

        On a GPU each of these small ops takes as long for one block as for all.

        Args:
            condition: SiLU of class embeddings (:func:`activate`) [B, width]; with shared AdaLN their common projection
                [B, 1, 6, width].
            generator: draws the dropped paths, in training mode.
        """
        vectors = _wide(torch.stack([block._vectors(condition) for block in blocks]))  # [blocks, B, 1, 6, width]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = vectors.unbind(3)
        if any(block.training and block.drop_path > 0 for block in blocks):
            kept1, kept2 = Block._kept_paths(blocks, gamma1, generator)
            gamma1, gamma2 = gamma1 * kept1, gamma2 * kept2
        constants = SelfAttention.constants_of([block.attn for block in blocks])
        of_blocks = zip(*(v.unbind() for v in (gamma1, gamma2, scale1 + 1, scale2 + 1, shift1, shift2)), strict=True)
        return [Modulation._make((*own, *constant)) for own, constant in zip(of_blocks, constants, strict=True)]

    def _vectors(self, condition: Tensor) -> Tensor:
        """[B, 1, 6, width]: gamma, scale and shift, each of attention and of the feed-forward network."""
        if self.shared_adaln:
            return self.ada_gss + condition
        vectors: Tensor = self.ada_lin(condition)
        return vectors.view(-1, 1, 6, self.width)

    @staticmethod
    def _kept_paths(blocks: Sequence[Block], gamma: Tensor, generator: torch.Generator | None) -> Tensor:
        """[2, blocks, B, 1, 1] for gamma [blocks, B, 1, width]: 0 where an image drops the branch, elsewhere what keeps
        its mean. On the gate it costs nothing."""
        kept = gamma.new_empty(2, *gamma.shape[:3], 1)
        for index, block in enumerate(blocks):
            keep = 1 - block.drop_path if block.training else 1.0
            kept[:, index].bernoulli_(keep, generator=generator).div_(keep)
        return kept

    # Both take and return x, [B, L, width], together with its norm: this block's norm1, and `norm` of what follows.
    def forward(
        self, x: Tensor, normed: Tensor, modulation: Modulation, schedule: ScaleSchedule, norm: Norm
    ) -> tuple[Tensor, Tensor]:
        """All scales at once."""
        x, normed = self.attn(normed, modulation, schedule, residual=x)
        return self.ffn(normed, modulation.gamma2, x, norm)

    def step(
        self, x: Tensor, normed: Tensor, modulation: Modulation, cache: KVCache, layer: int, norm: Norm
    ) -> tuple[Tensor, Tensor]:
        """One scale behind those in the cache."""
        x, normed = self.attn.step(normed, modulation, cache, layer, residual=x)
        return self.ffn(normed, modulation.gamma2, x, norm)


class HeadNorm(nn.Module):
    """AdaLN before the head: LN(x) * (1 + scale) + shift."""

    def __init__(self, config: TransformerConfig, backend: str) -> None:
        super().__init__()
        self.width = config.width
        self.ada_lin = nn.Sequential(_Activated(), Linear(config.width, 2 * config.width, backend))

    def modulation(self, condition: Tensor) -> Norm:
        """For SiLU of class embeddings (:func:`activate`) [B, width]: vectors [B, 1, width]."""
        scale, shift = _wide(self.ada_lin(condition)).view(-1, 1, 2, self.width).unbind(2)
        return Norm(scale + 1, shift)


class SharedAdaLN(nn.Sequential):
    """One AdaLN projection for all blocks: SiLU of class embeddings [B, width] -> [B, 1, 6, width]."""

    def __init__(self, width: int, backend: str) -> None:
        super().__init__(_Activated(), Linear(width, 6 * width, backend), nn.Unflatten(1, (1, 6, width)))
