"""Gradients of gradients: those of an op that is differentiable once are an error, not 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flexvar_ext


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


VECTOR, CODES = torch.ones(8), torch.arange(4).view(1, 2, 2)
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "embed_resample": lambda x: flexvar_ext.embed_resample(CODES, x.view(6, 8), (3, 3)),
    "group_norm_silu": lambda x: flexvar_ext.group_norm_silu(x.view(1, 8, 3, 2), 2, VECTOR, VECTOR),
    "layer_norm_modulate": lambda x: flexvar_ext.layer_norm_modulate(x.view(1, 6, 8), *[VECTOR.view(1, 1, 8)] * 2),
    "residual_layer_norm_modulate": lambda x: flexvar_ext.residual_layer_norm_modulate(
        *[x.view(1, 6, 8)] * 2, *[VECTOR.view(1, 1, 8)] * 3
    )[1],
    "scale_attention": lambda x: flexvar_ext.scale_attention(*[x.view(1, 6, 8).repeat(1, 1, 4).unsqueeze(2)] * 3, [6]),
}


@pytest.mark.parametrize("name", OPS)
def test_a_second_gradient_is_refused(name: str) -> None:
    x = randn(48)
    (gradient,) = torch.autograd.grad(OPS[name](x).square().sum(), x, create_graph=True)
    (alone,) = torch.autograd.grad(OPS[name](x).square().sum(), x)
    assert torch.equal(gradient, alone)
    with pytest.raises(NotImplementedError, match="gradients must be of first order, got the gradient of a gradient"):
        gradient.square().sum().backward()
