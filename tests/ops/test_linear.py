"""linear: torch.nn.functional.linear, GELU, gate and residual in one; rows that depend on nothing but themselves."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import flexvar_ext
from flexvar_ext import _host, reference
from tests.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, assert_as_accurate_as_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Tokens, K, N: tails of vectors, tiles, blocks and passes on every side.
SHAPES = [(1, 1, 1), (2, 31, 7), (3, 33, 8), (7, 64, 65), (63, 100, 257), (64, 32, 255), (65, 768, 9), (127, 1024, 24)]
SHAPES += [(129, 1025, 63), (145, 1537, 17), (257, 4096, 300), (681, 96, 520), (1704, 80, 40)]
INSTRUCTION_SETS = _host.build_info()["cpu_instruction_sets"].split()
INSTRUCTION_SETS = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_host.cpu_isa()) + 1]


def randn(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def arguments(
    batch: int, tokens: int, depth: int, columns: int, dtype: torch.dtype = torch.float32, device: object = "cpu"
) -> dict[str, Tensor]:
    return {
        "x": randn(batch, tokens, depth, device=device).to(dtype),
        "weight": (randn(columns, depth, seed=1, device=device) / depth**0.5).to(dtype),
        "bias": randn(columns, seed=2, device=device).to(dtype),
        "gate": randn(batch, 1, columns, seed=3, device=device).to(dtype),
        "residual": randn(batch, tokens, columns, seed=4, device=device).to(dtype),
    }


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def assert_same(out: Tensor, expected: Tensor) -> None:
    """To the bit, but on CUDA: there the product is torch's, with another kernel for another layout or shape."""
    if not out.is_cuda:
        assert torch.equal(out, expected)
    tolerance = 16 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def assert_accurate(tensors: dict[str, Tensor], **options: str) -> None:
    assert_as_accurate_as_torch(
        flexvar_ext.linear(**tensors, **options),
        reference.linear(**tensors, **options),
        reference.linear(**doubled(tensors), **options),
        factor=FORWARD_FACTOR,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "depth", "columns"), SHAPES)
def test_as_accurate_as_torch(device, tokens, depth, columns, dtype):
    tensors = arguments(2, tokens, depth, columns, dtype, device)
    assert_accurate(tensors, activation="gelu_tanh")
    assert_accurate(without(tensors, "bias", "gate", "residual"))


@pytest.mark.parametrize("left_out", [(), ("bias",), ("gate",), ("residual",), ("bias", "gate", "residual")])
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_every_combination(device, left_out, activation, dtype):
    assert_accurate(without(arguments(3, 5, 70, 50, dtype, device), *left_out), activation=activation)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_is_as_accurate(monkeypatch, instruction_set, dtype):
    monkeypatch.setenv("FLEXVAR_CPU_ISA", instruction_set)
    for tokens, depth, columns in SHAPES[:-2]:
        tensors = arguments(1, tokens, depth, columns, dtype)
        assert_accurate(tensors, activation="gelu_tanh")
        tensors["weight"] = tensors["weight"].float()
        assert_accurate(tensors)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 1700])
def test_gelu_in_the_product_is_as_accurate_as_behind_it(rows, dtype):
    tensors = without(arguments(1, rows, 1024, 4096, dtype, "cuda"), "gate", "residual")
    exact = reference.linear(**doubled(tensors), activation="gelu_tanh")
    error, own = (
        (ops.linear(**tensors, activation="gelu_tanh") - exact).norm().item() for ops in (flexvar_ext, reference)
    )
    assert error <= 1.1 * own


