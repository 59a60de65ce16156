"""group_norm_silu: both memory formats, images that depend on nothing but themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flexvar_ext
from flexvar_ext import _host, reference
from tests.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, assert_as_accurate_as_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]
# (shape [B, C, H, W], groups): one element a group, odd sides, groups of one channel, one group, channels that are no
# vector, several chunks of a channel and of an image.
CASES = [
    ((2, 4, 1, 1), 2),
    ((1, 6, 1, 1), 6),
    ((2, 6, 3, 5), 3),
    ((3, 7, 5, 1), 7),
    ((2, 31, 9, 7), 1),
    ((1, 65, 16, 17), 13),
    ((2, 96, 8, 8), 32),
    ((1, 48, 31, 33), 16),
    ((2, 8, 70, 71), 4),
    ((1, 512, 16, 16), 32),
    ((1, 2, 1, 9000), 1),
    ((1, 40000, 1, 2), 8),
]
INSTRUCTION_SETS = _host.build_info()["cpu_instruction_sets"].split()
INSTRUCTION_SETS = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_host.cpu_isa()) + 1]


def randn(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def arguments(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, Tensor]:
    given = {
        "x": (randn(*shape, device=device) * 2 + 0.5).contiguous(memory_format=memory_format),
        "weight": randn(shape[1], seed=1, device=device),
        "bias": randn(shape[1], seed=2, device=device),
    }
    return {name: tensor.to(dtype) for name, tensor in given.items()}


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def torch_in_its_dtype(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *, silu: bool = True) -> Tensor:
    """What the reference rounds once rounded after every step."""
    out = torch.group_norm(x, num_groups, weight, bias, 1e-6)
    return F.silu(out) if silu else out


def gradients(function, given: dict[str, Tensor], groups: int, **options) -> list[Tensor]:
    """The result of the function, then the gradients of a weighted sum of it."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
    out = function(leaves["x"], groups, leaves["weight"], leaves["bias"], **options)
    weights = randn(*out.shape, seed=5, device=out.device).bfloat16().to(out.dtype)  # the same numbers in every dtype
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), weights)]


def assert_accurate(given: dict[str, Tensor], groups: int, **options) -> None:
    """Result and gradients."""
    native = gradients(flexvar_ext.group_norm_silu, given, groups, **options)
    own = gradients(torch_in_its_dtype, given, groups, **options)
    exact = gradients(reference.group_norm_silu, doubled(given), groups, **options)
    for index, results in enumerate(zip(native, own, exact, strict=True)):
        assert_as_accurate_as_torch(*results, factor=FORWARD_FACTOR if index == 0 else GRADIENT_FACTOR)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("shape", "groups"), CASES)
def test_as_accurate_as_torch(device, shape, groups, memory_format, dtype):
    given = arguments(shape, dtype, device, memory_format=memory_format)
    assert_accurate(given, groups)
    assert_accurate(given, groups, silu=False)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_is_as_accurate(monkeypatch, instruction_set, memory_format, dtype):
    monkeypatch.setenv("FLEXVAR_CPU_ISA", instruction_set)
    for shape, groups in CASES:
        assert_accurate(arguments(shape, dtype, memory_format=memory_format), groups)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_large_and_small_values_of_silu(device, memory_format):
    x = torch.linspace(-1, 1, 4 * 33 * 31, device=device).view(1, 4, 33, 31).contiguous(memory_format=memory_format)
    for factor in (1.0, 10.0, 80.0, 1e3, 1e30):
        weight, bias = torch.full((4,), factor, device=device), torch.zeros(4, device=device)
        out = flexvar_ext.group_norm_silu(x, 1, weight, bias)
        exact = reference.group_norm_silu(x.double(), 1, weight.double(), bias.double())
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=5e-7 * factor)
        assert not out[x * factor < -100].any()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("size", [(24, 24), (90, 90)])
