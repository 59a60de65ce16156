"""Guidance: the published formulas, and that mixing before the head is mixing after it."""

from __future__ import annotations

import pytest
import torch
from flexvar import ScaleSchedule
from flexvar.generation.guidance import GuidanceStyle, guidance_weights, is_greedy_in_published_code, mix_guidance
from torch import nn


def test_var_style_ramps_up_over_ten_steps() -> None:
    weights = guidance_weights(ScaleSchedule.preset(10), 2.5, "var")
    assert weights == pytest.approx([2.5 * step / 9 for step in range(10)])


def test_var_style_goes_past_the_scale_with_more_steps_and_is_the_scale_at_large_sides() -> None:
    assert guidance_weights(ScaleSchedule.preset(13), 3.0, "var")[-1] == pytest.approx(3.0 * 12 / 9)
    weights = guidance_weights(ScaleSchedule.preset(12, 512), 3.0, "var")
    assert weights[-2:] == [3.0, 3.0]  # sides 23 and 32
    assert guidance_weights(ScaleSchedule([1, (2, 17), (4, 16)]), 3.0, "var") == [0.0, 3.0, 3.0]
    assert guidance_weights(ScaleSchedule([1, 2, 4]), 3.0, "var") == [0.0, 1.5, 3.0]
    assert guidance_weights(ScaleSchedule([16]), 3.0, "var") == [0.0]


def test_llamagen_style_and_off() -> None:
    schedule = ScaleSchedule([1, 2])
    assert guidance_weights(schedule, 4.0, "llamagen") == [3.0, 3.0]
    assert guidance_weights(schedule, 1.0, "llamagen") == [0.0, 0.0]
    assert guidance_weights(schedule, 7.0, "off") == [0.0, 0.0]
    assert guidance_weights(schedule, 0.0, "var") == [0.0, 0.0]


@pytest.mark.parametrize("weight", [0.0, 0.28, 1.0, 2.5, -1.0, 7.5])
def test_mixing_hidden_states_is_mixing_logits(weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(32, 100)
    hidden = torch.randn(6, 5, 32, generator=generator)
    with torch.no_grad():
        mixed_before = head(mix_guidance(hidden, weight))
        conditional, unconditional = head(hidden).chunk(2)
    torch.testing.assert_close(mixed_before, (1 + weight) * conditional - weight * unconditional, rtol=1e-5, atol=1e-5)
    if weight == 0:
        assert torch.equal(mix_guidance(hidden, weight), hidden[:3])


def test_llamagen_weight_is_its_formula() -> None:
    conditional, unconditional = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)).chunk(2)
    (weight,) = guidance_weights(ScaleSchedule([1]), 4.0, "llamagen")
    mixed = mix_guidance(torch.cat((conditional, unconditional)), weight)
    torch.testing.assert_close(mixed, unconditional + 4.0 * (conditional - unconditional))


@pytest.mark.parametrize("style", ["var", "llamagen"])
@pytest.mark.parametrize("scale", [1e30, -1e30])
def test_the_largest_scale_stays_finite(style: GuidanceStyle, scale: float) -> None:
    weights = guidance_weights(ScaleSchedule([1] * 4096), scale, style)
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))
    assert mix_guidance(hidden * 1e3, max(weights, key=abs)).isfinite().all()


def test_greedy_sides_of_the_published_code() -> None:
    sampled = [side for side in range(1, 40) if not is_greedy_in_published_code((side, side))]
    assert sampled == [1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 24, 32]
    assert is_greedy_in_published_code((4, 7))
    assert not is_greedy_in_published_code((4, 8))