@pytest.mark.parametrize(
    ("rows", "depth", "columns", "is_few"),
    [
        (1, 32, 8, True), (50, 1024, 3072, True), (51, 1024, 3072, False), (33, 1536, 8, True), (34, 1536, 8, False),
        (32, 4096, 1024, True), (33, 4096, 1024, False), (21, 6144, 8, True), (22, 6144, 8, False), (2, 6400, 8, True),
        (2, 6432, 8, False), (2, 48, 8, False), (2, 64, 12, False),
    ],
)  # fmt: skip
def test_which_products_are_of_few_rows(monkeypatch, rows, depth, columns, is_few):
    module = sys.modules["flexvar_ext.linear"]
    monkeypatch.setattr(module, "has_warpgroup_products", lambda device: True)
    x, weight = torch.empty(1, rows, depth), torch.empty(columns, depth)
    assert module._are_few_rows(x, weight) == is_few
    monkeypatch.setattr(module, "has_warpgroup_products", lambda device: False)
    assert not module._are_few_rows(x, weight)


def test_gelu_over_its_whole_range():
    x = torch.cat([torch.linspace(-30, 30, 100_001), torch.tensor([0.0, -0.0, 1e-30, 1e30, -1e30, 3e38, -3e38])])[
        :, None
    ]
    native = flexvar_ext.linear(x, torch.ones(1, 1), activation="gelu_tanh")
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(native.double(), exact, rtol=1e-5, atol=1e-7)
    infinite = flexvar_ext.linear(
        torch.tensor([[float("inf")], [-float("inf")]]), torch.ones(1, 1), activation="gelu_tanh"
    )
    assert infinite[0] == float("inf")
    assert infinite[1].isnan()  # as torch's: infinity times 0


def test_values_that_are_not_finite_stay_in_their_row(device):
    x, weight = randn(5, 40, device=device), randn(9, 40, seed=1, device=device)
    expected = flexvar_ext.linear(x, weight, activation="gelu_tanh")
    for value in (float("nan"), float("inf")):
        changed = x.clone()
        changed[3, 7] = value
        out = flexvar_ext.linear(changed, weight, activation="gelu_tanh")
        assert not out[3].isfinite().all()
        assert torch.equal(out[[0, 1, 2, 4]], expected[[0, 1, 2, 4]])
    assert out.device == x.device


# Rows depend on nothing but themselves


