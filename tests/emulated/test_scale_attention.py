"""The CUDA launchers of scale_attention, run on the CPU, against the reference in float64."""

from functools import partial

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


def random(shape, dtype, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_passes(launch, batch, heads, lengths, scale, q_scale, dtype, dim):
    tokens = sum(lengths)
    qkv = random((batch, tokens, 3, heads, dim), dtype)
    grad_out = random((batch, tokens, heads, dim), dtype, seed=1)

    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    if q_scale is not None:
        qkv[:, 0, :2] = 0  # what has no direction
        q_scale = torch.tensor(q_scale, dtype=arithmetic)

    def expected(compute_dtype):
        inputs = [part.to(compute_dtype).requires_grad_() for part in qkv.unbind(2)]
        if q_scale is not None:
            inputs.append(q_scale.clone().requires_grad_())
        out = reference.scale_attention(
            *inputs[:3], lengths, softmax_scale=scale, q_scale=None if q_scale is None else inputs[3]
        )
        return out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(compute_dtype))

    forward, backward = "scale_attention", "scale_attention_backward"
    out, logsumexp, inverse_lengths = launch(forward, *qkv.unbind(2), lengths, scale, q_scale)
    saved = (*qkv.unbind(2), out, logsumexp, lengths, scale, q_scale, inverse_lengths)
    results = [out, *launch(backward, grad_out, *saved)]
    if q_scale is None:
        assert results.pop().numel() == 0
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
    # the rows, times the scale. At scale 1 it is above the absolute tolerance for the longer rows in float32.
    is_beyond = dtype == torch.float32 and dim >= 64
    return [(1, 1, [1], 0.5, None) if is_beyond and case[2] == [1] else case for case in CASES]


@pytest.mark.parametrize(
    ("dtype", "dim", "batch", "heads", "lengths", "scale", "q_scale"),
    [(*variant, *case) for variant in VARIANTS for case in cases_of(*variant)],
)
def test_forward_and_backward(launch_in_every_order, batch, heads, lengths, scale, q_scale, dtype, dim):
    check_passes(launch_in_every_order, batch, heads, lengths, scale, q_scale, dtype, dim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_tiles_of_warpgroups_multiplied_by_warps(launch_once, dtype, case):
    """What sm_90a's products read is what other architectures' do."""
    check_passes(partial(launch_once, warpgroups=False), *case, dtype, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("q_scale", [None, [5.0]])
def test_columns_take_turns(launch_once, q_scale, dtype):
    """Seven tiles of columns, in three places of shared memory, whose barriers are in their third phase."""
    check_passes(launch_once, 1, 1, [3, 20, 100, 170, 120], 0.2, q_scale, dtype, 64)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 32), (torch.bfloat16, 32)])
def test_more_tiles_than_a_launch_takes(launch_once, dtype, dim):
    check_passes(launch_once, 1, 1, [1] * 257, 0.2, None, dtype, dim)


def test_more_tiles_of_a_step_than_a_launch_takes(launch_once):
    q, cache = random((1, 128 * 64 + 1, 1, 32), torch.bfloat16), random((1, 3, 2, 1, 32), torch.bfloat16, seed=1)
    check_step(launch_once, q, cache, 3, 0.2)


HALF_VARIANTS = [variant for variant in VARIANTS if variant[0].itemsize == 2]
# Whole scales in one tile of queries: that share a tile of keys, that do not, and that end with one.
SHARED_TILES = [[1, 4, 9, 16, 25], [70, 20, 30, 10], [70, 20, 38, 5, 64]]


@pytest.mark.parametrize(("dtype", "dim"), HALF_VARIANTS)
@pytest.mark.parametrize("lengths", SHARED_TILES)
@pytest.mark.parametrize(("scale", "q_scale"), [(0.3, None), (-0.3, None), (1.0, [-4.0]), (1.0, [60.0])])
def test_scales_that_share_a_tile(launch_in_every_order, lengths, scale, q_scale, dtype, dim):
    qkv = random((1, sum(lengths), 3, 1, dim), dtype)
    q_scale = None if q_scale is None else torch.tensor(q_scale)
    out = launch_in_every_order("scale_attention", *qkv.unbind(2), lengths, scale, q_scale)[0]
    same, exact = (
        reference.scale_attention(*qkv.to(wide).unbind(2), lengths, softmax_scale=scale, q_scale=q_scale)
        for wide in (dtype, torch.float64)
    )
    assert_as_accurate_as_torch(out, same, exact)


