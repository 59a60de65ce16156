"""The FlexVAR transformer: teacher forcing over all scales at once, generation scale by scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from flexvar._backend import check_backend
from flexvar._checks import check_float, check_schedule, describe
from flexvar.schedule import ScaleSchedule
from flexvar.transformer.config import TransformerConfig
from flexvar.transformer.initialization import initialize
from flexvar.transformer.kv_cache import KVCache
from flexvar.transformer.layers import Block, HeadNorm, Linear, Modulation, Norm, SharedAdaLN, activate
from flexvar.transformer.positions import PositionCache
from flexvar_ext.scale_attention import HEAD_DIMS


@dataclass
class GenerationState:
    """What a generation carries from step to step. Made by :meth:`FlexVARTransformer.begin`; models keep no state.

    N rows are generated together: with guidance the conditional images first, then their unconditional twins.

    Attributes:
        schedule: the size of every step.
        next_step: index of the step that :meth:`FlexVARTransformer.step` computes next.
        cache: keys and values of the finished steps.
        start: [N, 1, width], class embedding plus ``pos_start``: the first step's input but for positions.
        positions: [1, L, width], position embeddings of all steps.
        modulations: one per block.
        head_modulation: of the norm before the head, [N, 1, width].
    """

    schedule: ScaleSchedule
    next_step: int
    cache: KVCache
    start: Tensor
    positions: Tensor
    modulations: list[Modulation]
    head_modulation: Norm


class FlexVARTransformer(nn.Module):
    """Predicts the codes of every scale from the class and the codes of the scale before (arXiv 2502.20313).

    Training runs all scales at once::

        logits = model(class_labels, next_scale_inputs(pyramid, codebook, schedule), schedule)

    Generation runs scale by scale, and leaves guidance and drawing to the caller::

        state = model.begin(torch.cat([labels, null_labels]), schedule)
        inputs = None                                                # the first step has none
        for size in schedule:
            hidden = model.step(state, inputs)                       # [2B, l, width]
            conditional, unconditional = hidden.chunk(2)
            logits = model.head_logits(torch.lerp(unconditional, conditional, guidance))  # [B, l, codebook_size]
            indices = draw(logits).unflatten(1, size)
            inputs = embed_resample(indices, codebook, next_size)    # [B, l', codebook_dim]

    Guidance and the head are both linear, so mixing hidden states equals mixing logits, at half the head's cost.

    Parameter names are those of the published checkpoints.

    Args:
        config: shape of the network.
        backend: "native", or "reference" for the plain-PyTorch ops.

    Raises:
        TypeError: ``config`` is something else.
        ValueError: another backend, or heads whose width the native ops do not have.
    """

    def __init__(self, config: TransformerConfig, *, backend: str = "native") -> None:
        super().__init__()
        if not isinstance(config, TransformerConfig):
            raise TypeError(f"FlexVARTransformer: config must be a TransformerConfig, got {type(config).__name__}")
        self.config = config
        self.backend = check_backend(backend)
        if backend == "native" and config.head_dim not in HEAD_DIMS:
            raise ValueError(
                f"FlexVARTransformer: width / heads must be one of {', '.join(map(str, HEAD_DIMS))} with the native "
                f"ops, got {config.width} / {config.heads} = {config.head_dim}"
            )
        width = config.width
        self.word_embed = Linear(config.codebook_dim, width, backend)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, 1, width))
        self.pos_1LC = nn.Parameter(torch.empty(1, width, config.position_grid, config.position_grid))
        self.shared_ada_lin = SharedAdaLN(width, backend) if config.shared_adaln else nn.Identity()
        rates = [config.drop_path * layer / max(config.depth - 1, 1) for layer in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate, backend) for rate in rates)
        self.head_nm = HeadNorm(config, backend)
        self.head = Linear(width, config.codebook_size, backend)
        self._positions = PositionCache()
        initialize(self)

    def forward(
        self,
        class_labels: Tensor,
        inputs: Tensor,
        schedule: ScaleSchedule,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Teacher forcing: the logits of every token of every scale, given the codes of the scales before.

        Args:
            class_labels: int64 [B], from 0 to ``num_classes`` (the null class).
            inputs: [B, L - L_0, codebook_dim] from :func:`next_scale_inputs`, L_0 being the tokens of the first step.
            schedule: the size of every step.
            generator: draws the dropped labels and paths in training mode; on the model's device.

        Returns:
            [B, L, codebook_size].

        Raises:
            TypeError: labels or inputs of another dtype, or something else than a schedule.
            ValueError: a label out of range, or inputs of another shape or device.
        """
        check_schedule("forward", schedule)
        self._check_labels("forward", class_labels)
        batch = class_labels.shape[0]
        self._check_inputs("forward", inputs, (batch,), schedule.num_tokens - schedule.lengths[0])
        if self.training and self.config.class_dropout > 0:
            uniform = torch.rand(batch, device=class_labels.device, generator=generator)
            class_labels = torch.where(uniform < self.config.class_dropout, self.config.null_class, class_labels)
        condition = self.class_emb(class_labels)
        start = (condition.unsqueeze(1) + self.pos_start).expand(-1, schedule.lengths[0], -1)
        x = torch.cat((start, self.word_embed(inputs)), dim=1)
        x = x + self._positions.get(self.pos_1LC, schedule, self.backend)
        activated = activate(condition)
        shared = self.shared_ada_lin(activated)
        modulations = Block.modulations(self._typed_blocks, shared, generator)
        norms = [*(modulation.norm1 for modulation in modulations), self.head_nm.modulation(activated)]
        normed = norms[0](x, self.backend)
        for block, modulation, norm in zip(self._typed_blocks, modulations, norms[1:], strict=True):
            x, normed = block(x, normed, modulation, schedule, norm)
        return self.head(normed)

    @torch.inference_mode()
    def begin(
        self, class_labels: Tensor | Sequence[int], schedule: ScaleSchedule, *, cache_dtype: torch.dtype | None = None
    ) -> GenerationState:
        """Everything that does not depend on the codes: AdaLN vectors, positions, room for keys and values.

        Args:
            class_labels: N labels from 0 to ``num_classes``, one per row. For guidance: the labels, then as many times
                the null class.
            schedule: the size of every step.
            cache_dtype: dtype of keys and values; that of the weights unless given.

        Raises:
            TypeError: labels that are not integers, or something else than a schedule.
            ValueError: a label out of range.
        """
        check_schedule("begin", schedule)
        if not isinstance(class_labels, Tensor):
            class_labels = torch.tensor(class_labels)
        self._check_labels("begin", class_labels)
        class_labels = class_labels.to(self.head.weight.device)
        condition = self.class_emb(class_labels)
        activated = activate(condition)
        shared = self.shared_ada_lin(activated)
        config = self.config
        return GenerationState(
            schedule=schedule,
            next_step=0,
            cache=KVCache(
                config.depth,
                class_labels.shape[0],
                schedule.num_tokens,
                config.heads,
                config.head_dim,
                dtype=cache_dtype or self.head.weight.dtype,
                device=self.head.weight.device,
                backend=self.backend,
            ),
            start=condition.unsqueeze(1) + self.pos_start,
            positions=self._positions.get(self.pos_1LC, schedule, self.backend),
            modulations=Block.modulations(self._typed_blocks, shared),
            head_modulation=self.head_nm.modulation(activated),
        )

    @torch.inference_mode()
    def step(self, state: GenerationState, inputs: Tensor | None = None) -> Tensor:
        """The hidden states of the next step, ready for :meth:`head_logits`.

        Args:
            state: from :meth:`begin`; its cache and ``next_step`` move on, unless the step fails.
            inputs: [B, l, codebook_dim], the codes of the step before on this step's grid (``embed_resample``), l being
                this step's tokens; None at the first step. N is a multiple of B, and rows b, b + B, b + 2B, … of the
                state all read inputs[b]: guided twins share theirs.

        Returns:
            [N, l, width], after the AdaLN before the head.

        Raises:
            TypeError: inputs of another dtype, or none behind the first step.
            ValueError: inputs of another shape or device, or at the first step; or no step is left.
        """
        index, schedule = state.next_step, state.schedule
        if index >= len(schedule):
            raise ValueError(f"step: state must have a step left, got all {len(schedule)} done")
        length = schedule.lengths[index]
        rows = state.start.shape[0]
        positions = state.positions[:, schedule.offsets[index] : schedule.offsets[index + 1]]
        if index == 0:
            if inputs is not None:
                raise ValueError(f"step: inputs must be None at the first step, got {describe(inputs)}")
            x = state.start + positions
        else:
            self._check_inputs("step", inputs, [n for n in range(1, rows + 1) if rows % n == 0], length)
            x = self.word_embed(inputs)
            x = (x.expand(rows // x.shape[0], -1, -1, -1) + positions).flatten(0, 1)
        # Guidance mixes what comes out of the last norm: in the residual's dtype, not in autocast's.
        last = state.head_modulation._replace(dtype=x.dtype)
        norms = [*(modulation.norm1 for modulation in state.modulations), last]
        normed = norms[0](x, self.backend)
        for layer, (block, norm) in enumerate(zip(self._typed_blocks, norms[1:], strict=True)):
            x, normed = block.step(x, normed, state.modulations[layer], state.cache, layer, norm)
        state.cache.advance(length)
        state.next_step += 1
        return normed

    @torch.inference_mode()
    def head_logits(self, hidden: Tensor) -> Tensor:
        """[B, l, width], hidden states of :meth:`step` or a linear mix of them -> logits [B, l, codebook_size]."""
        return self.head(hidden)

    @property
    def _typed_blocks(self) -> list[Block]:
        return cast("list[Block]", self.blocks)

    def _check_labels(self, op: str, class_labels: Tensor) -> None:
        if not isinstance(class_labels, Tensor) or class_labels.dtype != torch.int64:
            raise TypeError(f"{op}: class_labels must be an int64 tensor, got {describe(class_labels)}")
        if class_labels.ndim != 1:
            raise ValueError(f"{op}: class_labels must have shape [B], got {tuple(class_labels.shape)}")
        if torch.compiler.is_compiling() or class_labels.is_meta or class_labels.numel() == 0:
            return
        if class_labels.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # there is nothing to look at yet
        low, high = (int(bound) for bound in class_labels.aminmax())
        if low < 0 or high > self.config.num_classes:
            raise ValueError(
                f"{op}: class_labels must be from 0 to {self.config.num_classes} (the null class), got {low} to {high}"
            )

    def _check_inputs(self, op: str, inputs: Tensor | None, batches: Sequence[int], length: int) -> None:
        inputs = check_float(op, "inputs", inputs, self.word_embed.weight)
        dim = self.config.codebook_dim
        if inputs.ndim != 3 or inputs.shape[0] not in batches or tuple(inputs.shape[1:]) != (length, dim):
            allowed = " or ".join(map(str, batches))
            raise ValueError(
                f"{op}: inputs must have shape [B, {length}, {dim}] with B = {allowed}, got {tuple(inputs.shape)}"
            )
