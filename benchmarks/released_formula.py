"""How generation was arranged in the released model code, on this library's modules: what bench_generate compares with.

It differs from the reference backend in its plan of work: keys and values grow by concatenation, AdaLN vectors and
position embeddings are computed at every step, the head runs on both guided twins, and top-p sorts every logit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from flexvar import FlexVARPipeline, FlexVARTransformer, ScaleSchedule
from flexvar.generation.guidance import guidance_weights
from torch import Tensor


def sorted_multinomial(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """[B, l, V] -> int64 [B, l]: a threshold by topk, a full sort for top-p, softmax, multinomial."""
    return torch.multinomial(sorted_probabilities(logits, top_k, top_p).flatten(0, 1), 1).view(logits.shape[:2])


def sorted_probabilities(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """[B, l, V] -> [B, l, V]: the probabilities of what top-k and top-p keep."""
    if top_k > 0:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p > 0:
        ordered, order = logits.sort(dim=-1, descending=False)
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[..., -1:] = False
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    return logits.softmax(-1)


def generate(
    pipeline: FlexVARPipeline,
    labels: Tensor,
    schedule: ScaleSchedule,
    *,
    guidance_scale: float,
    top_k: int,
    top_p: float,
) -> tuple[list[Tensor], Tensor]:
    """Images drawn with torch's generator.

    labels: int64 [B], on the models' device.

    Returns the indices of every step, int64 [B, h, w], and the pictures, [B, 3, H, W].
    """
    model, quantizer = pipeline.transformer, pipeline.tokenizer.quantize
    codebook = F.normalize(quantizer.embedding.weight, dim=-1)
    condition = model.class_emb(torch.cat((labels, torch.full_like(labels, model.config.null_class))))
    keys: list[Tensor | None] = [None] * len(model.blocks)
    values: list[Tensor | None] = [None] * len(model.blocks)
    weights = guidance_weights(schedule, guidance_scale, "var")
    grid: Tensor | None = None
    pyramid = []
    for size, weight in zip(schedule, weights, strict=True):
        positions = F.interpolate(model.pos_1LC, size=size, mode="area").flatten(2).transpose(1, 2)
        if grid is None:
            x = condition[:, None] + model.pos_start + positions
        else:
            tokens = F.interpolate(grid, size=size, mode="bicubic").flatten(2).transpose(1, 2)
            x = (_linear(model.word_embed, tokens) + positions).repeat(2, 1, 1)
        for layer in range(len(model.blocks)):
            x = _block(model, layer, x, condition, keys, values)
        scale, shift = _linear(model.head_nm.ada_lin[1], F.silu(condition)).view(-1, 1, 2, model.config.width).unbind(2)
        logits = _linear(model.head, _norm(x, scale, shift)).float()
        conditional, unconditional = logits.chunk(2)
        logits = (1 + weight) * conditional - weight * unconditional
        pyramid.append(sorted_multinomial(logits, top_k, top_p).unflatten(1, size))
        grid = F.embedding(pyramid[-1], codebook).permute(0, 3, 1, 2)
    return pyramid, pipeline.tokenizer.decode(grid)


def _block(
    model: FlexVARTransformer,
    layer: int,
    x: Tensor,
    condition: Tensor,
    keys: list[Tensor | None],
    values: list[Tensor | None],
) -> Tensor:
    block, attention = model.blocks[layer], model.blocks[layer].attn
    vectors = _linear(block.ada_lin[1], F.silu(condition)).view(-1, 1, 6, model.config.width)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = vectors.unbind(2)
    bias = torch.cat((attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias))
    qkv = F.linear(_norm(x, scale1, shift1), attention.mat_qkv.weight, bias)
    q, k, v = qkv.unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    q = (F.normalize(q, dim=-1) * attention.scale_mul_1H11.clamp_max(4.605170185988092).exp()).to(v.dtype)
    k = F.normalize(k, dim=-1).to(v.dtype)
    past_k, past_v = keys[layer], values[layer]
    keys[layer] = k = k if past_k is None else torch.cat((past_k, k), dim=2)
    values[layer] = v = v if past_v is None else torch.cat((past_v, v), dim=2)
    out = F.scaled_dot_product_attention(q, k, v, scale=attention.softmax_scale)
    x = x + gamma1 * _linear(attention.proj, out.transpose(1, 2).flatten(2))
    hidden = F.gelu(_linear(block.ffn.fc1, _norm(x, scale2, shift2)), approximate="tanh")
    return x + gamma2 * _linear(block.ffn.fc2, hidden)


def _linear(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    """torch's own, whatever the layer runs on."""
    return F.linear(x, layer.weight, layer.bias)


def _norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