def test_mean_far_from_zero(device, size, memory_format):
    given = arguments((1, 8, *size), device=device, memory_format=memory_format)
    given["x"] = given["x"] * 1e-2 + 100
    out = flexvar_ext.group_norm_silu(given["x"], 2, given["weight"], given["bias"], silu=False)
    wide = doubled(given)
    error = out - reference.group_norm_silu(wide["x"], 2, wide["weight"], wide["bias"], silu=False)
    assert error.abs().max() < 5e-3  # the rounding of x itself is 2e-4 of its deviation
    same = torch.full_like(given["x"], 3.25)  # no variance at all
    out = flexvar_ext.group_norm_silu(same, 2, given["weight"], given["bias"], silu=False)
    assert torch.equal(out, given["bias"][:, None, None].expand_as(same))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_outliers_do_not_swallow_the_variance(device, memory_format):
    for place in (0, 1, 700, 9215):
        given = arguments((1, 4, 96, 96), device=device, memory_format=memory_format)
        given["x"][0, 1, place // 96, place % 96] = 3e4
        given["x"][0, 2, 0] += 3e4  # the elements from which differences are taken
        out = flexvar_ext.group_norm_silu(given["x"], 2, given["weight"], given["bias"])
        wide = doubled(given)
        exact = reference.group_norm_silu(wide["x"], 2, wide["weight"], wide["bias"])
        assert (out - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_in_their_group(device, memory_format, value):
    given = arguments((2, 8, 5, 4), device=device, memory_format=memory_format)
    expected = flexvar_ext.group_norm_silu(given["x"], 2, given["weight"], given["bias"])
    given["x"][1, 5, 3, 2] = value
    out = flexvar_ext.group_norm_silu(given["x"], 2, given["weight"], given["bias"])
    assert out[1, 4:].isnan().all()
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1, :4], expected[1, :4])


# dtypes


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_mixed_dtypes(device, x_dtype, other, memory_format):
    given = arguments((2, 20, 9, 7), other, device, memory_format=memory_format)
    given["x"] = given["x"].to(x_dtype)
    native = gradients(flexvar_ext.group_norm_silu, given, 5)
    exact = gradients(reference.group_norm_silu, doubled(given), 5)
    assert [t.dtype for t in native] == [x_dtype, x_dtype, other, other]
    for found, expected in zip(native, exact, strict=True):
        # Sums over bfloat16 maps in float32: SiLU's exponential is as exact as such maps need.
        eps = max(torch.finfo(found.dtype).eps, torch.finfo(x_dtype).eps / 64 if x_dtype == torch.bfloat16 else 0)
        assert (found - expected).abs().max() <= 2 * eps * expected.abs().max() + 1e-5


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_what_the_next_layer_reads(device, dtype, x_dtype, memory_format):
    given = arguments((2, 20, 9, 7), device=device, memory_format=memory_format)
    given["x"] = given["x"].to(x_dtype)
    with torch.autocast(device.type, dtype=dtype):
        out = flexvar_ext.group_norm_silu(given["x"], 5, given["weight"], given["bias"])
        expected = reference.group_norm_silu(given["x"], 5, given["weight"], given["bias"])
        grads = gradients(flexvar_ext.group_norm_silu, given, 5)
    assert out.dtype == expected.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    wide = flexvar_ext.group_norm_silu(given["x"].float(), 5, given["weight"], given["bias"])
    torch.testing.assert_close(out, wide.to(dtype), rtol=0 if x_dtype != dtype else torch.finfo(dtype).eps, atol=1e-7)
    torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert [grad.dtype for grad in grads[1:]] == [x_dtype, torch.float32, torch.float32]


