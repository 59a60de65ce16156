"""The computation of a generation: hidden states, then codes, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flexvar._backend import ops
from flexvar.generation.guidance import guidance_weights, is_greedy_in_published_code, mix_guidance
from flexvar.generation.settings import GenerationSettings
from flexvar.schedule import ScaleSchedule
from flexvar.tokenizer import MultiScaleTokenizer
from flexvar.transformer import FlexVARTransformer
from flexvar.transformer.model import GenerationState


class Steps:
    """Computes the steps of a schedule, each when it is asked for, in order::

        steps.begin(labels, seeds, image_ids)
        for index in range(len(schedule)):
            steps.advance(index, previous)
            previous = steps.sample(index)       # or any other codes

    A call reads tensors and leaves tensors, waits for no device, and may be made again: what CUDA graphs need.
    """

    def __init__(
        self,
        tokenizer: MultiScaleTokenizer,
        transformer: FlexVARTransformer,
        schedule: ScaleSchedule,
        settings: GenerationSettings,
    ) -> None:
        self.tokenizer = tokenizer
        self.transformer = transformer
        self.schedule = schedule
        self.settings = settings
        self.weights = guidance_weights(schedule, settings.guidance_scale, settings.guidance_style)
        self.is_guided = any(weight != 0 for weight in self.weights)
        self._state: GenerationState
        self._seeds: Tensor
        self._image_ids: Tensor
        self._hidden: Tensor

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Whose weights are read."""
        return (self.tokenizer.quantize, self.transformer)

    def begin(self, labels: Tensor, seeds: Tensor, image_ids: Tensor) -> None:
        """What does not depend on codes. int64 [B] each, anywhere."""
        device = self.transformer.head.weight.device
        labels, seeds, image_ids = (values.to(device) for values in (labels, seeds, image_ids))
        if self.is_guided:
            labels = torch.cat((labels, torch.full_like(labels, self.transformer.config.null_class)))
        self._seeds, self._image_ids = seeds, image_ids
        dtype = self.settings.autocast_dtype
        with computing(labels.device, dtype):
            self._state = self.transformer.begin(labels, self.schedule, cache_dtype=dtype)

    def advance(self, index: int, previous: Tensor | None) -> None:
        """The hidden states of a step from the codes of the step before, int64 [B, h, w]; None at the first."""
        state = self._state
        state.next_step, state.cache.length = index, self.schedule.offsets[index]
        with computing(state.start.device, self.settings.autocast_dtype):
            self._hidden = self.transformer.step(state, None if previous is None else self._inputs(previous, index))

    def sample(self, index: int) -> Tensor:
        """The codes of the step that was computed last, int64 [B, h, w]; -1 where the logits are not numbers."""
        size = self.schedule[index]
        is_greedy = self.settings.published_greedy_quirk and is_greedy_in_published_code(size)
        with computing(self._hidden.device, self.settings.autocast_dtype):
            hidden = mix_guidance(self._hidden, self.weights[index]) if self.is_guided else self._hidden
            drawn: Tensor = ops(self.transformer.backend).guided_sample(
                self.transformer.head_logits(hidden),
                top_k=1 if is_greedy else self.settings.top_k,
                top_p=self.settings.top_p,
                seed=self._seeds,
                image_ids=self._image_ids,
                step=index,
            )
        return drawn.unflatten(1, size)

    def _inputs(self, previous: Tensor, index: int) -> Tensor:
        """Codes on the grid of a step: [B, l, codebook_dim]."""
        inputs: Tensor = ops(self.transformer.backend).embed_resample(
            previous,
            self.tokenizer.codebook,
            self.schedule[index],
            normalize=self.tokenizer.config.normalize_codes,
            mode=self.transformer.config.upsample_mode,
        )
        return inputs.to(self.transformer.head.weight.dtype)


@contextmanager
def computing(device: torch.device, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """No gradients; autocast as asked for, whatever surrounds the call."""
    autocast = torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None)
    with torch.inference_mode(), autocast:
        yield
