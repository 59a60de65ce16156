"""layer_norm_modulate and its residual form: one pass over memory, tokens that depend on nothing but themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flexvar_ext
from flexvar_ext import _host, reference
from flexvar_ext.layer_norm_modulate import CUDA_MAX_CHANNELS
from tests.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, assert_as_accurate_as_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = [1, 2, 3, 7, 63, 64, 65, 127, 129, 255, 257, 680, 681, 1704]
CHANNELS = [1, 2, 7, 16, 31, 65, 100, 257, 768, 1024, 1025, 1536]
INSTRUCTION_SETS = _host.build_info()["cpu_instruction_sets"].split()
INSTRUCTION_SETS = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_host.cpu_isa()) + 1]


def randn(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def arguments(
    batch: int,
    tokens: int,
    channels: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    vectors: int | None = None,
) -> dict[str, Tensor]:
    """Of residual_layer_norm_modulate. ``vectors``: how many there are, one per image unless given."""
    shape = (batch if vectors is None else vectors, 1, channels)
    given = {
        "x": randn(batch, tokens, channels, device=device) * 2 + 0.5,
        "branch": randn(batch, tokens, channels, seed=1, device=device),
        "gate": randn(*shape, seed=2, device=device),
        "scale": randn(*shape, seed=3, device=device),
        "shift": randn(*shape, seed=4, device=device),
    }
    return {name: tensor.to(dtype) for name, tensor in given.items()}


def norm_of(ops, given: dict[str, Tensor], **options) -> Tensor:
    return ops.layer_norm_modulate(given["x"], given["scale"], given["shift"], **options)


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def gradients(function, given: dict[str, Tensor]) -> list[Tensor]:
    """The results of function(**given), then the gradients of a weighted sum of them."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
    out = function(**leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    weights = [randn(*o.shape, seed=5 + i, device=o.device).to(o.dtype) for i, o in enumerate(outputs)]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, list(leaves.values()), weights))


