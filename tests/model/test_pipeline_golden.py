"""The pipeline's loop against images that the released code drew greedily (tests/golden/README.md)."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from flexvar import FlexVARPipeline, FlexVARTransformer, MultiScaleTokenizer
from torch import Tensor


@pytest.mark.parametrize(
    ("case", "sides", "labels", "settings"),
    [
        ("var2", [1, 2, 3, 5], [3, 7], {"guidance_scale": 2.5, "guidance_style": "var"}),
        ("var2steps12", range(1, 13), [0], {"guidance_scale": 1.5, "guidance_style": "var"}),
        ("var2lg", [1, 2, 4, 6], [9, 1], {"guidance_scale": 4.0, "guidance_style": "llamagen"}),
    ],
)
def test_greedy_generation(
    case: str,
    sides: list[int],
    labels: list[int],
    settings: dict[str, Any],
    tokenizer: MultiScaleTokenizer,
    model: FlexVARTransformer,
    golden: dict[str, Tensor],
    device: torch.device,
) -> None:
    pipe = FlexVARPipeline(deepcopy(tokenizer), deepcopy(model)).to(device)
    out = pipe(labels, schedule=sides, top_k=1, output_type="pt", **settings)
    for side, indices in zip(sides, out.pyramid, strict=True):
        margin = golden[f"{case}.greedy_margin.{side}x{side}"].view_as(indices)
        assert (indices.cpu() == golden[f"{case}.greedy_indices.{side}x{side}"].view_as(indices))[margin > 1e-4].all()
    torch.testing.assert_close(out.images.cpu(), golden[f"{case}.image"], rtol=1e-3, atol=1e-3)
