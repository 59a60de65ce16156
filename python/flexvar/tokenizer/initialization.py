"""Initial weights of the tokenizer's convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from flexvar.tokenizer.autoencoder import AttentionBlock, ResidualBlock

if TYPE_CHECKING:
    from flexvar.tokenizer.model import MultiScaleTokenizer


@torch.no_grad()
def initialize(tokenizer: MultiScaleTokenizer) -> None:
    """Xavier-uniform weights, no biases, and residual branches that start at zero.

    torch's default weights have a third of this variance: colours then fade from layer to layer, and take thousands of
    steps to come back.
    """
    for module in tokenizer.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in tokenizer.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, AttentionBlock):
            nn.init.zeros_(module.proj_out.weight)
