"""Initial weights of the transformer, as VAR's (arXiv 2404.02905)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from flexvar.transformer.layers import Block
from flexvar.transformer.positions import sine_grid

if TYPE_CHECKING:
    from flexvar.transformer.model import FlexVARTransformer

_ADALN = 0.5  # factor on AdaLN's scales and shifts
_ADALN_GAMMA = 1e-5  # factor on AdaLN's gates: blocks start close to the identity
_HEAD = 0.02


@torch.no_grad()
def initialize(model: FlexVARTransformer) -> None:
    """Truncated normals of variance 1 / (3 width); residual outputs over sqrt(2 depth); AdaLN gates nearly closed."""
    width, depth = model.config.width, model.config.depth
    std = math.sqrt(1 / (3 * width))
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(model.pos_start, std=std)
    model.pos_1LC.copy_(sine_grid(width, model.config.position_grid))
    model.head.weight.mul_(_HEAD)
    _adaln_weight(model.head_nm.ada_lin).mul_(_ADALN)
    for block in model.modules():
        if isinstance(block, Block):
            block.attn.proj.weight.div_(math.sqrt(2 * depth))
            block.ffn.fc2.weight.div_(math.sqrt(2 * depth))
            adaln = block.ada_gss[0, 0] if block.shared_adaln else _adaln_weight(block.ada_lin).view(6, width, width)
            adaln[:2].mul_(_ADALN_GAMMA)
            adaln[2:].mul_(_ADALN)


def _adaln_weight(adaln: nn.Sequential) -> Tensor:
    return cast(nn.Linear, adaln[1]).weight
