"""The models against numbers computed by the released code (tests/golden/README.md)."""

from __future__ import annotations

import pytest
import torch
from flexvar import FlexVARTransformer, MultiScaleTokenizer, ScaleSchedule, next_scale_inputs
from flexvar._backend import ops
from torch import Tensor

Golden = dict[str, Tensor]

TOKENIZER_CASES = {"tok32": [1, 2, 3, 5, 8], "tok32wide": [(1, 2), (2, 5), (3, 7), (4, 10)]}
TRANSFORMER_CASES = {
    "var2": ([1, 2, 3, 5], [3, 7], 2.5, "var"),
    "var2steps12": (range(1, 13), [0], 1.5, "var"),
    "var2lg": ([1, 2, 4, 6], [9, 1], 4.0, "llamagen"),
}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_indices(actual: Tensor, expected: Tensor, margin: Tensor) -> None:
    """Equal wherever the runner-up is further behind than rounding can account for."""
    assert actual.dtype == torch.int64
    assert actual.shape == expected.shape
    assert (actual == expected)[margin > 1e-4].all()


def name_of(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


@pytest.mark.parametrize("case", TOKENIZER_CASES)
@torch.inference_mode()
def test_tokenizer(case: str, tokenizer: MultiScaleTokenizer, golden: Golden) -> None:
    schedule = ScaleSchedule(TOKENIZER_CASES[case])
    latent = tokenizer.encode(golden[f"{case}.image"])
    assert_close(latent, golden[f"{case}.latent"])
    pyramid = tokenizer.quantize(latent, schedule)
    for size, indices in zip(schedule, pyramid, strict=True):
        assert_indices(indices, golden[f"{case}.indices.{name_of(size)}"], golden[f"{case}.margin.{name_of(size)}"])
    expected = golden[f"{case}.reconstruction.{name_of(schedule.final_size)}"]
    assert_close(tokenizer.decode(pyramid[-1]), expected, 1e-3)
    assert_close(tokenizer.reconstruct(golden[f"{case}.image"], schedule)[-1], expected, 1e-3)


@pytest.mark.parametrize(("case", "size"), [("tok32", (1, 1)), ("tok32wide", (1, 2))])
@torch.inference_mode()
def test_quant_conv_commutes_with_pooling(
    case: str, size: tuple[int, int], tokenizer: MultiScaleTokenizer, golden: Golden
) -> None:
    latent = tokenizer.encode(golden[f"{case}.image"])
    pooled = ops(tokenizer.backend).resample2d(latent, size, mode="area")
    assert_close(pooled, golden[f"{case}.prequant_down.{name_of(size)}"])


@pytest.mark.parametrize("case", TRANSFORMER_CASES)
@torch.inference_mode()
def test_teacher_forcing(case: str, model: FlexVARTransformer, golden: Golden) -> None:
    sides, labels, _, _ = TRANSFORMER_CASES[case]
    logits = model(torch.tensor(labels), golden[f"{case}.teacher_input"], ScaleSchedule(sides))
    assert_close(logits, golden[f"{case}.teacher_logits"])


@pytest.mark.parametrize("case", TRANSFORMER_CASES)
@torch.inference_mode()
def test_greedy_generation(
    case: str, model: FlexVARTransformer, tokenizer: MultiScaleTokenizer, golden: Golden
) -> None:
    sides, labels, cfg, style = TRANSFORMER_CASES[case]
    schedule = ScaleSchedule(sides)
    steps = len(schedule)
    state = model.begin(labels + [model.config.null_class] * len(labels), schedule)
    inputs, pyramid = None, []
    for step, size in enumerate(schedule):
        conditional, unconditional = model.step(state, inputs).chunk(2)
        weight = 1 + cfg * step / min(steps - 1, 9) if style == "var" else cfg
        logits = model.head_logits(torch.lerp(unconditional, conditional, weight))
        if step == 0:
            assert_close(logits, golden[f"{case}.guided_logits_first"])
        pyramid.append(logits.argmax(dim=-1).unflatten(1, size))
        margin = golden[f"{case}.greedy_margin.{name_of(size)}"]
        assert_indices(pyramid[-1], golden[f"{case}.greedy_indices.{name_of(size)}"], margin)
        if step + 1 < steps:
            inputs = ops(model.backend).embed_resample(pyramid[-1], tokenizer.codebook, schedule[step + 1])
    assert_close(logits[:, -1], golden[f"{case}.guided_logits_last_row"])
    assert_close(
        next_scale_inputs(pyramid, tokenizer.codebook, schedule, backend=model.backend), golden[f"{case}.teacher_input"]
    )
    assert_close(tokenizer.decode(pyramid[-1]), golden[f"{case}.image"], 1e-3)
