"""Upsampling by two: one transposed convolution without gradients, nearest neighbour and a convolution with them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from flexvar.tokenizer.upsampling import Upsample, fold_nearest
from torch import Tensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(x: Tensor, conv: torch.nn.Conv2d) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), conv.weight, conv.bias, padding=1)


@pytest.fixture
def upsample(monkeypatch: pytest.MonkeyPatch) -> Upsample:
    """On a CPU without AVX2, where the convolution is torch's."""
    monkeypatch.setenv("FLEXVAR_CPU_ISA", "baseline")
    module = Upsample(6, backend="native")
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed))
    return module


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 3), (7, 8)])
def test_folding_is_exact(size: tuple[int, int]) -> None:
    x, weight = randn(2, 5, *size).double(), randn(4, 5, 3, 3, seed=1).double()
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    folded = F.conv_transpose2d(x, fold_nearest(weight), stride=2, padding=1)
    torch.testing.assert_close(folded, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_without_gradients(upsample: Upsample, context: type, memory_format: torch.memory_format) -> None:
    upsample.to(memory_format=memory_format)
    x = randn(2, 6, 5, 4).to(memory_format=memory_format)
    with context():
        out = upsample(x)
        torch.testing.assert_close(out, plain(x, upsample.conv), rtol=1e-5, atol=1e-5)
        assert out.is_contiguous(memory_format=memory_format)
        assert upsample(x[:0]).shape == (0, 6, 10, 8)


def test_with_gradients_nothing_is_folded(upsample: Upsample) -> None:
    x = randn(1, 6, 3, 3).requires_grad_()
    out = upsample(x)
    assert torch.equal(out, plain(x, upsample.conv))
    out.sum().backward()
    assert upsample.conv.weight.grad is not None


@torch.no_grad()
def test_the_kernel_is_made_once_and_follows_the_weight(upsample: Upsample, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("flexvar.tokenizer.upsampling.fold_nearest", lambda w: made.append(1) or fold_nearest(w))
    x = randn(1, 6, 3, 3)

    def check(times_made: int) -> None:
        for _ in range(2):
            torch.testing.assert_close(upsample(x), plain(x, upsample.conv), rtol=1e-5, atol=1e-5)
        assert len(made) == times_made

    check(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not leave a rounded kernel behind
        upsample(x)
    check(1)
    upsample.conv.weight.mul_(2)
    check(2)
    upsample.load_state_dict({name: value + 1 for name, value in upsample.state_dict().items()})
    check(3)
    optimizer = torch.optim.SGD(upsample.parameters(), lr=0.1)
    with torch.enable_grad():
        upsample(x).square().sum().backward()
    optimizer.step()
    check(4)
    upsample.double()
    x = x.double()
    check(5)


def test_copies_have_their_own(upsample: Upsample) -> None:
    x = randn(1, 6, 3, 3)
    with torch.inference_mode():
        before = upsample(x)
    clone = copy.deepcopy(upsample)
    assert list(clone.state_dict()) == ["conv.weight", "conv.bias"]
    with torch.no_grad():
        clone.conv.weight.zero_()
        assert torch.equal(upsample(x), before)
        torch.testing.assert_close(clone(x), plain(x, clone.conv))
