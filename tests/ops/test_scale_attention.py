"""scale_attention and scale_attention_step: values, layouts, degenerate inputs, determinism, torch's op contract."""

import itertools

import pytest
import torch

import flexvar_ext
from flexvar_ext import _host, reference
from tests.ops.attention_inputs import DTYPES, PAPER_LENGTHS, gradient_of, leaves, make_q_scale, make_qkv
from tests.tolerances import ATOL, FORWARD_FACTOR, GRADIENT_FACTOR, assert_as_accurate_as_torch

LENGTHS = {
    1: [1],
    2: [1, 1],
    3: [1, 2],
    7: [2, 5],
    63: [1, 8, 54],
    64: [64],
    65: [1, 64],
    127: [1, 6, 120],
    129: [128, 1],
    255: PAPER_LENGTHS[:8],
    257: [255, 2],
    680: PAPER_LENGTHS,
    681: [*PAPER_LENGTHS, 1],
    1704: [*PAPER_LENGTHS, 1024],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_values(device, tokens, dtype):
    q, k, v = make_qkv(1, tokens, 2, 64, dtype, device)
    lengths = LENGTHS[tokens]
    out = flexvar_ext.scale_attention(q, k, v, lengths)
    exact = reference.scale_attention(q.double(), k.double(), v.double(), lengths)
    assert_as_accurate_as_torch(out, reference.scale_attention(q, k, v, lengths), exact)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("lengths", [[1, 8, 45], [3, 70, 129]])
def test_gradients(device, lengths, dim, dtype):
    q, k, v = leaves(*make_qkv(2, sum(lengths), 2, dim, dtype, device))
    grad_out = gradient_of(q, dtype)
    native = torch.autograd.grad(flexvar_ext.scale_attention(q, k, v, lengths), (q, k, v), grad_out)
    same = torch.autograd.grad(reference.scale_attention(q, k, v, lengths), (q, k, v), grad_out)
    exact_inputs = leaves(q.double(), k.double(), v.double())
    exact = torch.autograd.grad(reference.scale_attention(*exact_inputs, lengths), exact_inputs, grad_out.double())
    for native_grad, same_grad, exact_grad in zip(native, same, exact, strict=True):
        assert_as_accurate_as_torch(native_grad, same_grad, exact_grad, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("lengths", [[1, 8, 45], [3, 70, 129]])
def test_q_scale(device, lengths, dim, dtype):
    """Values and gradients with normalised queries and keys."""
    q, k, v, q_scale = leaves(*make_qkv(2, sum(lengths), 3, dim, dtype, device), make_q_scale(3, dtype, device=device))
    grad_out = gradient_of(q, dtype)
    exact_inputs = leaves(q.double(), k.double(), v.double(), q_scale.double())

    def results(op, inputs):
        *qkv, scale = inputs
        out = op.scale_attention(*qkv, lengths, softmax_scale=1.5, q_scale=scale)
        return out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(out.dtype))

    inputs = (q, k, v, q_scale)
    native, same, exact = results(flexvar_ext, inputs), results(reference, inputs), results(reference, exact_inputs)
    for i, tensors in enumerate(zip(native, same, exact, strict=True)):
        if tensors[0].dtype == dtype:
            assert_as_accurate_as_torch(*tensors, factor=GRADIENT_FACTOR if i else FORWARD_FACTOR)
        else:  # the gradient of q_scale: float32, from 16-bit tensors
            error, error_of_torch = ((grad - tensors[2]).abs().max() for grad in tensors[:2])
            assert error <= GRADIENT_FACTOR * error_of_torch + 0.02


def test_q_scale_with_short_rows(device):
    """The rule of F.normalize: rows shorter than 1e-12 are divided by 1e-12, forward and backward."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        q, k, v = (tensor.contiguous() for tensor in make_qkv(1, 6, 1, 32, dtype, device))
        for tensor in (q, k):
            tensor[:, 1] = 0
            if dtype != torch.float16:
                tensor[:, 2] *= 1e-14
            tensor[:, 3] *= 1e-3
            tensor[:, 4] *= 1e3
        q, k, v, q_scale = leaves(q, k, v, make_q_scale(1, dtype, device))
        grad_out = torch.randn(v.shape, dtype=torch.float64).to(device, dtype)
        exact_inputs = leaves(q.double(), k.double(), v.double(), q_scale.double())
        native = torch.autograd.grad(
            flexvar_ext.scale_attention(q, k, v, [1, 5], softmax_scale=1.0, q_scale=q_scale), (q, k, v), grad_out
        )
        same = torch.autograd.grad(
            reference.scale_attention(q, k, v, [1, 5], softmax_scale=1.0, q_scale=q_scale), (q, k, v), grad_out
        )
        *exact_qkv, exact_scale = exact_inputs
        exact = torch.autograd.grad(
            reference.scale_attention(*exact_qkv, [1, 5], softmax_scale=1.0, q_scale=exact_scale),
            exact_qkv,
            grad_out.double(),
        )
        for token in range(6):
            for native_grad, same_grad, exact_grad in zip(native, same, exact, strict=True):
                size = max(1.0, exact_grad[:, token].abs().max().item())  # large for a short row
                if size > 6e4 and dtype == torch.float16:
                    continue
                assert_as_accurate_as_torch(
                    (native_grad[:, token].double() / size).to(dtype),
                    (same_grad[:, token].double() / size).to(dtype),
                    exact_grad[:, token] / size,
                    factor=GRADIENT_FACTOR,
                )


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_step(device, dtype):
    q, k, v = (tensor.contiguous() for tensor in make_qkv(2, 35, 4, 32, dtype, device))
    q = q[:, :6].contiguous()
    expected = flexvar_ext.scale_attention_step(q, k, v, 30)

    def variants(tensor):
        offset = torch.empty(tensor.numel() + 1, dtype=dtype, device=device)[1:].view(tensor.shape).copy_(tensor)
        head_major = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        return offset, head_major, torch.stack((tensor, -tensor), dim=-1)[..., 0], torch.cat([tensor] * 3, 1)[:, 35:70]

    for same_k, same_v in zip(variants(k), variants(v), strict=True):
        assert torch.equal(flexvar_ext.scale_attention_step(q, same_k, same_v, 30), expected)
    for same_q in variants(q)[:3]:
        assert torch.equal(flexvar_ext.scale_attention_step(same_q, k, v, 30), expected)
    one_for_all = k[:1].expand(2, -1, -1, -1)
    assert torch.equal(
        flexvar_ext.scale_attention_step(q, one_for_all, v, 30),
        flexvar_ext.scale_attention_step(q, one_for_all.contiguous(), v, 30),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_are_bit_equal(device, dtype):
    lengths = [1, 4, 9, 16, 36]
    q, k, v = leaves(*make_qkv(2, 66, 2, 32, dtype, device))
    grad_out = torch.randn(q.shape, dtype=torch.float32).to(device, dtype)

    def results():
        out = flexvar_ext.scale_attention(q, k, v, lengths)
        with torch.no_grad():
            step = flexvar_ext.scale_attention_step(q[:, 30:], k, v, 66)
        return [out, step, *torch.autograd.grad(out, (q, k, v), grad_out)]

    expected = results()
    for _ in range(250):
        assert all(map(torch.equal, results(), expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64])  # Hopper's copy engine brings rows of 64
def test_layouts(device, dim, dtype):
    lengths = [1, 4, 30]
    plain = [tensor.contiguous() for tensor in make_qkv(2, 35, 4, dim, dtype, device)]
    expected = flexvar_ext.scale_attention(*plain, lengths)
    head_major = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in plain]
    dim_strided = [torch.stack((tensor, tensor), dim=-1)[..., 0] for tensor in plain]
    shifted = []
    for tensor in plain:
        storage = torch.empty(tensor.numel() + 1, dtype=dtype, device=device)
        shifted.append(storage[1:].view(tensor.shape).copy_(tensor))
    for variant in (head_major, dim_strided, shifted):
        assert torch.equal(flexvar_ext.scale_attention(*variant, lengths), expected)
    q, k, v = plain
    for shared in (k[:, :, :1].expand_as(k), k[:1].expand_as(k)):
        assert torch.equal(
            flexvar_ext.scale_attention(q, shared, v, lengths),
            flexvar_ext.scale_attention(q, shared.contiguous(), v, lengths),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64])
def test_gradients_of_other_layouts(device, dim, dtype):
    lengths = [1, 4, 30]
    q, k, v = leaves(*make_qkv(2, 35, 4, dim, dtype, device))
    out = flexvar_ext.scale_attention(q, k, v, lengths)
    dense = torch.randn(2, 4, 35, dim, device=device).to(dtype).transpose(1, 2)
    one = torch.ones((), dtype=dtype, device=device)
    for grad_out in (one.expand_as(out), dense, dense[:1].expand_as(out), dense[:, :, :1].expand_as(out)):
        native = torch.autograd.grad(out, (q, k, v), grad_out, retain_graph=True)
        contiguous = torch.autograd.grad(out, (q, k, v), grad_out.contiguous(), retain_graph=True)
        assert all(map(torch.equal, native, contiguous))


@pytest.mark.parametrize("shape", [(0, 5, 2, 32), (2, 0, 2, 32), (2, 5, 0, 32)])
def test_empty(device, shape):
    q, k, v = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(3))
    lengths = [shape[1]] if shape[1] else []
    out = flexvar_ext.scale_attention(q, k, v, lengths)
    assert out.shape == shape
    q_scale = torch.ones(shape[2], device=device, requires_grad=True)
    (out + flexvar_ext.scale_attention(q, k, v, lengths, q_scale=q_scale)).sum().backward()
    assert q.grad.shape == shape
    assert torch.equal(q_scale.grad, torch.zeros_like(q_scale))
    if shape[1]:
        with torch.no_grad():
            assert flexvar_ext.scale_attention_step(q[:, :0], k, v, 3).shape == (shape[0], 0, *shape[2:])


def test_scales_of_length_zero_have_no_effect(device):
    q, k, v = make_qkv(1, 9, 2, 32, torch.float32, device)
    assert torch.equal(
        flexvar_ext.scale_attention(q, k, v, [0, 4, 0, 0, 5, 0]), flexvar_ext.scale_attention(q, k, v, (4, 5))
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("queries", "kv_length"), [(1, 1), (1, 200), (4, 5), (66, 130), (130, 131), (2, 1300)])
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_step(device, queries, kv_length, dim, dtype):
    _, k_cache, v_cache = make_qkv(2, max(201, kv_length), 3, dim, dtype, device)
    q = make_qkv(2, queries, 3, dim, dtype, device, seed=1)[0]
    out = flexvar_ext.scale_attention_step(q, k_cache, v_cache, kv_length)
    same = reference.scale_attention_step(q, k_cache, v_cache, kv_length)
    exact = reference.scale_attention_step(q.double(), k_cache.double(), v_cache.double(), kv_length)
    assert_as_accurate_as_torch(out, same, exact)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bound", [0.0, 1.0, 9.0, 30.0, 36.0, 100.0])
def test_step_with_logit_bound(device, bound, dtype):
    """Behind append_qkv, across the limits of a fixed maximum, also where every logit is the lowest."""
    qkv = torch.stack(make_qkv(2, 70, 2, 32, dtype, device), dim=2)
    qkv[1, :, 1] = -qkv[1, :1, 0]
    qkv[1, :, 0] = qkv[1, :1, 0]
    k_cache, v_cache = (torch.zeros(2, 75, 2, 32, dtype=dtype, device=device) for _ in range(2))
    q_scale = torch.tensor([bound, bound / 2], device=device)
    q = flexvar_ext.append_qkv(qkv, k_cache, v_cache, 0, q_scale=q_scale)
    arguments = (q, k_cache, v_cache, 70)
    out = flexvar_ext.scale_attention_step(*arguments, softmax_scale=1.0, logit_bound=q_scale)
    same = reference.scale_attention_step(*arguments, softmax_scale=1.0, logit_bound=q_scale)
    exact = reference.scale_attention_step(*(t.double() for t in arguments[:3]), 70, softmax_scale=1.0)
    error, allowed = ((result.double() - exact).abs().max().item() for result in (out, same))
    assert error <= FORWARD_FACTOR * allowed + ATOL[dtype] * max(1, bound / 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_step_repeats_to_the_bit(device, dtype):
    """Also in parts of the keys, which few queries and many keys make on CUDA."""
    _, k_cache, v_cache = make_qkv(1, 1300, 2, 64, dtype, device)
    q = make_qkv(1, 3, 2, 64, dtype, device, seed=1)[0]
    for bound in (None, torch.full((2,), 8.0, device=device)):
        results = [
            flexvar_ext.scale_attention_step(q, k_cache, v_cache, 1300, softmax_scale=0.05, logit_bound=bound)
            for _ in range(20)
        ]
        assert all(torch.equal(result, results[0]) for result in results)


def test_step_does_not_read_beyond_kv_length(device):
    q, k_cache, v_cache = make_qkv(1, 40, 2, 32, torch.float32, device)
    expected = flexvar_ext.scale_attention_step(q, k_cache[:, :7], v_cache[:, :7], 7)
    k_cache[:, 7:] = float("nan")
    v_cache[:, 7:] = float("nan")
    assert torch.equal(flexvar_ext.scale_attention_step(q, k_cache, v_cache, 7), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_equal_the_whole(device, dtype):
    """On one device the steps of generation give the very bits of the teacher-forced pass."""
    lengths = PAPER_LENGTHS[:8]
    q, k, v = make_qkv(2, sum(lengths), 2, 64, dtype, device)
    whole = flexvar_ext.scale_attention(q, k, v, lengths)
    for begin, end in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        assert torch.equal(flexvar_ext.scale_attention_step(q[:, begin:end], k, v, end), whole[:, begin:end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalized", [False, True])
def test_independent_of_threads_repeats_and_batch(device, dtype, normalized):
    lengths = PAPER_LENGTHS[:8]
    q, k, v = leaves(*make_qkv(3, sum(lengths), 2, 64, dtype, device))
    q_scale = make_q_scale(2, dtype, device) if normalized else None
    grad_out = torch.randn(q.shape, dtype=torch.float32).to(device, dtype)

    def results(rows=slice(None)):
        out = flexvar_ext.scale_attention(q[rows], k[rows], v[rows], lengths, q_scale=q_scale)
        grads = torch.autograd.grad(out, (q, k, v), grad_out[rows])
        return [out, *(grad[rows] for grad in grads)]

    expected = results()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(5):
                assert all(map(torch.equal, results(), expected))
    finally:
        torch.set_num_threads(threads)
    for i in range(3):
        alone = results(slice(i, i + 1))
        assert all(torch.equal(a, e[i : i + 1]) for a, e in zip(alone, expected, strict=True))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_instruction_sets(monkeypatch, isa, dtype):
    available = ["baseline", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"]
    if isa not in available[: available.index(_host.cpu_isa()) + 1]:
        pytest.skip(f"this CPU has no {isa}")
    monkeypatch.setenv("FLEXVAR_CPU_ISA", isa)
    lengths = [1, 4, 70]
    for dim in (32, 96):
        q, k, v = leaves(*make_qkv(1, 75, 2, dim, dtype))
        grad_out = torch.randn(q.shape, dtype=torch.float64).to(dtype)
        out = flexvar_ext.scale_attention(q, k, v, lengths)
        same = reference.scale_attention(q, k, v, lengths)
        inputs = leaves(q.double(), k.double(), v.double())
        exact = reference.scale_attention(*inputs, lengths)
        assert_as_accurate_as_torch(out, same, exact)
        for native_grad, same_grad, exact_grad in zip(
            torch.autograd.grad(out, (q, k, v), grad_out),
            torch.autograd.grad(same, (q, k, v), grad_out),
            torch.autograd.grad(exact, inputs, grad_out.double()),
            strict=True,
        ):
            assert_as_accurate_as_torch(native_grad, same_grad, exact_grad, factor=GRADIENT_FACTOR)
    test_q_scale(torch.device("cpu"), lengths, 32, dtype)


CONTRACT_CASES = [
    (1, [1], 1, 32, None),
    (2, [1, 4], 1, 32, 0.5),
    (1, [3, 0, 2], 2, 32, None),
    (2, [2, 3], 1, 64, None),
    (1, [7], 2, 64, -0.1),
    (1, [1, 1, 1], 1, 96, None),
    (1, [1, 2], 1, 128, 1.0),
    (0, [1, 4], 1, 32, None),
]


@pytest.mark.parametrize(("batch", "lengths", "heads", "dim", "scale"), CONTRACT_CASES)
def test_gradcheck(device, batch, lengths, heads, dim, scale):
    q, k, v = leaves(*make_qkv(batch, sum(lengths), heads, dim, torch.float64, device))
    torch.autograd.gradcheck(
        lambda q, k, v: flexvar_ext.scale_attention(q, k, v, lengths, softmax_scale=scale), (q, k, v), fast_mode=True
    )
    torch.autograd.gradcheck(
        lambda q, k, v, q_scale: flexvar_ext.scale_attention(q, k, v, lengths, softmax_scale=scale, q_scale=q_scale),
        (q, k, v, *leaves(make_q_scale(heads, torch.float64, device))),
        fast_mode=True,
    )


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("batch", "lengths", "heads", "dim", "scale"), CONTRACT_CASES)
def test_opcheck(device, batch, lengths, heads, dim, scale, normalized):
    tokens, scale = sum(lengths), scale or 0.2
    q, k, v = (
        torch.clone(t, memory_format=torch.contiguous_format)
        for t in make_qkv(batch, tokens, heads, dim, torch.float32, device)
    )
    q_scale = make_q_scale(heads, torch.float32, device) if normalized else None
    q_scale_leaf = leaves(q_scale)[0] if normalized else None
    torch.library.opcheck(torch.ops.flexvar.scale_attention.default, (*leaves(q, k, v), lengths, scale, q_scale_leaf))
    out, logsumexp, inverse_lengths = torch.ops.flexvar.scale_attention(q, k, v, lengths, scale, q_scale)
    torch.library.opcheck(
        torch.ops.flexvar.scale_attention_backward.default,
        (torch.ones_like(out), q, k, v, out, logsumexp, lengths, scale, q_scale, inverse_lengths),
    )
    torch.library.opcheck(torch.ops.flexvar.scale_attention_step.default, (q, k, v, tokens, scale, q_scale))


@pytest.mark.slow
def test_compile(device):
    q, k, v = leaves(*make_qkv(2, 35, 2, 32, torch.float32, device))

    q_scale = torch.ones(2, device=device)

    def attend(q, k, v):
        return flexvar_ext.scale_attention(q, k, v, [1, 4, 30]) * flexvar_ext.scale_attention(
            q, k, v, [1, 4, 30], q_scale=q_scale
        )

    def step(q, k, v):
        return flexvar_ext.scale_attention_step(q[:, :4], k, v, 5) * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(compiled, attend(q, k, v))
    assert torch.equal(
        torch.autograd.grad(compiled.square().sum(), q)[0], torch.autograd.grad(attend(q, k, v).square().sum(), q)[0]
    )
    with torch.no_grad():
        assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v), step(q, k, v))


def test_symbolic_batch_and_heads(device):
    def attend(q, k, v):
        return flexvar_ext.scale_attention(q, k, v, [1, 4])

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, heads in ((2, 3), (4, 5)):
        q, k, v = make_qkv(batch, 5, heads, 32, torch.float32, device)
        assert torch.equal(compiled(q, k, v), attend(q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, dtype):
    q, k, v = leaves(*make_qkv(1, 5, 2, 32, torch.float32, device))
    with torch.autocast(device.type, dtype=dtype):
        out = flexvar_ext.scale_attention(q, k, v.to(dtype), [1, 4])
        with torch.no_grad():
            step = flexvar_ext.scale_attention_step(q, k, v, 5)
    assert out.dtype == step.dtype == dtype
    assert torch.equal(out, flexvar_ext.scale_attention(q.to(dtype), k.to(dtype), v.to(dtype), [1, 4]))
    (q_scale,) = leaves(torch.tensor([1.234567, 3.0], device=device))
    with torch.autocast(device.type, dtype=dtype):
        normalized = flexvar_ext.scale_attention(q, k, v, [1, 4], q_scale=q_scale)
    expected = flexvar_ext.scale_attention(q.to(dtype), k.to(dtype), v.to(dtype), [1, 4], q_scale=q_scale)
    assert torch.equal(normalized, expected)  # q_scale is not rounded
    assert torch.autograd.grad(normalized.float().square().sum(), q_scale)[0].dtype == torch.float32
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def qkv_of(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


BAD = qkv_of(1, 5, 2, 32)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1], BAD, BAD, [5]), {}, TypeError, r"scale_attention: q must be a torch.Tensor, got list"),
        ((BAD[0], BAD, BAD, [5]), {}, ValueError, r"q must have shape \[B, L, H, D\], got \(5, 2, 32\)"),
        ((BAD.long(), BAD, BAD, [5]), {}, TypeError, r"q must have dtype float32, .* got int64"),
        ((BAD, BAD.half(), BAD, [5]), {}, TypeError, r"k must have the dtype of q, torch.float32, got torch.float16"),
        (
            (BAD, BAD, BAD[:, :4], [5]),
            {},
            ValueError,
            r"v must have the shape of q, \(1, 5, 2, 32\), got \(1, 4, 2, 32\)",
        ),
        ((*[qkv_of(1, 5, 2, 48)] * 3, [5]), {}, ValueError, r"head dim D = 32, 64, 96 or 128, got \(1, 5, 2, 48\)"),
        ((BAD, BAD, BAD.to("meta"), [5]), {}, ValueError, r"all tensors must be on one device, got .*v on meta"),
        ((BAD, BAD, BAD, 5), {}, TypeError, r"scale_lengths must be a sequence of integers, got int"),
        ((BAD, BAD, BAD, [5.0]), {}, TypeError, r"scale_lengths must hold integers, got \[5.0\]"),
        ((BAD, BAD, BAD, [6, -1]), {}, ValueError, r"scale_lengths must not be negative, got \[6, -1\]"),
        ((BAD, BAD, BAD, [1, 3]), {}, ValueError, r"scale_lengths must sum to L = 5, got \[1, 3\], which sum to 4"),
        ((BAD, BAD, BAD, [5]), {"softmax_scale": "1"}, TypeError, r"softmax_scale must be a number or None, got str"),
        ((BAD, BAD, BAD, [5]), {"softmax_scale": float("nan")}, ValueError, r"softmax_scale must be finite, got nan"),
        ((BAD, BAD, BAD, [5]), {"softmax_scale": 10**400}, ValueError, r"softmax_scale must be finite, got 1000"),
        ((BAD, BAD.to_sparse(), BAD, [5]), {}, TypeError, r"k must be a dense tensor, got layout sparse_coo"),
        ((BAD, BAD, BAD, [5]), {"q_scale": 4.0}, TypeError, r"q_scale must be a torch.Tensor, got float"),
        ((BAD, BAD, BAD, [5]), {"q_scale": torch.ones(1)}, ValueError, r"q_scale .* \[H\] with H = 2, got \(1,\)"),
        ((BAD, BAD, BAD, [5]), {"q_scale": torch.ones(2).int()}, TypeError, r"q_scale must have dtype .* got int32"),
        (
            (BAD, BAD, BAD, [5]),
            {"q_scale": torch.ones(2, device="meta")},
            ValueError,
            r"all tensors must be on one device, got q on cpu, q_scale on meta",
        ),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        flexvar_ext.scale_attention(*arguments, **options)
    assert flexvar_ext.scale_attention(BAD, BAD, BAD, [5]).shape == BAD.shape


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (BAD, BAD[..., :1, :], BAD, 5),
            ValueError,
            r"scale_attention_step: k_cache must have shape .* got \(1, 5, 1, 32\)",
        ),
        ((BAD, BAD, BAD[:, :4], 4), ValueError, r"v_cache must have shape .* got \(1, 4, 2, 32\)"),
        ((BAD, BAD, BAD, 6), ValueError, r"kv_length must be from 1 to L_max = 5, got 6"),
        ((BAD, BAD, BAD, 0), ValueError, r"kv_length must be from 1 to L_max = 5, got 0"),
        ((BAD, BAD, BAD, 2.0), TypeError, r"kv_length must be an integer, got float"),
        ((BAD.clone().requires_grad_(), BAD, BAD, 5), ValueError, r"must not require a gradient \(use torch.no_grad\)"),
    ],
)
def test_bad_input_of_step(arguments, error, message):
    with pytest.raises(error, match=message):
        flexvar_ext.scale_attention_step(*arguments)


def test_bad_logit_bound():
    with pytest.raises(ValueError, match=r"step: logit_bound must have shape \[H\] with H = 2, got \(3,\)"):
        flexvar_ext.scale_attention_step(BAD, BAD, BAD, 5, logit_bound=torch.ones(3))
    with pytest.raises(TypeError, match=r"step: logit_bound must be a torch.Tensor, got float"):
        flexvar_ext.scale_attention_step(BAD, BAD, BAD, 5, logit_bound=3.0)


class TestPlan:
    @pytest.mark.parametrize("lengths", [[], [0, 0], [1], [64], [65, 0, 200], PAPER_LENGTHS])
    @pytest.mark.parametrize("rows", [16, 64, 128])
    def test_tiles_cover_the_visible_pairs_once(self, lengths, rows):
        tokens = sum(lengths)
        scale = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
        visible = (scale[:, None] >= scale[None, :]).int()
        by_query, by_key = (
            torch.zeros(tokens, tokens, dtype=torch.int32),
            torch.zeros(tokens, tokens, dtype=torch.int32),
        )
        for query_begin, query_end, key_end in _host.query_tiles(lengths, rows):
            assert 0 < query_end - query_begin <= rows
            by_query[query_begin:query_end, :key_end] += 1
        for key_begin, key_end, query_begin in _host.key_tiles(lengths, rows):
            assert 0 < key_end - key_begin <= rows
            by_key[query_begin:, key_begin:key_end] += 1
        assert torch.equal(by_query, visible)
        assert torch.equal(by_key, visible)

    @pytest.mark.parametrize("columns", [16, 64])
    def test_parts_of_keys(self, columns):
        for tiles, keys in itertools.product((1, 16, 33, 66, 67, 1000), (1, 255, 511, 512, 680, 1037, 100_000)):
            part = _host.keys_per_part(tiles, keys, columns, 132)
            if tiles > 66 or keys < 256:
                assert part == keys
                continue
            assert part % columns == 0
            parts = -(-keys // part)
            assert parts * tiles <= 132
            assert part >= 128

    def test_longest_first(self):
        keys = [key_end for _, _, key_end in _host.query_tiles(PAPER_LENGTHS, 64)]
        assert keys == sorted(keys, reverse=True)
        queries = [query_begin for _, _, query_begin in _host.key_tiles(PAPER_LENGTHS, 64)]
        assert queries == sorted(queries)

    @pytest.mark.parametrize("costs", [[], [1], [1, 5, 30, 91, 680], [0, 0], [10**12, 1]])
    @pytest.mark.parametrize("repeats", [0, 1, 7, 32])
    @pytest.mark.parametrize("parts", [1, 2, 5, 300])
    def test_balanced_runs(self, costs, repeats, parts):
        bounds = _host.balanced_runs(costs, repeats, parts)
        assert bounds[0] == 0
        assert bounds[-1] == len(costs) * repeats
        assert all(begin < end for begin, end in itertools.pairwise(bounds))
        assert len(bounds) <= parts + 1
        total = sum(costs) * repeats
        run_costs = [
            sum(costs[item % len(costs)] for item in range(begin, end)) for begin, end in itertools.pairwise(bounds)
        ]
        assert max(run_costs, default=0) <= total / parts + max(costs, default=0) * 2 + parts
