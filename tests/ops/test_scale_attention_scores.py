"""scale_attention and its step: scores that are large, infinite or not a number, and their softmax's scale."""

import pytest
import torch
from torch.testing import assert_close

import flexvar_ext
from flexvar_ext import _host, reference
from tests.ops.attention_inputs import DTYPES, PAPER_LENGTHS, gradient_of, leaves, make_qkv
from tests.tolerances import ATOL, FORWARD_FACTOR, GRADIENT_FACTOR, assert_as_accurate_as_torch

INSTRUCTION_SETS = _host.build_info()["cpu_instruction_sets"].split()
INSTRUCTION_SETS = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_host.cpu_isa()) + 1]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 9.0, 30.0, 36.0, 44.0, 100.0, -100.0])
def test_sharp_q_scale(device, scale, dtype):
    """Across the limits of a fixed maximum, also for queries that meet no key but their opposite."""
    q, k, v = make_qkv(1, 150, 2, 32, dtype, device)
    q = q.clone()
    q[:, 70:] = -k[:, 3:4]
    k = k.clone()
    k[:, 40:] = k[:, 3:4]
    lengths, q_scale = [1, 39, 110], torch.full((2,), scale, device=device)
    native, same = (
        op.scale_attention(q, k, v, lengths, softmax_scale=1.0, q_scale=q_scale) for op in (flexvar_ext, reference)
    )
    exact = reference.scale_attention(
        q.double(), k.double(), v.double(), lengths, softmax_scale=1.0, q_scale=q_scale.double()
    )
    error, allowed = ((out.double() - exact).abs().max().item() for out in (native, same))
    # A logit of this size is rounded by as much more before its exponential is taken.
    assert error <= FORWARD_FACTOR * allowed + ATOL[dtype] * max(1, abs(scale) / 4)


@pytest.mark.parametrize("softmax_scale", [None, 0.031, 1.0, 0.0, -0.3])
def test_softmax_scale(device, softmax_scale):
    q, k, v = leaves(*make_qkv(1, 54, 2, 32, torch.float64, device))
    lengths = [4, 50]
    out = flexvar_ext.scale_attention(q, k, v, lengths, softmax_scale=softmax_scale)
    expected = reference.scale_attention(q, k, v, lengths, softmax_scale=softmax_scale)
    assert_close(out, expected)
    grad_out = torch.randn_like(out)
    for grad, expected_grad in zip(
        torch.autograd.grad(out, (q, k, v), grad_out), torch.autograd.grad(expected, (q, k, v), grad_out), strict=True
    ):
        assert_close(grad, expected_grad)


def test_large_logits(device):
    """The published models reach logits of 100: no overflow, and the sharp softmax is right."""
    q, k, v = make_qkv(1, 54, 2, 64, torch.float32, device)
    q, k = 100 * torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    out = flexvar_ext.scale_attention(q, k, v, [4, 50], softmax_scale=1.0)
    exact = reference.scale_attention(q.double(), k.double(), v.double(), [4, 50], softmax_scale=1.0)
    assert_as_accurate_as_torch(out, reference.scale_attention(q, k, v, [4, 50], softmax_scale=1.0), exact)
    huge = flexvar_ext.scale_attention(1e4 * q, k, v, [4, 50], softmax_scale=1.0)
    assert huge.isfinite().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("logit", [50.0, 1000.7, 30011.0])
def test_many_equal_keys_weigh_the_same(device, logit, dtype):
    """However many blocks of keys the sums go through, however large the logits: weights rounded to 16 bits may take
    the last digit."""
    keys = 4096
    q = torch.zeros(1, 3, 2, 32, device=device, dtype=dtype)
    q[..., 0] = logit**0.5
    k, v = q[:, :1].expand(1, keys, 2, 32).contiguous(), torch.zeros(1, keys, 2, 32, device=device, dtype=dtype)
    v[:, :64] = 1
    out = flexvar_ext.scale_attention_step(q, k, v, keys, softmax_scale=1.0)
    rtol = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6
    assert_close(out[..., 0].double(), torch.full((1, 3, 2), 64 / keys, device=device).double(), rtol=rtol, atol=0)


def test_long_rows_of_normalized_keys_are_as_accurate_as_torchs(device):
    q, k, v = make_qkv(1, 2233, 2, 64, torch.float32, device)
    q, k = 100 * torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    out = flexvar_ext.scale_attention(q, k, v, [2233], softmax_scale=1.0)
    exact = reference.scale_attention(q.double(), k.double(), v.double(), [2233], softmax_scale=1.0)
    same = reference.scale_attention(q, k, v, [2233], softmax_scale=1.0)
    assert (out - exact).abs().max() <= 2 * (same - exact).abs().max()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("logit", [0.01, 1.0, 4.0])
