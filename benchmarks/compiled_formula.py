"""Generation as torch.compile does it best: a peer of bench_generate.

Plain PyTorch on this library's modules, with the plan of work that a careful user would write: AdaLN vectors and
positions once, a cache allocated once, guidance before the head. Blocks (for any number of tokens) and the decoder are
compiled; on a GPU the whole generation is one CUDA graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from flexvar import FlexVARPipeline, ScaleSchedule
from flexvar.generation.guidance import guidance_weights, mix_guidance
from flexvar.transformer.layers import Block, Modulation
from torch import Tensor

from benchmarks.released_formula import sorted_probabilities


class CompiledGeneration:
    """Called without arguments: the indices of every step, int64 [B, h, w], and the pictures, [B, 3, H, W].

    The first call compiles. On a GPU the second records, and it and all later ones write into the same tensors.

    Args:
        pipeline: of the reference backend.
        labels: int64 [B], on the models' device.
        cache_dtype: of keys and values; that of the weights unless given.
    """

    def __init__(
        self,
        pipeline: FlexVARPipeline,
        labels: Tensor,
        schedule: ScaleSchedule,
        *,
        guidance_scale: float,
        top_k: int,
        top_p: float,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self._pipeline, self._labels, self._schedule = pipeline, labels, schedule
        self._weights = guidance_weights(schedule, guidance_scale, "var")
        self._top_k, self._top_p, self._cache_dtype = top_k, top_p, cache_dtype
        self._block = torch.compile(_block, dynamic=True)
        self._decode = torch.compile(pipeline.tokenizer.decode)
        self._is_compiled = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: tuple[list[Tensor], Tensor]

    def __call__(self) -> tuple[list[Tensor], Tensor]:
        if not (self._is_compiled and self._labels.is_cuda):
            self._is_compiled = True
            return self._generate()
        if self._graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what Inductor tunes at a second call would break the recording
                self._generate()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._recorded = self._generate()
        self._graph.replay()
        return self._recorded

    def _generate(self) -> tuple[list[Tensor], Tensor]:
        model, tokenizer, schedule = self._pipeline.transformer, self._pipeline.tokenizer, self._schedule
        codebook = F.normalize(tokenizer.codebook, dim=-1)
        twins = torch.cat((self._labels, torch.full_like(self._labels, model.config.null_class)))
        state = model.begin(twins, schedule, cache_dtype=self._cache_dtype)
        grid: Tensor | None = None
        pyramid = []
        for index, (size, weight) in enumerate(zip(schedule, self._weights, strict=True)):
            begin, end = schedule.offsets[index], schedule.offsets[index + 1]
            positions = state.positions[:, begin:end]
            if grid is None:
                x = state.start + positions
            else:
                tokens = F.interpolate(grid, size=size, mode="bicubic").flatten(2).transpose(1, 2)
                x = (model.word_embed(tokens) + positions).repeat(2, 1, 1)
            for layer, block in enumerate(model.blocks):
                k_cache, v_cache = state.cache.k[layer], state.cache.v[layer]
                x = self._block(x, state.modulations[layer], _weights(block), k_cache, v_cache, begin)
            scale, shift, _ = state.head_modulation
            hidden = mix_guidance(_norm(x, scale, shift), weight).to(model.head.weight.dtype)
            logits = model.head(hidden).float()
            pyramid.append(_draw(sorted_probabilities(logits, self._top_k, self._top_p)).unflatten(1, size))
            grid = F.embedding(pyramid[-1], codebook).permute(0, 3, 1, 2)
        return pyramid, self._decode(pyramid[-1])


def _draw(probabilities: Tensor) -> Tensor:
    """As torch.multinomial does it, without its look at the numbers, for which a GPU would have to be waited for."""
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def _weights(block: Block) -> tuple[Tensor, ...]:
    attention, ffn = block.attn, block.ffn
    layers = (attention.proj, ffn.fc1, ffn.fc2)
    return (attention.mat_qkv.weight, *(tensor for layer in layers for tensor in (layer.weight, layer.bias)))


def _block(
    x: Tensor, m: Modulation, weights: tuple[Tensor, ...], k_cache: Tensor, v_cache: Tensor, position: int
) -> Tensor:
    """Block.step on functions of tensors alone, so that one compiled graph serves all blocks."""
    qkv_weight, proj_weight, proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    # Modulations are float32 whatever the weights are, and so is what they multiply.
    end, dtype = position + x.shape[1], qkv_weight.dtype
    qkv = F.linear(_norm(x, m.scale1, m.shift1).to(dtype), qkv_weight, m.qkv_bias.to(dtype))
    q, k, v = qkv.unflatten(-1, (3, k_cache.shape[2], k_cache.shape[3])).unbind(2)
    if m.q_scale is None:
        raise ValueError("compiled_formula: the model must have qk_l2_norm, got one without")
    q = (F.normalize(q, dim=-1) * m.q_scale[:, None]).to(k_cache.dtype)
    k_cache[:, position:end] = F.normalize(k, dim=-1)
    v_cache[:, position:end] = v
    past_k, past_v = k_cache[:, :end].transpose(1, 2), v_cache[:, :end].transpose(1, 2)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), past_k, past_v, scale=1.0)
    x = x + m.gamma1 * F.linear(out.transpose(1, 2).flatten(2).to(dtype), proj_weight, proj_bias)
    hidden = F.gelu(F.linear(_norm(x, m.scale2, m.shift2).to(dtype), fc1_weight, fc1_bias), approximate="tanh")
    return x + m.gamma2 * F.linear(hidden, fc2_weight, fc2_bias)


def _norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale + shift
