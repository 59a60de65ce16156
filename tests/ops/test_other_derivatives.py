"""Gradients of gradients, and forward-mode derivatives: what an op does not have is an error, not 0."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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


@pytest.mark.parametrize("name", [*OPS, "resample2d"])
def test_a_forward_mode_derivative_is_refused(name: str) -> None:
    ops = {**OPS, "resample2d": lambda x: flexvar_ext.resample2d(x.view(1, 8, 3, 2), (4, 4), mode="area")}
    x = randn(48).detach()
    with pytest.raises(NotImplementedError, match=f"^{name}: derivatives must be of reverse mode, got one of forward"):
        torch.func.jvp(ops[name], (x,), (x,))


@pytest.mark.parametrize("name", [*OPS, "resample2d"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_keeps_gradients(name: str) -> None:
    """Within it tensors do not tell that they need one, so a call must not skip autograd."""
    ops = {**OPS, "resample2d": lambda x: flexvar_ext.resample2d(x.view(1, 8, 3, 2), (4, 4), mode="area")}
    x = randn(2, 48)
    (together,) = torch.autograd.grad(torch.func.vmap(ops[name])(x).square().sum(), x)
    (apart,) = torch.autograd.grad(torch.stack([ops[name](row) for row in x]).square().sum(), x)
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("name", [*OPS, "resample2d"])
def test_what_needs_no_gradient_is_the_same(name: str) -> None:
    ops = {**OPS, "resample2d": lambda x: flexvar_ext.resample2d(x.view(1, 8, 3, 2), (4, 4), mode="area")}
    x = randn(48)
    out = ops[name](x)
    assert out.requires_grad
    with torch.no_grad():
        alone = ops[name](x)
    with torch.inference_mode():
        inferred = ops[name](x)
    assert not alone.requires_grad
    assert not alone.is_inference()
    assert inferred.is_inference()
    assert torch.equal(alone, out)
    assert torch.equal(inferred, out)
    assert not ops[name](x.detach()).requires_grad


def test_a_generation_step_refuses_a_forward_mode_derivative() -> None:
    k_cache, v_cache = torch.zeros(2, 1, 4, 2, 32)
    for function, shape in (
        (lambda qkv: flexvar_ext.append_qkv(qkv, k_cache, v_cache, 0), (1, 4, 3, 2, 32)),
        (lambda q: flexvar_ext.scale_attention_step(q, k_cache, v_cache, 4), (1, 4, 2, 32)),
    ):
        x = randn(*shape).detach()
        with pytest.raises(NotImplementedError, match="derivatives must be of reverse mode"):
            torch.func.jvp(function, (x,), (x,))


def test_linear_and_conv3x3_have_forward_mode_derivatives() -> None:
    x, weight = randn(5, 8).detach(), randn(3, 8).detach()
    out, tangent = torch.func.jvp(lambda w: flexvar_ext.linear(x, w), (weight,), (weight,))
    torch.testing.assert_close(tangent, out)  # it is linear
    x, weight = randn(1, 4, 5, 6).detach(), randn(3, 4, 3, 3).detach()
    for resize in ("none", "up", "down"):
        convolve = partial(flexvar_ext.conv3x3, weight=weight, resize=resize)
        out, tangent = torch.func.jvp(convolve, (x,), (x,))
        torch.testing.assert_close(tangent, out)