def assert_accurate(name: str, given: dict[str, Tensor]) -> None:
    """Results and gradients."""
    names = ("x", "scale", "shift") if name == "layer_norm_modulate" else tuple(given)
    given = {key: given[key] for key in names}
    outputs = 1 if name == "layer_norm_modulate" else 2
    native, own = (gradients(getattr(ops, name), given) for ops in (flexvar_ext, reference))
    exact = gradients(getattr(reference, name), doubled(given))
    for index, results in enumerate(zip(native, own, exact, strict=True)):
        assert_as_accurate_as_torch(*results, factor=FORWARD_FACTOR if index < outputs else GRADIENT_FACTOR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["layer_norm_modulate", "residual_layer_norm_modulate"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_as_accurate_as_torch(device, tokens, name, dtype):
    assert_accurate(name, arguments(2, tokens, 48, dtype, device))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels(device, channels, vectors, dtype):
    for name in ("layer_norm_modulate", "residual_layer_norm_modulate"):
        assert_accurate(name, arguments(3, 5, channels, dtype, device, vectors=vectors))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_is_as_accurate(monkeypatch, instruction_set, dtype):
    monkeypatch.setenv("FLEXVAR_CPU_ISA", instruction_set)
    for channels in CHANNELS:
        assert_accurate("residual_layer_norm_modulate", arguments(2, 40, channels, dtype))


def test_mean_far_from_zero(device):
    given = arguments(1, 4, 1024, device=device)
    given["x"] = given["x"] * 1e-2 + 100
    error = (norm_of(flexvar_ext, given) - norm_of(reference, doubled(given))).abs().max()
    assert error < 5e-3  # the rounding of x itself is 4e-4 of its deviation
    same = torch.full_like(given["x"], 3.25)  # no variance at all
    assert torch.equal(
        flexvar_ext.layer_norm_modulate(same, given["scale"], given["shift"]), given["shift"].expand_as(same)
    )


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("channels", [64, 1024, 8000])
def test_a_mean_far_from_zero_costs_no_digits(monkeypatch, instruction_set, channels):
    """On the CPU: what the rounded mean is off by is taken off, too."""
    monkeypatch.setenv("FLEXVAR_CPU_ISA", instruction_set)
    given = arguments(1, 4, channels)
    given["x"] = given["x"] + 100
    error = (norm_of(flexvar_ext, given) - norm_of(reference, doubled(given))).abs().max()
    assert error < 3e-6


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("channels", [7, 1000])
def test_nearly_equal_numbers_whose_squares_overflow(monkeypatch, instruction_set, channels):
    """The variance is infinite, and the row all shift."""
    monkeypatch.setenv("FLEXVAR_CPU_ISA", instruction_set)
    given = arguments(1, 2, channels)
    given["x"] = 1e30 * (1 + torch.arange(channels) % 3 * 1e-7).expand(1, 2, channels)
    assert torch.equal(norm_of(flexvar_ext, given), given["shift"].expand(1, 2, channels))


def test_one_number_far_from_the_others(device):
    given = arguments(1, 4, CUDA_MAX_CHANNELS if device.type == "cuda" else 8192, device=device)
    given["x"][..., 3] = 1e4
    exact = norm_of(reference, doubled(given))
    error, own = ((norm_of(ops, given) - exact).norm() for ops in (flexvar_ext, reference))
    assert error < 3 * own


def test_values_that_are_not_finite_stay_in_their_token(device):
    given = arguments(1, 5, 100, device=device)
    expected = norm_of(flexvar_ext, given)
    for value in (float("nan"), float("inf")):
        given["x"][0, 3, 7] = value
        out = norm_of(flexvar_ext, given)
        assert out[0, 3].isnan().all()
        assert torch.equal(out[0, [0, 1, 2, 4]], expected[0, [0, 1, 2, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vectors", [1, 2])
def test_gradients_of_the_sum_alone_are_those_of_a_sum(device, vectors, dtype):
    """A row whose norm is NaN does not spoil them, and the vectors of the norm that is not used get none."""
    given = arguments(2, 5, 100, dtype, device, vectors=vectors)
    given["x"][1, 3, 7] = float("inf")
    weights = randn(2, 5, 100, seed=5, device=device).to(dtype)
    results = []
    for op, inputs in ((flexvar_ext, given), (reference, given), (reference, doubled(given))):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        y, _ = op.residual_layer_norm_modulate(**leaves)
        y.backward(weights.to(y.dtype))
        assert leaves["scale"].grad is None
        assert leaves["shift"].grad is None
        results.append([leaves[name].grad for name in ("x", "branch", "gate")])
    for native, own, exact in zip(*results, strict=True):
        assert_as_accurate_as_torch(native, own, exact, factor=GRADIENT_FACTOR)


# dtypes


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_mixed_dtypes(device, x_dtype, other):
    given = arguments(2, 9, 80, other, device)
    given["x"] = given["x"].to(x_dtype)
    out = norm_of(flexvar_ext, given, dtype=other)
    exact = norm_of(reference, doubled(given))
    assert out.dtype == other
    assert (out - exact).abs().max() <= torch.finfo(other).eps * exact.abs().max() + 2e-6
    y, out = flexvar_ext.residual_layer_norm_modulate(**given)
    assert (y.dtype, out.dtype) == (x_dtype, x_dtype)
    assert torch.equal(out, norm_of(flexvar_ext, dict(given, x=y)))  # the norm is that of the y that was returned
    exact_y, _ = reference.residual_layer_norm_modulate(**doubled(given))
    assert (y - exact_y).abs().max() <= torch.finfo(x_dtype).eps * exact_y.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_what_the_next_layer_reads(device, dtype):
    given = arguments(2, 9, 80, device=device)
    with torch.autocast(device.type, dtype=dtype):
        out, expected = norm_of(flexvar_ext, given), norm_of(reference, given)
        kept = norm_of(flexvar_ext, given, dtype=torch.float32)
        y, behind = flexvar_ext.residual_layer_norm_modulate(**given)
        grads = gradients(flexvar_ext.layer_norm_modulate, {name: given[name] for name in ("x", "scale", "shift")})
    assert out.dtype == expected.dtype == behind.dtype == dtype
    assert torch.equal(out, norm_of(flexvar_ext, given).to(dtype))  # float32 inside, rounded once
    torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert torch.equal(kept, norm_of(flexvar_ext, given))
    assert y.dtype == torch.float32
    assert [grad.dtype for grad in grads[1:]] == [torch.float32] * 3


# Tokens depend on nothing but themselves


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [48, 1024, 1025])
def test_tokens_are_the_same_in_any_batch(device, channels, dtype):
    given = arguments(3, 40, channels, dtype, device)
    expected = norm_of(flexvar_ext, given)
    y, behind = flexvar_ext.residual_layer_norm_modulate(**given)
    for image in range(3):
        for begin, end in ((0, 1), (0, 40), (13, 14), (5, 39)):
            part = {name: tensor[image : image + 1] for name, tensor in given.items()}
            part |= {name: part[name][:, begin:end] for name in ("x", "branch")}
            assert torch.equal(norm_of(flexvar_ext, part), expected[image : image + 1, begin:end])
            part_y, part_behind = flexvar_ext.residual_layer_norm_modulate(**part)
            assert torch.equal(part_y, y[image : image + 1, begin:end])
            assert torch.equal(part_behind, behind[image : image + 1, begin:end])


@pytest.mark.parametrize("shape", [(2, 90, 1024), (1, 300, 520)])
def test_thread_count_changes_nothing(shape):
    given = arguments(*shape)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(gradients(flexvar_ext.residual_layer_norm_modulate, given))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result[:2], results[0][:2], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(result[2:], results[0][2:], strict=True))


def test_repeats_are_bit_equal(device):
    given = arguments(2, 65, 200, device=device)
    expected = gradients(flexvar_ext.residual_layer_norm_modulate, given)
    for _ in range(250):
        repeated = gradients(flexvar_ext.residual_layer_norm_modulate, given)
        assert all(torch.equal(a, b) for a, b in zip(repeated, expected, strict=True))


# Layouts, degenerate sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [14, 64])
def test_layouts(device, channels, dtype):
    given = arguments(3, 5, channels, dtype, device)
    expected = gradients(flexvar_ext.residual_layer_norm_modulate, given)
    for name, tensor in given.items():
        strided = torch.stack([tensor, -tensor], dim=-1)[..., 0]
        offset = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
        turned = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        among_six = torch.cat([tensor] * 6, dim=2)[..., channels : 2 * channels]
        for same in (strided, offset, turned, among_six):
            found = gradients(flexvar_ext.residual_layer_norm_modulate, dict(given, **{name: same}))
            if device.type == "cuda":  # rows that are not aligned take another path, with another order of the sums
                for a, b in zip(found, expected, strict=True):
                    torch.testing.assert_close(a, b)
            else:
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_that_are_not_contiguous(device):
    given = arguments(2, 6, 20, device=device)
    x = given["x"].requires_grad_()
    out = norm_of(flexvar_ext, given)
    weights = randn(20, 6, 2, seed=7, device=device)
    (turned,) = torch.autograd.grad(out, x, weights.transpose(0, 2), retain_graph=True)
    (straight,) = torch.autograd.grad(out, x, weights.transpose(0, 2).contiguous(), retain_graph=True)
    assert torch.equal(turned, straight)
    (expanded,) = torch.autograd.grad(out.sum(), x)
    assert expanded.abs().max() < 10


def test_expanded_arguments(device):
    given = arguments(1, 5, 32, device=device)
    expected = gradients(
        flexvar_ext.residual_layer_norm_modulate, {name: t.repeat(3, 1, 1) for name, t in given.items()}
    )
    expanded = {name: tensor.expand(3, -1, -1) for name, tensor in given.items()}
    found = flexvar_ext.residual_layer_norm_modulate(**expanded)
    assert all(torch.equal(a, b) for a, b in zip(found, expected[:2], strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)])
def test_no_tokens(device, shape):
    for vectors in (None, 1):
        given = arguments(*shape, device=device, vectors=vectors)
        y, out, *grads = gradients(flexvar_ext.residual_layer_norm_modulate, given)
        assert y.shape == out.shape == shape
        for grad, tensor in zip(grads, given.values(), strict=True):
            assert grad.shape == tensor.shape
            assert not grad.any()


# Gradients, tracing


@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 1, 5), (2, 4, 1), (2, 17, 3)])
def test_gradients_in_double(device, shape, vectors):
    given = [tensor.requires_grad_() for tensor in doubled(arguments(*shape, device=device, vectors=vectors)).values()]
    assert torch.autograd.gradcheck(flexvar_ext.residual_layer_norm_modulate, given)
    x, _, _, scale, shift = given
    assert torch.autograd.gradcheck(flexvar_ext.layer_norm_modulate, (x, scale, shift))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 1, 1), (2, 33, 12)])