# Images depend on nothing but themselves


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((3, 32, 40, 41), 8), ((3, 6, 5, 5), 3), ((4, 8, 90, 90), 4), ((3, 64, 16, 15), 2), ((12, 64, 80, 80), 32)],
)
def test_images_are_the_same_in_any_batch(device, shape, groups, memory_format, dtype):
    given = arguments(shape, dtype, device, memory_format=memory_format)
    x = given["x"].requires_grad_()
    weights = randn(*shape, seed=7, device=device).to(dtype).contiguous(memory_format=memory_format)
    out = flexvar_ext.group_norm_silu(x, groups, given["weight"], given["bias"])
    (grad,) = torch.autograd.grad(out, x, weights)
    for image in range(shape[0]):
        part = x.detach()[image : image + 1].clone(memory_format=memory_format).requires_grad_()
        alone = flexvar_ext.group_norm_silu(part, groups, given["weight"], given["bias"])
        (grad_alone,) = torch.autograd.grad(alone, part, weights[image : image + 1])
        assert torch.equal(alone, out[image : image + 1])
        assert torch.equal(grad_alone, grad[image : image + 1])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("shape", "groups"), [((2, 32, 60, 61), 8), ((1, 12, 100, 101), 3), ((5, 4, 64, 64), 1)])
def test_thread_count_changes_nothing(shape, groups, memory_format):
    given = arguments(shape, memory_format=memory_format)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(gradients(flexvar_ext.group_norm_silu, given, groups))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_repeats_are_bit_equal(device, memory_format):
    given = arguments((2, 16, 40, 40), device=device, memory_format=memory_format)
    expected = gradients(flexvar_ext.group_norm_silu, given, 4)
    for _ in range(250):
        repeated = gradients(flexvar_ext.group_norm_silu, given, 4)
        assert all(torch.equal(a, b) for a, b in zip(repeated, expected, strict=True))


# Layouts, degenerate sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("channels", [6, 16])
def test_layouts(device, channels, memory_format, dtype):
    given = arguments((3, channels, 5, 8), dtype, device, memory_format=memory_format)
    expected = gradients(flexvar_ext.group_norm_silu, given, 2)
    x = given["x"]
    among_others = torch.cat([x] * 3, dim=1)[:, channels : 2 * channels]
    offset = torch.empty(x.numel() + 1, dtype=dtype, device=device)[1:].as_strided(x.shape, x.stride(), 1).copy_(x)
    every_other = torch.stack([x, -x], dim=-1)[..., 0]
    turned = x.transpose(2, 3).contiguous(memory_format=memory_format).transpose(2, 3)
    for same in (among_others, offset, every_other, turned):
        found = gradients(flexvar_ext.group_norm_silu, dict(given, x=same), 2)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    for name in ("weight", "bias"):
        strided = torch.stack([given[name], -given[name]], dim=-1)[..., 0]
        found = gradients(flexvar_ext.group_norm_silu, dict(given, **{name: strided}), 2)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_result_has_the_memory_format(device, memory_format):
    given = arguments((2, 6, 4, 5), device=device, memory_format=memory_format)
    for x in (given["x"], torch.cat([given["x"]] * 2, dim=1)[:, 6:]):
        out, grad_x, *_ = gradients(flexvar_ext.group_norm_silu, dict(given, x=x), 3)
        for t in (out, grad_x):
            assert t.is_contiguous(memory_format=memory_format)


def test_expanded_maps(device):
    given = arguments((1, 6, 4, 5), device=device)
    out = flexvar_ext.group_norm_silu(given["x"].expand(3, -1, -1, -1), 3, given["weight"], given["bias"])
    expected = flexvar_ext.group_norm_silu(given["x"], 3, given["weight"], given["bias"])
    assert torch.equal(out, expected.expand(3, -1, -1, -1))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradients_that_are_not_contiguous(device, memory_format):
    given = arguments((2, 6, 4, 5), device=device, memory_format=memory_format)
    x = given["x"].requires_grad_()
    out = flexvar_ext.group_norm_silu(x, 3, given["weight"], given["bias"])
    weights = randn(5, 4, 6, 2, seed=7, device=device).permute(3, 2, 1, 0)
    (turned,) = torch.autograd.grad(out, x, weights, retain_graph=True)
    (straight,) = torch.autograd.grad(out, x, weights.contiguous(), retain_graph=True)
    assert torch.equal(turned, straight)
    (expanded,) = torch.autograd.grad(out.sum(), x)
    assert expanded.abs().max() < 10