@pytest.mark.parametrize(("dtype", "dim"), HALF_VARIANTS)
@pytest.mark.parametrize("lengths", SHARED_TILES)
@pytest.mark.parametrize("part", [1, 2])
@pytest.mark.parametrize("q_scale", [None, [4.0]])
def test_what_is_not_finite_stays_where_it_is_seen(launch_in_every_order, lengths, part, q_scale, dtype, dim):
    """Queries that share a tile with those that see a NaN, or values that are infinite, are as without it."""
    qkv = random((1, sum(lengths), 3, 1, dim), dtype)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for end, bad in zip(ends[1:], ["nan", "inf", "-inf", "nan"], strict=False):
        qkv[:, end - 1, part, :, end % 7] = float(bad if part == 2 else "nan")
    scales = None if q_scale is None else torch.tensor(q_scale)
    out, logsumexp, _ = launch_in_every_order("scale_attention", *qkv.unbind(2), lengths, 0.3, scales)

    q, k, v = qkv.double()[0, :, :, 0].unbind(1)
    if q_scale is not None:
        q, k = q_scale[0] * torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    for length, end in zip(lengths, ends, strict=True):
        seen = slice(end - length, end)
        logits = 0.3 * q[seen] @ k[:end].T
        exact = logits.softmax(-1) @ v[:end]
        torch.testing.assert_close(out[0, seen, 0].double(), exact, atol=0.02, rtol=0.02, equal_nan=True)
        expected = logits.logsumexp(-1)
        torch.testing.assert_close(logsumexp[0, 0, seen].double(), expected, atol=0.01, rtol=0.01, equal_nan=True)


@pytest.mark.parametrize(("dtype", "dim"), HALF_VARIANTS)
@pytest.mark.parametrize("lengths", SHARED_TILES)
@pytest.mark.parametrize(("part", "scale"), [("q", 1), ("k", 2), ("v", 2), ("grad_out", 1)])
@pytest.mark.parametrize("q_scale", [None, [4.0]])
def test_gradients_of_what_does_not_see_a_nan(launch_once, lengths, part, scale, q_scale, dtype, dim):
    """Keys and queries that share a tile with those that see it, in a token of that scale, are as without it."""
    tensors = {name: random((1, sum(lengths), 1, dim), dtype, seed) for seed, name in enumerate("qkv")}
    tensors["grad_out"] = random((1, sum(lengths), 1, dim), dtype, seed=3)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    tensors[part][:, ends[scale] - 1, :, 5] = float("nan")
    q, k, v, grad_out = tensors.values()
    scales = None if q_scale is None else torch.tensor(q_scale)
    out, logsumexp, inverse_lengths = launch_once("scale_attention", q, k, v, lengths, 0.3, scales)
    saved = (q, k, v, out, logsumexp, lengths, 0.3, scales, inverse_lengths)
    grads = launch_once("scale_attention_backward", grad_out, *saved)[:3]

    exact = torch.zeros(3, sum(lengths), dim, dtype=torch.float64)
    for length, end in zip(lengths, ends, strict=True):
        own, seen = slice(end - length, end), slice(end)
        inputs = [t.double()[0, rows, 0].requires_grad_() for t, rows in ((q, own), (k, seen), (v, seen))]
        left, right = inputs[:2]
        if q_scale is not None:
            left, right = (torch.nn.functional.normalize(t, dim=-1) for t in inputs[:2])
            left = q_scale[0] * left
        result = (0.3 * left @ right.T).softmax(-1) @ inputs[2]
        parts = torch.autograd.grad(result, inputs, grad_out.double()[0, own, 0])
        for sums, rows, grad in zip(exact, (own, seen, seen), parts, strict=True):
            sums[rows] += grad
    assert exact.isnan().any()
    assert exact[0 if scale == 2 else 2].isfinite().any()
    for grad, expected in zip(grads, exact, strict=True):
        torch.testing.assert_close(grad[0, :, 0].double(), expected, atol=0.05, rtol=0.02, equal_nan=True)


