"""The CUDA kernels of scale_attention, their own source on the CPU, against the reference in float64."""

import numpy as np
import pytest
import torch

from flexvar_ext import reference
from tests.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, assert_as_accurate_as_torch

VARIANTS = [
    (torch.float32, 32),
    (torch.float32, 64),
    (torch.float32, 128),
    (torch.float64, 64),
    (torch.float16, 64),
    (torch.float16, 96),
    (torch.bfloat16, 32),
    (torch.bfloat16, 64),
    (torch.bfloat16, 128),
]


def to_numpy(tensor):
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def to_torch(array, dtype):
    return (
        torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if dtype == torch.bfloat16 else torch.tensor(array)
    )


def random(shape, dtype, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kernel(emulated, name, dtype, dim):
    function = getattr(emulated, f"{name}_{str(dtype).removeprefix('torch.')}_{dim}")
    return lambda *arguments: tuple(function(*arguments))


def check_passes(emulated, run, batch, heads, lengths, scale, q_scale, dtype, dim):
    tokens = sum(lengths)
    qkv = random((batch, tokens, 3, heads, dim), dtype)
    grad_out = random((batch, tokens, 1, heads, dim), dtype, seed=1)

    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    if q_scale is not None:
        qkv[:, 0, :2] = 0  # what has no direction
        q_scale = np.array(q_scale, dtype=str(arithmetic).removeprefix("torch."))

    def expected(compute_dtype):
        inputs = [part.to(compute_dtype).requires_grad_() for part in qkv.unbind(2)]
        if q_scale is not None:
            inputs.append(torch.tensor(q_scale).requires_grad_())
        out = reference.scale_attention(
            *inputs[:3], lengths, softmax_scale=scale, q_scale=None if q_scale is None else inputs[3]
        )
        return out.detach(), *torch.autograd.grad(out, inputs, grad_out[:, :, 0].to(compute_dtype))

    out, logsumexp, *inverse_lengths = run(
        kernel(emulated, "scale_attention", dtype, dim), to_numpy(qkv), lengths, scale, q_scale
    )
    grads = run(
        kernel(emulated, "scale_attention_backward", dtype, dim),
        to_numpy(grad_out),
        to_numpy(qkv),
        out[:, :, None],
        logsumexp,
        lengths,
        scale,
        q_scale,
        inverse_lengths,
    )
    results = [to_torch(array, dtype if array.ndim == 4 else arithmetic) for array in (out, *grads)]
    for i, (result, same, exact) in enumerate(zip(results, expected(dtype), expected(torch.float64), strict=True)):
        if i == 4:  # the gradient of q_scale, in float32 from 16-bit tensors
            torch.testing.assert_close(result, exact.to(arithmetic), atol=0.02, rtol=0.02)
            continue
        if q_scale is not None:  # what has no direction has gradients beyond float16
            result, same, exact = (tensor[:, 1:] for tensor in (result, same, exact))
        assert_as_accurate_as_torch(result, same, exact, factor=GRADIENT_FACTOR if i else FORWARD_FACTOR)


CASES = [
    (1, 1, [1], 1.0, None),
    (1, 2, [3, 68], 0.2, None),
    (2, 1, [20], -0.1, None),
    (2, 1, [1, 4], 1.0, [4.0]),
    (1, 2, [3, 68], -0.7, [9.0, -60.0]),
    (2, 1, [1, 6, 17, 1, 33], 0.3, None),
    (1, 1, [1, 4, 16, 70, 1, 66], 0.2, [5.0]),
]


def cases_of(dtype, dim):
    # The exact gradient of a lone token's query is 0, and torch's is: what is left is the rounding of sums as long as
    # the rows, times the scale. At scale 1 it is above the absolute tolerance for the longest rows in float32.
    is_beyond = dtype == torch.float32 and dim == 128
    return [(1, 1, [1], 0.5, None) if is_beyond and case[2] == [1] else case for case in CASES]


@pytest.mark.parametrize(
    ("dtype", "dim", "batch", "heads", "lengths", "scale", "q_scale"),
    [(*variant, *case) for variant in VARIANTS for case in cases_of(*variant)],
)
def test_forward_and_backward(emulated, run_in_every_order, batch, heads, lengths, scale, q_scale, dtype, dim):
    check_passes(emulated, run_in_every_order, batch, heads, lengths, scale, q_scale, dtype, dim)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 32), (torch.bfloat16, 32)])