@pytest.mark.parametrize("vectors", [None, 1])
def test_opcheck(shape, dtype, vectors):
    given = {name: t.requires_grad_() for name, t in arguments(*shape, dtype, vectors=vectors).items()}
    ops = torch.ops.flexvar
    torch.library.opcheck(
        ops.layer_norm_modulate.default, (given["x"], given["scale"], given["shift"], 1e-6, torch.float32)
    )
    torch.library.opcheck(ops.residual_layer_norm_modulate.default, (*given.values(), 1e-6, torch.bfloat16))
    torch.library.opcheck(
        ops.layer_norm_modulate_backward.default,
        (given["branch"].detach(), given["x"].detach(), given["scale"].detach(), 1e-6),
    )
    x, branch, gate, scale, _ = (tensor.detach() for tensor in given.values())
    torch.library.opcheck(
        ops.residual_layer_norm_modulate_backward.default, (x, branch.float(), x, branch, gate, scale, 1e-6)
    )


def test_compiles_without_graph_breaks(device):
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(given):
        return flexvar_ext.residual_layer_norm_modulate(**given)

    for shape in ((2, 3, 8), (4, 5, 12)):
        given = arguments(*shape, device=device)
        for found, expected in zip(compiled(given), flexvar_ext.residual_layer_norm_modulate(**given), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.cuda
def test_devices_agree():
    given = arguments(2, 9, 100)
    on_gpu = gradients(
        flexvar_ext.residual_layer_norm_modulate, {name: tensor.cuda() for name, tensor in given.items()}
    )
    for found, expected in zip(on_gpu, gradients(flexvar_ext.residual_layer_norm_modulate, given), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


# Bad input

X, VECTOR = torch.zeros(2, 3, 4), torch.zeros(2, 1, 4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": X.long()}, TypeError, "x must have dtype .*, got int64"),
        ({"x": X[0]}, ValueError, r"x must have shape \[B, L, C\], got \(3, 4\)"),
        ({"x": X[..., :0]}, ValueError, r"x must have at least one channel, got shape \(2, 3, 0\)"),
        ({"scale": 1.0}, TypeError, "scale must be a torch.Tensor, got float"),
        ({"scale": VECTOR[0, 0]}, ValueError, r"scale must have shape \[B, 1, C\], got \(4,\)"),
        ({"scale": X}, ValueError, r"scale must have shape \[B or 1, 1, C\], got \(2, 3, 4\) for x \(2, 3, 4\)"),
        ({"shift": VECTOR[:1]}, ValueError, r"shift must have the shape of scale, .*\(1, 1, 4\)"),
        ({"shift": VECTOR.to("meta")}, ValueError, "all tensors must be on one device, got .*shift on meta"),
        ({"branch": X[:, :2]}, ValueError, r"branch must have the shape of x, \(2, 3, 4\), got \(2, 2, 4\)"),
        ({"gate": VECTOR[:1]}, ValueError, r"gate must have the shape of scale, .*\(1, 1, 4\)"),
        ({"eps": "small"}, TypeError, "eps must be a number, got str"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1.0"),
        ({"eps": float("nan")}, ValueError, "eps must be finite and not negative, got nan"),
        ({"eps": 10**400}, ValueError, "eps must be finite and not negative, got 1000"),
        ({"x": X.to_sparse()}, TypeError, "x must be a dense tensor, got layout sparse_coo"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float32, .*, got torch.int8"),
    ],
)
def test_bad_input(changed, error, message):
    given = {"x": X, "branch": X, "gate": VECTOR, "scale": VECTOR, "shift": VECTOR} | changed
    with pytest.raises(error, match=f"^residual_layer_norm_modulate: {message}"):
        flexvar_ext.residual_layer_norm_modulate(**given)
    if not {"branch", "gate"} & set(changed):
        del given["branch"], given["gate"]
        with pytest.raises(error, match=f"^layer_norm_modulate: {message}"):
            flexvar_ext.layer_norm_modulate(**given)


def test_bad_arguments_do_not_reach_the_kernel():
    ops = torch.ops.flexvar
    for call in (
        lambda: ops.layer_norm_modulate(X, VECTOR[..., :2], VECTOR, 1e-6, torch.float32),
        lambda: ops.layer_norm_modulate(X, VECTOR, VECTOR, 1e-6, torch.int32),
        lambda: ops.residual_layer_norm_modulate(X, X[:, :2], VECTOR, VECTOR, VECTOR, 1e-6, torch.float32),
        lambda: ops.layer_norm_modulate_backward(X[:1], X, VECTOR, 1e-6),
        lambda: ops.residual_layer_norm_modulate_backward(X, X[:1], X, X, VECTOR, VECTOR, 1e-6),
        lambda: ops.residual_layer_norm_modulate_backward(X, X, X, X, VECTOR[:1], VECTOR, 1e-6),
    ):
        with pytest.raises(RuntimeError, match="must"):
            call()