@pytest.mark.parametrize(("depth", "columns"), [(32, 1024), (1024, 72), (4096, 40), (100, 13), (1025, 300)])
@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32)], ids=str)
def test_rows_are_the_same_in_any_batch(dtypes, depth, columns):
    x_dtype, weight_dtype = dtypes
    whole = arguments(1, 700, depth, columns, x_dtype)
    whole["weight"] = whole["weight"].to(weight_dtype)
    expected = flexvar_ext.linear(**whole, activation="gelu_tanh")
    for begin, end in [(i, i + 1) for i in (0, 1, 2, 143, 350, 699)] + [(0, 2), (5, 8), (690, 700), (3, 148), (1, 700)]:
        part = dict(whole, x=whole["x"][:, begin:end], residual=whole["residual"][:, begin:end])
        assert torch.equal(flexvar_ext.linear(**part, activation="gelu_tanh"), expected[:, begin:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_rows_gives_the_same_rows(dtype):
    x, weight = randn(700, 48).to(dtype), randn(20, 48, seed=1).to(dtype)
    expected = flexvar_ext.linear(x, weight)
    for rows in range(1, 700):
        assert torch.equal(flexvar_ext.linear(x[:rows], weight), expected[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1, 1024, 1024), (2, 90, 1024, 520), (1, 300, 2000, 40)])
def test_thread_count_changes_nothing(dtype, shape):
    tensors = arguments(*shape, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(flexvar_ext.linear(**tensors, activation="gelu_tanh"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_repeats_are_bit_equal(device):
    tensors = arguments(2, 65, 200, 130, device=device)
    expected = flexvar_ext.linear(**tensors)
    for _ in range(250):
        assert torch.equal(flexvar_ext.linear(**tensors), expected)


# dtypes, layouts, degenerate sizes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_weight_with_16_bit_tokens(device, dtype):
    tensors = arguments(2, 20, 600, 50, dtype, device)
    tensors["weight"] = tensors["weight"].float() + 1e-4 * randn(50, 600, seed=9, device=device)
    assert_accurate(tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(device, dtype):
    tensors = arguments(2, 20, 600, 50, device=device)
    with torch.autocast(device.type, dtype=dtype):
        plain = flexvar_ext.linear(tensors["x"], tensors["weight"], tensors["bias"])
        assert plain.dtype == dtype
        whole = flexvar_ext.linear(**tensors, activation="gelu_tanh")
        expected = reference.linear(**tensors, activation="gelu_tanh")
    assert whole.dtype == expected.dtype == torch.float32  # the residual's
    exact = reference.linear(**doubled(tensors), activation="gelu_tanh")
    assert (whole - exact).abs().max() <= 2 * (expected - exact).abs().max()


def test_the_residual_gives_the_dtype(device):
    tensors = arguments(2, 3, 40, 5, torch.bfloat16, device)
    tensors["residual"] = tensors["residual"].float()
    out = flexvar_ext.linear(**tensors)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, reference.linear(**tensors), rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(device, dtype):
    tensors = arguments(3, 20, 90, 14, dtype, device)
    expected = flexvar_ext.linear(**tensors)
    assert expected.is_contiguous()
    for name, tensor in tensors.items():
        strided = torch.stack([tensor, -tensor], dim=-1)[..., 0]
        offset = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
        turned = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        for same in (strided, offset, turned):
            assert_same(flexvar_ext.linear(**dict(tensors, **{name: same})), expected)
    x = tensors["x"]
    repeated = flexvar_ext.linear(x[:1].expand(4, -1, -1), tensors["weight"])
    assert_same(repeated, flexvar_ext.linear(x[:1], tensors["weight"]).expand(4, -1, -1))


def test_any_rank(device):
    x, weight, bias = randn(2, 3, 4, 10, device=device), randn(6, 10, device=device), randn(6, device=device)
    expected = flexvar_ext.linear(x, weight, bias)
    assert expected.shape == (2, 3, 4, 6)
    assert_same(flexvar_ext.linear(x.flatten(0, 2), weight, bias), expected.flatten(0, 2))
    assert_same(flexvar_ext.linear(x[0, 0, 0], weight, bias), expected[0, 0, 0])


def test_the_op_itself_refuses_a_residual_of_another_shape_and_as_many_elements():
    x, weight, residual = randn(3, 4), randn(5, 4), randn(5, 3)
    with pytest.raises(RuntimeError, match="residual must have the shape of the result"):
        torch.ops.flexvar.linear(x, weight, None, "none", None, residual)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)])
def test_nothing_to_multiply(device, shape):
    gate, residual = torch.zeros(shape[0], 1, 7, device=device), torch.zeros(*shape[:2], 7, device=device)
    x, weight = torch.zeros(shape, device=device), torch.zeros(7, 5, device=device)
    assert flexvar_ext.linear(x, weight, gate=gate, residual=residual).shape == (*shape[:2], 7)
    assert flexvar_ext.linear(torch.ones(2, 5, device=device), weight[:0]).shape == (2, 0)
    three = torch.ones(2, 3, 5, device=device)
    assert flexvar_ext.linear(three, weight[:0], gate=torch.ones(2, 1, 0, device=device)).shape == (2, 3, 0)


# Gradients, tracing


@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
def test_gradients_are_torchs(device, activation):
    tensors = {name: tensor.requires_grad_() for name, tensor in arguments(2, 3, 8, 5, device=device).items()}
    out = flexvar_ext.linear(**tensors, activation=activation)
    expected = reference.linear(**tensors, activation=activation)
    assert torch.equal(out, expected)
    grads, expected_grads = (torch.autograd.grad(y.square().sum(), list(tensors.values())) for y in (out, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_as_accurate_as_torch(grad, expected_grad, expected_grad.double(), factor=GRADIENT_FACTOR)
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors.values()]

    def function(x, weight, bias, gate, residual):
        return flexvar_ext.linear(x, weight, bias, activation=activation, gate=gate, residual=residual)

    assert torch.autograd.gradcheck(function, doubles)


@pytest.mark.parametrize("left_out", [(), ("bias",), ("gate",), ("residual",)])
@pytest.mark.parametrize("shape", [(2, 3, 8, 5), (1, 1, 1, 1)])
def test_opcheck(left_out, shape):
    given = without(arguments(*shape), *left_out)
    torch.library.opcheck(
        torch.ops.flexvar.linear.default,
        (given["x"], given["weight"], given.get("bias"), "gelu_tanh", given.get("gate"), given.get("residual")),
    )


@torch.no_grad()
def test_compiles_without_graph_breaks(device):
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(tensors):
        return flexvar_ext.linear(**tensors, activation="gelu_tanh")

    for shape in ((2, 3, 8, 9), (4, 5, 10, 7)):
        tensors = arguments(*shape, device=device)
        torch.testing.assert_close(compiled(tensors), flexvar_ext.linear(**tensors, activation="gelu_tanh"))


# Bad input

X, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor, got float"),
        ({"weight": WEIGHT.long()}, TypeError, "weight must have dtype float32, .*, got torch.int64"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must have dtype torch.float32 or float32, got torch.float16"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must have shape \[N, K\] with K >= 1, got \(4,\)"),
        ({"x": X[..., :0], "weight": WEIGHT[:, :0]}, ValueError, r"weight must have shape .* got \(5, 0\)"),
        ({"x": X[..., :3]}, ValueError, r"x must have shape \[..., K\] with K = 4, got \(2, 3, 3\)"),
        ({"x": X[0, 0, 0]}, ValueError, r"x must have shape \[..., K\] with K = 4, got \(\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[N\] with N = 5, got \(4,\)"),
        ({"gate": torch.zeros(2, 3, 5)}, ValueError, r"gate must have shape \[B, 1, N\] with N = 5 .*got \(2, 3, 5\)"),
        ({"x": X[0], "gate": torch.zeros(2, 1, 5)}, ValueError, r"gate must have .* for x \(3, 4\)"),
        (
            {"residual": torch.zeros(3, 5)},
            ValueError,
            r"residual must have the result's shape \(2, 3, 5\), got \(3, 5\)",
        ),
        ({"weight": WEIGHT.to_sparse()}, TypeError, "weight must be a dense tensor, got layout sparse_coo"),
        ({"activation": "gelu"}, ValueError, "activation must be one of none, gelu_tanh, got 'gelu'"),
        ({"bias": torch.zeros(5, device="meta")}, ValueError, "all tensors must be on one device"),
    ],
)
def test_bad_input(changed, error, message):
    with pytest.raises(error, match="linear: " + message):
        flexvar_ext.linear(**{"x": X, "weight": WEIGHT, **changed})


@pytest.mark.parametrize(
    "call",
    [
        (X, WEIGHT[0], None, "none", None, None),
        (X[..., :3], WEIGHT, None, "none", None, None),
        (X.half(), WEIGHT.bfloat16(), None, "none", None, None),
        (X, WEIGHT, torch.zeros(4), "none", None, None),
        (X, WEIGHT, None, "gelu", None, None),
        (X, WEIGHT, None, "none", torch.zeros(4, 1, 5), None),
        (X, WEIGHT, None, "none", None, torch.zeros(3, 5)),
        (X[..., :0], WEIGHT[:, :0], None, "none", None, None),
    ],
)
def test_bad_arguments_do_not_reach_the_kernel(call):
    with pytest.raises(RuntimeError, match="linear: "):
        torch.ops.flexvar.linear(*call)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_long_sums_of_few_rows_are_as_accurate_as_torchs(monkeypatch, instruction_set):
    monkeypatch.setenv("FLEXVAR_CPU_ISA", instruction_set)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.rand(rows, 1024, generator=generator) for rows in (5, 200))
    exact = x.double() @ weight.double().T
    error, own = ((ops.linear(x, weight) - exact).norm() for ops in (flexvar_ext, reference))
    assert error <= FORWARD_FACTOR * own
