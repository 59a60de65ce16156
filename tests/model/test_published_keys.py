"""Names and shapes of the parameters are those of the published checkpoints."""

from __future__ import annotations

import pytest
import torch
from flexvar import (
    FlexVARTransformer,
    MultiScaleTokenizer,
    TokenizerConfig,
    TransformerConfig,
    load_published_state_dict,
)

Keys = dict[str, dict[str, list[int]]]


def meta(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("depth", [16, 20, 24])
def test_flexvar(depth: int, published_shapes: Keys) -> None:
    with torch.device("meta"):
        model = FlexVARTransformer(TransformerConfig(depth=depth, width=64 * depth, heads=depth))
    state_dict = meta(published_shapes[f"FlexVARd{depth}"])
    load_published_state_dict(model, state_dict)
    load_published_state_dict(model, {"trainer": {"var_wo_ddp": state_dict}})


def test_flexvae(published_shapes: Keys) -> None:
    with torch.device("meta"):
        tokenizer = MultiScaleTokenizer(TokenizerConfig())
    load_published_state_dict(tokenizer, {"model": meta(published_shapes["FlexVAE.pth"])})


def test_llamagen(published_shapes: Keys) -> None:
    with torch.device("meta"):
        tokenizer = MultiScaleTokenizer(TokenizerConfig(codebook_size=16384, codebook_dim=8))
    load_published_state_dict(tokenizer, {"model": meta(published_shapes["LlamaGen"])})