def test_more_tiles_than_a_launch_takes(emulated, dtype, dim):
    def run(kernel, *arguments):
        return kernel(*arguments, emulated.Options())

    check_passes(emulated, run, 1, 1, [1] * 257, 0.2, None, dtype, dim)


@pytest.mark.parametrize(("dtype", "dim"), VARIANTS)
@pytest.mark.parametrize(("queries", "kv_length"), [(1, 1), (5, 67)])
def test_step(emulated, run_in_every_order, queries, kv_length, dtype, dim):
    q, cache = random((1, queries, 1, 2, dim), dtype), random((1, 70, 2, 2, dim), dtype, seed=1)
    cache[:, kv_length:] = float("nan")
    (out,) = run_in_every_order(
        kernel(emulated, "scale_attention_step", dtype, dim),
        to_numpy(q),
        to_numpy(cache),
        kv_length,
        dim**-0.5,
        None,
        None,
    )
    same, exact = (
        reference.scale_attention_step(*(t.to(wide) for t in (q[:, :, 0], cache[:, :, 0], cache[:, :, 1])), kv_length)
        for wide in (dtype, torch.float64)
    )
    assert_as_accurate_as_torch(to_torch(out, dtype), same, exact)


@pytest.mark.parametrize(("dtype", "dim"), VARIANTS)
def test_fixed_maximum(emulated, run_in_every_order, dtype, dim):
    """A head whose bound allows it takes that for its maximum, also where every logit is the lowest; others do not."""
    limit = {torch.float16: 10.0, torch.float64: 345.0}.get(dtype, 35.0)
    direction = torch.nn.functional.normalize(random((dim,), torch.float64), dim=0)
    q, cache = torch.empty(1, 3, 1, 2, dim, dtype=dtype), random((1, 70, 2, 2, dim), dtype, seed=1)
    q[:, :2], q[:, 2] = direction * limit, -direction * limit
    cache[:, :, 0] = -direction
    cache[:, 30:50, 0] *= 0.99

    def step(bounds):
        bounds = np.array(bounds, dtype="float64" if dtype == torch.float64 else "float32")
        run = kernel(emulated, "scale_attention_step", dtype, dim)
        (out,) = run_in_every_order(run, to_numpy(q), to_numpy(cache), 70, 1.0, bounds, None)
        return to_torch(out, dtype)

    out, searched = step([limit, limit + 1]), step([np.inf, np.inf])
    assert torch.equal(out[:, :, 1], searched[:, :, 1])
    assert not torch.equal(out[:, :, 0], searched[:, :, 0])
    same, exact = (
        reference.scale_attention_step(
            *(t.to(wide) for t in (q[:, :, 0], cache[:, :, 0], cache[:, :, 1])), 70, softmax_scale=1.0
        )
        for wide in (dtype, torch.float64)
    )
    assert_as_accurate_as_torch(out, same, exact)


@pytest.mark.parametrize(("dtype", "dim"), VARIANTS)
@pytest.mark.parametrize("bound", [None, 1.0])
def test_step_in_parts(emulated, run_in_every_order, bound, dtype, dim):
    """Parts of the keys, the last one short, each with its maximum or all with one; a part without weight has none."""
    queries, kv_length, part = 3, 150, 64
    q, cache = random((2, queries, 1, 2, dim), dtype), random((2, 160, 2, 2, dim), dtype, seed=1)
    if bound is None:
        q[:, :, :, 0] = q[:, :, :, 0].abs() + 1
        cache[0, :part, 0, 0] = -float("inf")
        bounds = None
    else:
        q, cache[:, :, 0] = (torch.nn.functional.normalize(t.double(), dim=-1).to(dtype) for t in (q, cache[:, :, 0]))
        bounds = np.full(2, 1.01 * bound, dtype="float64" if dtype == torch.float64 else "float32")
    cache[:, kv_length:] = float("nan")
    run = kernel(emulated, "scale_attention_step", dtype, dim)
    (out,) = run_in_every_order(run, to_numpy(q), to_numpy(cache), kv_length, bound or 0.1, bounds, part)
    same, exact = (
        reference.scale_attention_step(
            *(t.to(wide) for t in (q[:, :, 0], cache[:, :, 0], cache[:, :, 1])), kv_length, softmax_scale=bound or 0.1
        )
        for wide in (dtype, torch.float64)
    )
    assert_as_accurate_as_torch(to_torch(out, dtype), same, exact)
