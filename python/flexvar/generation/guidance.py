"""Classifier-free guidance: how strongly each step is pushed away from what the model draws without a class.

Every style is one number t a step: guided = (1 + t) * conditional - t * unconditional. The head is linear, so mixing
the hidden states before it equals mixing the logits after it, for half the head's work.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from flexvar.schedule import ScaleSchedule, Size

GuidanceStyle = Literal["var", "llamagen", "off"]
GUIDANCE_STYLES: tuple[str, ...] = get_args(GuidanceStyle)

# Float32 holds the weights that the longest schedule makes of it, and their products with hidden states.
_LARGEST_SCALE = 1e30

_VAR_RAMP_STEPS = 9
_VAR_RAMP_SIDE = 16

#: Sides the released code samples at; at every other side it takes the most likely code, without saying so.
PUBLISHED_SAMPLED_SIDES = frozenset({1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 24, 32})


def check_guidance(scale: float, style: str) -> None:
    """Raises TypeError when ``scale`` is not a number, ValueError when it is beyond 1e30 or the style is unknown."""
    if style not in GUIDANCE_STYLES:
        raise ValueError(f"generate: guidance_style must be one of {', '.join(GUIDANCE_STYLES)}, got {style!r:.100}")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"generate: guidance_scale must be a number, got {scale!r:.100}")
    if not abs(scale) <= _LARGEST_SCALE:  # NaN, too, is not
        raise ValueError(
            f"generate: guidance_scale must be from {-_LARGEST_SCALE:g} to {_LARGEST_SCALE:g}, got {scale!s:.100}"
        )


def guidance_weights(schedule: ScaleSchedule, scale: float, style: GuidanceStyle) -> list[float]:
    """The t of every step, in guided = (1 + t) * conditional - t * unconditional.

    - ``"var"`` (the released FlexVAR code): t = scale * i / min(n - 1, 9) at step i of n while both sides are at most
      16 tokens, t = scale beyond. Step 0 is unguided, so the only step of a one-step schedule is; with more than ten
      steps t goes past ``scale``, as published. A scale of 0 is off.
    - ``"llamagen"``: unconditional + scale * (conditional - unconditional), so t = scale - 1 throughout. 1 is off.
    - ``"off"``: t = 0, whatever the scale.

    Raises as :func:`check_guidance`.
    """
    check_guidance(scale, style)
    if style == "off":
        return [0.0] * len(schedule)
    if style == "llamagen":
        return [float(scale) - 1.0] * len(schedule)
    return [_var_weight(step, size, len(schedule), float(scale)) for step, size in enumerate(schedule)]


def _var_weight(step: int, size: Size, num_steps: int, scale: float) -> float:
    if max(size) > _VAR_RAMP_SIDE:
        return scale
    return scale * step / max(1, min(num_steps - 1, _VAR_RAMP_STEPS))


def mix_guidance(hidden: Tensor, weight: float) -> Tensor:
    """[2B, l, C], the conditional half first -> [B, l, C] = (1 + weight) * conditional - weight * unconditional."""
    conditional, unconditional = hidden.chunk(2)
    return torch.lerp(unconditional, conditional, 1 + weight)


def is_greedy_in_published_code(size: Size) -> bool:
    """Whether the released code takes the most likely code at this step rather than sampling."""
    return not PUBLISHED_SAMPLED_SIDES.issuperset(size)