def test_weights_that_are_small_beside_the_largest_are_not_lost(monkeypatch, isa, logit):
    """Long sums of weights are as accurate as torch's, whether one key has most of the weight or all have the same."""
    monkeypatch.setenv("FLEXVAR_CPU_ISA", isa)
    q, k, v = make_qkv(1, 3000, 1, 64, torch.float32, torch.device("cpu"))
    q = q * logit
    out = flexvar_ext.scale_attention(q, k, v, [1000, 2000])
    exact = reference.scale_attention(q.double(), k.double(), v.double(), [1000, 2000])
    same = reference.scale_attention(q, k, v, [1000, 2000])
    assert (out - exact).norm() <= 1.5 * (same - exact).norm()
    assert (out - exact).abs().max() <= FORWARD_FACTOR * (same - exact).abs().max()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("scale", [1e2, 1e6, 1e20])
def test_no_weight_is_above_1_however_large_its_logit(scale, dtype):
    """The weight of a single key is 1; its logit's rounding may take some of it away."""
    q, k, v = leaves(*make_qkv(1, 1, 2, 32, dtype))
    grad_out = gradient_of(v, dtype)
    out = flexvar_ext.scale_attention(q, k, v, [1], softmax_scale=scale)
    (grad,) = torch.autograd.grad(out, v, grad_out)
    assert (grad.abs() <= grad_out.abs()).all()
    if scale < 1e3:
        assert_close(grad, grad_out, rtol=1e-4, atol=0)


@pytest.mark.parametrize("logit", [30.0, 100.0, 400.0])
def test_gradients_of_large_logits_are_as_accurate_as_torchs(device, logit):
    q, k, v = make_qkv(1, 680, 2, 64, torch.float32, device)
    q, k = logit * torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    grad_out = gradient_of(q, torch.float32)

    def gradients(op, dtype):
        inputs = leaves(q.to(dtype), k.to(dtype), v.to(dtype))
        out = op.scale_attention(*inputs, PAPER_LENGTHS, softmax_scale=1.0)
        return torch.autograd.grad(out, inputs, grad_out.to(dtype))

    exact = gradients(reference, torch.float64)
    native, same = gradients(flexvar_ext, torch.float32), gradients(reference, torch.float32)
    for ours, torchs, right in zip(native, same, exact, strict=True):
        assert (ours - right).norm() <= GRADIENT_FACTOR * (torchs - right).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_scores_whose_difference_is_not(device, dtype):
    q, k = torch.zeros(1, 1, 1, 32, device=device), torch.zeros(1, 2, 1, 32, device=device)
    q[..., 0] = 1.7e19
    k[0, :, 0, 0] = torch.tensor([1.7e19, -1.7e19])
    v = torch.tensor([1.0, 3.0], device=device).view(1, 2, 1, 1).expand(1, 2, 1, 32)
    q, k, v = (tensor.to(dtype).contiguous() for tensor in (q, k, v))
    for scale in (0.0, 5e-39):
        out = flexvar_ext.scale_attention_step(q, k, v, 2, softmax_scale=scale)
        expected = reference.scale_attention_step(q.double(), k.double(), v.double(), 2, softmax_scale=scale)
        assert_close(out.double(), expected, rtol=0.01, atol=0)


def test_not_a_number_stays_in_its_rows(device):
    q, k, v = make_qkv(1, 54, 1, 32, torch.float32, device)
    q = q.clone()
    q[0, 20] = float("nan")
    out = flexvar_ext.scale_attention(q, k, v, [4, 50])
    assert out[0, 20].isnan().all()
    assert not out[0, torch.arange(54) != 20].isnan().any()


def test_infinitely_low_scores_have_no_weight(device):
    q, k, v = make_qkv(1, 130, 1, 32, torch.float32, device)
    q, k = q.abs() + 0.1, k.clone()
    k[0, :100] = -float("inf")
    out = flexvar_ext.scale_attention(q, k, v, [130])
    # On CUDA torch's own attention makes NaN of such scores.
    assert_close(out.cpu(), reference.scale_attention(q.cpu(), k.cpu(), v.cpu(), [130]))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_query_without_a_score_is_not_a_number(device, dtype):
    q, k, v = make_qkv(1, 14, 2, 32, dtype, device)
    q, k = q.abs() + 0.1, k.clone()
    k[0, :5] = -float("inf")  # all that the first scales see, and part of what the last one does
    out = flexvar_ext.scale_attention(q, k, v, [1, 4, 9])
    assert out[:, :5].isnan().all()
    assert out[:, 5:].isfinite().all()
    assert flexvar_ext.scale_attention_step(q[:, 5:], k, v, 5).isnan().all()