def check_step(launch, q, cache, kv_length, scale, bound=None, **options):
    """``cache``: keys and values [B, L, 2, H, D]."""
    (out,) = launch("scale_attention_step", q, *cache.unbind(2), kv_length, scale, bound, **options)
    same, exact = (
        reference.scale_attention_step(*(t.to(wide) for t in (q, *cache.unbind(2))), kv_length, softmax_scale=scale)
        for wide in (q.dtype, torch.float64)
    )
    assert_as_accurate_as_torch(out, same, exact)
    return out


@pytest.mark.parametrize(("dtype", "dim"), VARIANTS)
@pytest.mark.parametrize(("queries", "kv_length"), [(1, 1), (5, 67)])
def test_step(launch_in_every_order, queries, kv_length, dtype, dim):
    q, cache = random((1, queries, 2, dim), dtype), random((1, 70, 2, 2, dim), dtype, seed=1)
    cache[:, kv_length:] = float("nan")
    check_step(launch_in_every_order, q, cache, kv_length, dim**-0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("warpgroups", [True, False])
def test_many_steps(launch_in_every_order, dtype, warpgroups):
    """Tiles of keys take turns in shared memory, and the barriers that say where they are in their phases."""
    q, cache = random((1, 66, 1, 64), dtype), random((1, 400, 2, 1, 64), dtype, seed=1)
    for kv_length in (256, 257, 383):
        check_step(launch_in_every_order, q, cache, kv_length, 0.125, warpgroups=warpgroups)


@pytest.mark.parametrize(("dtype", "dim"), HALF_VARIANTS)
@pytest.mark.parametrize("q_scale", [None, [40.0]])
def test_later_scales_change_nothing(launch_once, q_scale, dtype, dim):
    """Not one bit, though their tokens lie right behind those of a tile."""
    lengths, tokens = [100, 30], 100
    qkv, q_scale = random((1, 130, 3, 1, dim), dtype), None if q_scale is None else torch.tensor(q_scale)
    found = []
    for factor in (1, 50, float("nan")):
        qkv[:, tokens:] *= factor
        out, logsumexp, inverse_lengths = launch_once("scale_attention", *qkv.unbind(2), lengths, 0.5, q_scale)
        found.append([out[:, :tokens], logsumexp[..., :tokens], inverse_lengths[..., :tokens]])
    for others in found[1:]:
        assert all(torch.equal(first, other) for first, other in zip(found[0], others, strict=True))


def bounds_of(dtype, *values):
    return torch.tensor(values, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("dtype", "dim"), VARIANTS)
def test_fixed_maximum(launch_in_every_order, dtype, dim):
    """A head whose bound allows it takes that for its maximum, also where every logit is the lowest; others do not."""
    limit = {torch.float16: 10.0, torch.float64: 345.0}.get(dtype, 35.0)
    direction = torch.nn.functional.normalize(random((dim,), torch.float64), dim=0)
    q, cache = torch.empty(1, 3, 2, dim, dtype=dtype), random((1, 70, 2, 2, dim), dtype, seed=1)
    q[:, :2], q[:, 2] = direction * limit, -direction * limit
    cache[:, :, 0] = -direction
    cache[:, 30:50, 0] *= 0.99
    out = check_step(launch_in_every_order, q, cache, 70, 1.0, bounds_of(dtype, limit, limit + 1))
    infinite = bounds_of(dtype, float("inf"), float("inf"))
    (searched,) = launch_in_every_order("scale_attention_step", q, *cache.unbind(2), 70, 1.0, infinite)
    assert torch.equal(out[:, :, 1], searched[:, :, 1])
    assert not torch.equal(out[:, :, 0], searched[:, :, 0])


@pytest.mark.parametrize(("dtype", "dim"), VARIANTS)
@pytest.mark.parametrize("bound", [None, 1.0])
def test_step_in_parts(launch_in_every_order, bound, dtype, dim):
    """Two parts of the keys, the last one short, each with its maximum or all with one; a part without weight has
    none."""
    q, cache = random((1, 3, 2, dim), dtype), random((1, 540, 2, 2, dim), dtype, seed=1)
    bounds = None
    if bound is None:
        q[..., 0] = q[..., 0].abs() + 1
        cache[0, :320, 0, 0, 0] = -float("inf")
    else:
        q, cache[:, :, 0] = (torch.nn.functional.normalize(t.double(), dim=-1).to(dtype) for t in (q, cache[:, :, 0]))
        bounds = bounds_of(dtype, 1.01 * bound, 1.01 * bound)
    cache[:, 530:] = float("nan")
    check_step(launch_in_every_order, q, cache, 530, bound or 0.1, bounds)


@pytest.mark.parametrize(("dtype", "dim"), HALF_VARIANTS)
@pytest.mark.parametrize("rise", [0.08, 0.3])
def test_maximum_that_rises(launch_in_every_order, rise, dtype, dim):
    """From tile to tile by less than it takes to be followed, or by more, row by row; in one row it falls."""
    direction = torch.nn.functional.normalize(random((dim,), torch.float64), dim=0)
    heights = rise * torch.arange(200.0, dtype=torch.float64)
    q = torch.stack([0.1 * direction, direction, -direction], 0).view(1, 3, 1, dim).to(dtype)
    keys = heights[:, None] * direction + 0.1 * random((200, dim), torch.float64, seed=1)
    cache = torch.stack([keys, random((200, dim), torch.float64, seed=2)], 1).view(1, 200, 2, 1, dim).to(dtype)
    check_step(launch_in_every_order, q, cache, 200, 1.0)


LAYOUTS = {
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "odd rows": lambda t: torch.nn.functional.pad(t, (0, 1))[..., :-1],
    "columns": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "one for all images": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("misalignment", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "dim"), [(torch.float32, 32), (torch.float64, 32), (torch.float16, 32), (torch.bfloat16, 64)]
)
def test_inputs_that_lie_otherwise(launch_once, dtype, dim, layout, misalignment):
    """The same bits as from contiguous ones."""
    lengths, q_scale = [1, 4], bounds_of(dtype, 2.0, 3.0)

    def results(change, **options):
        q, k, v, grad_out = (change(random((2, 5, 2, dim), dtype, seed)) for seed in range(4))
        out, logsumexp, inverse = launch_once("scale_attention", q, k, v, lengths, 0.2, q_scale, **options)
        saved = (change(out), logsumexp.mT.contiguous().mT, lengths, 0.2, q_scale, inverse)
        grads = launch_once("scale_attention_backward", grad_out, q, k, v, *saved, **options)
        return out, *grads, *launch_once("scale_attention_step", q, k, v, 3, 0.2, q_scale, **options)

    def plain(t):  # with the values of the layout
        return (t[:1].expand(t.shape) if layout.startswith("one") else t).contiguous()

    for found, expected in zip(results(LAYOUTS[layout], misalignment=misalignment), results(plain), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(0, 5, 2, 32), (2, 5, 0, 32)])
def test_nothing_to_do(launch_once, shape):
    t = torch.zeros(shape)
    saved = launch_once("scale_attention", t, t, t, [1, 4], 0.2, torch.ones(shape[2]))
    assert saved[0].shape == shape
    arguments = (t, t, t, t, saved[0], saved[1], [1, 4], 0.2, torch.ones(shape[2]), saved[2])
    *grads, grad_q_scale = launch_once("scale_attention_backward", *arguments)
    assert [g.shape for g in grads] == [shape] * 3
    assert torch.equal(grad_q_scale, torch.zeros(shape[2]))
    assert launch_once("scale_attention_step", t, t, t, 5, 0.2, None)[0].shape == shape