@pytest.mark.parametrize("shape", [(0, 6, 3, 5), (2, 6, 0, 5), (2, 6, 3, 0)])
def test_no_pixels(device, shape):
    given = arguments(shape, device=device)
    out, *grads = gradients(flexvar_ext.group_norm_silu, given, 3)
    assert out.shape == shape
    for grad, tensor in zip(grads, given.values(), strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()


# Gradients, tracing


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("shape", "groups"), [((2, 4, 3, 2), 2), ((1, 6, 1, 2), 1), ((2, 3, 2, 3), 3)])
def test_gradients_in_double(device, shape, groups, memory_format, silu):
    given = doubled(arguments(shape, device=device, memory_format=memory_format))
    x, weight, bias = (tensor.requires_grad_() for tensor in given.values())
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: flexvar_ext.group_norm_silu(x, groups, weight, bias, silu=silu), (x, weight, bias)
    )


@pytest.mark.parametrize("function", [flexvar_ext.group_norm_silu, reference.group_norm_silu])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradients_of_weights_alone_in_double(memory_format, function):
    """torch's own crash on channels-last maps."""
    x, weight, bias = doubled(arguments((2, 6, 3, 5), memory_format=memory_format)).values()
    expected = gradients(torch_in_its_dtype, {"x": x.contiguous(), "weight": weight, "bias": bias}, 3)
    leaves = [weight.requires_grad_(), bias.requires_grad_()]
    out = function(x, 3, weight, bias)
    weights = randn(*out.shape, seed=5).bfloat16().double()
    assert out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close([out.detach(), *torch.autograd.grad(out, leaves, weights)], [expected[0], *expected[2:]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("shape", "groups"), [((2, 6, 3, 5), 3), ((1, 1, 1, 1), 1), ((2, 4, 1, 1), 2)])
def test_opcheck(shape, groups, memory_format, dtype):
    given = arguments(shape, dtype, memory_format=memory_format)
    grad_out = randn(*shape, seed=7).to(dtype)
    for x in (given["x"], torch.cat([given["x"]] * 2, dim=1)[:, : shape[1]]):
        weight, bias = given["weight"], given["bias"]
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        for result in DTYPES:
            torch.library.opcheck(
                torch.ops.flexvar.group_norm_silu.default, (leaves[0], groups, *leaves[1:], 1e-6, True, result)
            )
        _, statistics = torch.ops.flexvar.group_norm_silu(x, groups, weight, bias, 1e-6, True, dtype)
        torch.library.opcheck(
            torch.ops.flexvar.group_norm_silu_backward.default, (grad_out, x, groups, weight, bias, statistics, True)
        )


@pytest.mark.parametrize("memory_format", FORMATS)
def test_compiles_without_graph_breaks(device, memory_format):
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(x, weight, bias):
        return flexvar_ext.group_norm_silu(x, 3, weight, bias)

    for shape in ((2, 6, 4, 5), (3, 6, 7, 8)):
        given = arguments(shape, device=device, memory_format=memory_format)
        found = compiled(**given)
        assert found.is_contiguous(memory_format=memory_format)
        expected = flexvar_ext.group_norm_silu(given["x"], 3, given["weight"], given["bias"])
        torch.testing.assert_close(found, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("memory_format", FORMATS)
def test_devices_agree(memory_format):
    given = arguments((2, 32, 20, 21), memory_format=memory_format)
    on_gpu = gradients(flexvar_ext.group_norm_silu, {name: t.cuda() for name, t in given.items()}, 8)
    for found, expected in zip(on_gpu, gradients(flexvar_ext.group_norm_silu, given, 8), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
def test_more_than_2_31_elements():
    needed = 3 * 2 * (2**31 + 2**28)
    if torch.cuda.get_device_properties(0).total_memory < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory")
    x = torch.randn(9, 64, 2048, 2048, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.rand(64, device="cuda"), torch.rand(64, device="cuda")
    out = flexvar_ext.group_norm_silu(x, 32, weight, bias)
    assert torch.equal(out[8:], flexvar_ext.group_norm_silu(x[8:].clone(), 32, weight, bias))


# Bad input

X, VECTOR = torch.zeros(2, 4, 3, 3), torch.zeros(4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": X.long()}, TypeError, "x must have dtype .*, got int64"),
        ({"x": X[0]}, ValueError, r"x must have shape \[B, C, H, W\], got \(4, 3, 3\)"),
        ({"x": X[:, :0]}, ValueError, r"x must have at least one channel, got shape \(2, 0, 3, 3\)"),
        ({"num_groups": 2.0}, TypeError, "num_groups must be an integer, got 2.0"),
        ({"num_groups": 0}, ValueError, r"num_groups must be in \[1, 2\*\*31\), got 0"),
        ({"num_groups": 3}, ValueError, "num_groups must divide the channels of x, 4, got 3"),
        ({"weight": 1.0}, TypeError, "weight must be a torch.Tensor, got float"),
        ({"weight": VECTOR[:3]}, ValueError, r"weight must have shape \[C\] with C = 4, got \(3,\)"),
        ({"weight": VECTOR[None]}, ValueError, r"weight must have shape \[C\], got \(1, 4\)"),
        ({"bias": VECTOR.long()}, TypeError, "bias must have dtype .*, got int64"),
        ({"bias": VECTOR.to("meta")}, ValueError, "all tensors must be on one device, got .*bias on meta"),
        ({"eps": "small"}, TypeError, "eps must be a number, got str"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1.0"),
        ({"eps": float("nan")}, ValueError, "eps must be finite and not negative, got nan"),
        ({"eps": 10**400}, ValueError, "eps must be finite and not negative, got 1000"),
        ({"x": X.to_sparse()}, TypeError, "x must be a dense tensor, got layout sparse_coo"),
        ({"silu": 1}, TypeError, "silu must be a bool, got int"),
    ],
)
def test_bad_input(changed, error, message):
    given = {"x": X, "num_groups": 2, "weight": VECTOR, "bias": VECTOR} | changed
    with pytest.raises(error, match=f"^group_norm_silu: {message}"):
        flexvar_ext.group_norm_silu(**given)


def test_bad_arguments_do_not_reach_the_kernel():
    ops = torch.ops.flexvar
    statistics = torch.zeros(2, 2, 2)
    for call in (
        lambda: ops.group_norm_silu(X, 3, VECTOR, VECTOR, 1e-6, True, torch.float32),
        lambda: ops.group_norm_silu(X, 2, VECTOR[:3], VECTOR, 1e-6, True, torch.float32),
        lambda: ops.group_norm_silu(X[0], 2, VECTOR, VECTOR, 1e-6, True, torch.float32),
        lambda: ops.group_norm_silu(X, 2, VECTOR, VECTOR, 1e-6, True, torch.int32),
        lambda: ops.group_norm_silu_backward(X[:1], X, 2, VECTOR, VECTOR, statistics, True),
        lambda: ops.group_norm_silu_backward(X, X, 2, VECTOR, VECTOR, statistics[:1], True),
        lambda: ops.group_norm_silu_backward(X, X, 2, VECTOR, VECTOR, statistics.double(), True),
    ):
        with pytest.raises(RuntimeError, match=r"must|unexpected dtype"):
            call()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_squares_beyond_the_range_of_float32_give_the_bias(memory_format):
    x = (1e20 * randn(1, 32, 16, 16)).contiguous(memory_format=memory_format)
    bias = randn(32, seed=1)
    out = flexvar_ext.group_norm_silu(x, 32, torch.ones(32), bias, silu=False)
    assert torch.equal(out, bias[:, None, None].expand_as(out))
