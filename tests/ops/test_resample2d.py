"""resample2d: torch.nn.functional.interpolate in every mode and ratio, forward and backward."""

import pytest
import torch
from torch import Tensor

import flexvar_ext
from flexvar_ext import _host, reference
from tests.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, assert_as_accurate_as_torch

MODES = [("nearest", False), ("bilinear", False), ("bilinear", True), ("bicubic", False), ("area", False)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Grids of 1 2 3 7 63 64 65 127 129 255 257 680 681 1704 tokens, none like its neighbour.
GRIDS = [(1, 1), (1, 2), (3, 1), (1, 7), (9, 7), (8, 8), (13, 5), (1, 127), (3, 43), (17, 15), (257, 1), (20, 34)]
GRIDS += [(3, 227), (24, 71)]
INSTRUCTION_SETS = _host.build_info()["cpu_instruction_sets"].split()
INSTRUCTION_SETS = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_host.cpu_isa()) + 1]


def randn(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def gradient(function, x: Tensor, out_gradient: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    (grad,) = torch.autograd.grad(out, leaf, out_gradient.to(out.dtype))
    return out.detach(), grad


def torch_resample2d(x: Tensor, size: tuple[int, int], *, mode: str, antialias: bool = False) -> Tensor:
    """The reference; on the CPU where torch's CUDA kernel refuses, whose shared memory limits the reduction."""
    if not antialias:
        return reference.resample2d(x, size, mode=mode)
    return reference.resample2d(x.cpu(), size, mode=mode, antialias=True).to(x.device)


def assert_accurate(x: Tensor, size: tuple[int, int], **options) -> None:
    out_gradient = randn(*x.shape[:2], *size, seed=1, device=x.device).to(x.dtype)

    def native(x):
        return flexvar_ext.resample2d(x, size, **options)

    def torch_own(x):
        return torch_resample2d(x, size, **options)

    exact, exact_grad = gradient(torch_own, x.double(), out_gradient)
    own, own_grad = gradient(torch_own, x, out_gradient)
    out, grad = gradient(native, x, out_gradient)
    assert_as_accurate_as_torch(out, own, exact, factor=FORWARD_FACTOR)
    assert_as_accurate_as_torch(grad, own_grad, exact_grad, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "antialias"), MODES)
@pytest.mark.parametrize("grid", GRIDS)
def test_as_accurate_as_torch(device, grid, mode, antialias, dtype):
    for size in ((16, 16), (5, 11), (1, 1), (31, 2)):
        assert_accurate(randn(2, 3, *grid, device=device).to(dtype), size, mode=mode, antialias=antialias)


def test_means_of_many_pixels_are_as_accurate_as_torchs(device):
    x = randn(8, 3, 200, 300, device=device)
    exact = x.double().mean((2, 3), keepdim=True)
    error, own = (
        (out - exact).norm() for out in (ops.resample2d(x, (1, 1), mode="area") for ops in (flexvar_ext, reference))
    )
    assert error <= FORWARD_FACTOR * own


@pytest.mark.parametrize(("grid", "size"), [((16, 16), (5, 5)), ((1, 1), (300, 300)), ((7, 9), (30, 31))])
def test_bicubic_keeps_what_is_even_as_well_as_torch(device, grid, size):
    x = torch.full((1, 1, *grid), 100.0, device=device)
    error, own = ((ops.resample2d(x, size, mode="bicubic") - 100).norm() for ops in (flexvar_ext, reference))
    # On CUDA products are contracted into the sums, here as there, and round otherwise than on the CPU.
    assert error <= (1.25 if device.type == "cuda" else 1) * own


@pytest.mark.parametrize("in_size", [1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 17, 33, 64, 100])
@pytest.mark.parametrize(("mode", "antialias"), MODES)
def test_weights_are_torchs(device, mode, antialias, in_size):
    """Every entry of the resampling matrix of one axis, in float64: indices, borders and weights."""
    identity = torch.eye(in_size, dtype=torch.float64, device=device)[None, :, :, None].expand(1, -1, -1, 2)
    for out_size in [1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 23, 32, 129]:
        size = (out_size, 2)
        native = flexvar_ext.resample2d(identity, size, mode=mode, antialias=antialias)
        expected = torch_resample2d(identity, size, mode=mode, antialias=antialias)
        torch.testing.assert_close(native, expected, rtol=0, atol=1e-12)
        across = flexvar_ext.resample2d(identity.transpose(2, 3), (2, out_size), mode=mode, antialias=antialias)
        assert torch.equal(across.transpose(2, 3), native)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_nearest_copies_bits(device, dtype):
    x = randn(3, 5, 13, 9, device=device).to(dtype)
    x[0, 0, 0] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-7, -1e-7, 0, 0, 0])
    for size in ((13, 9), (26, 18), (4, 31), (7, 1)):
        native = flexvar_ext.resample2d(x, size, mode="nearest")
        expected = reference.resample2d(x, size, mode="nearest")
        assert torch.equal(native, expected)
        assert torch.equal(native.signbit(), expected.signbit())


@pytest.mark.parametrize(("mode", "antialias"), MODES)
def test_same_size_is_the_identity(device, mode, antialias):
    x = randn(2, 3, 7, 11, device=device)
    assert torch.equal(flexvar_ext.resample2d(x, (7, 11), mode=mode, antialias=antialias), x)


@pytest.mark.parametrize(("mode", "antialias"), MODES)
def test_constants_stay(device, mode, antialias):
    x = torch.full((1, 2, 10, 6), 3.0, device=device)
    for size in ((23, 5), (3, 40), (1, 1)):
        out = flexvar_ext.resample2d(x, size, mode=mode, antialias=antialias)
        torch.testing.assert_close(out, torch.full_like(out, 3.0), rtol=0, atol=1e-5)


def test_antialiased_column_one_pixel_wide(device):
    """torch 2.13 resizes such a column wrongly on the CPU; the transposed row is right."""
    x = randn(2, 3, 12, 8, device=device).double()
    column = flexvar_ext.resample2d(x, (5, 1), mode="bilinear", antialias=True)
    row = flexvar_ext.resample2d(x.transpose(2, 3), (1, 5), mode="bilinear", antialias=True)
    torch.testing.assert_close(column, row.transpose(2, 3), rtol=0, atol=1e-14)
    torch.testing.assert_close(reference.resample2d(x, (5, 1), mode="bilinear", antialias=True), column)


@pytest.mark.parametrize(("mode", "antialias"), MODES)
@pytest.mark.parametrize(("shape", "size"), [((2, 3, 5, 4), (3, 7)), ((1, 2, 6, 3), (1, 1)), ((1, 17, 1, 2), (4, 5))])
def test_gradients(device, mode, antialias, shape, size):
    x = randn(*shape, device=device).double().requires_grad_()

    def function(x):
        return flexvar_ext.resample2d(x, size, mode=mode, antialias=antialias)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize(("mode", "antialias"), MODES)
def test_layouts(device, mode, antialias):
    x = randn(3, 20, 9, 14, device=device)

    def native(x):
        return flexvar_ext.resample2d(x, (16, 5), mode=mode, antialias=antialias)

    expected = native(x)
    assert expected.is_contiguous()
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    offset = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    for same in (
        strided,
        offset,
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert torch.equal(native(same), expected)
    assert torch.equal(native(x[:1].expand(4, -1, -1, -1)), expected[:1].expand(4, -1, -1, -1))
    leaf = x.clone().requires_grad_()
    native(leaf).sum().backward()  # an expanded gradient
    contiguous = torch.autograd.grad(native(leaf), leaf, torch.ones_like(expected))[0]
    assert torch.equal(leaf.grad, contiguous)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5)])
def test_nothing_to_resample(device, shape):
    x = torch.zeros(shape, device=device, requires_grad=True)
    out = flexvar_ext.resample2d(x, (6, 7), mode="bicubic")
    assert out.shape == (*shape[:2], 6, 7)
    out.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize(("mode", "antialias"), MODES)
def test_repeats_are_bit_equal_and_images_independent(device, mode, antialias):
    x = randn(5, 7, 16, 16, device=device)
    weight = randn(5, 7, 10, 13, seed=1, device=device)

    def both(x, weight):
        return gradient(lambda x: flexvar_ext.resample2d(x, (10, 13), mode=mode, antialias=antialias), x, weight)

    out, grad = both(x, weight)
    for _ in range(250):
        again, grad_again = both(x, weight)
        assert torch.equal(again, out)
        assert torch.equal(grad_again, grad)
    for n in (0, 3, 4):
        alone, grad_alone = both(x[n : n + 1], weight[n : n + 1])
        assert torch.equal(alone[0], out[n])
        assert torch.equal(grad_alone[0], grad[n])


@pytest.mark.parametrize(("mode", "antialias"), MODES)
def test_thread_count_changes_nothing(mode, antialias):
    x, weight = randn(6, 33, 32, 24), randn(6, 33, 40, 30, seed=1)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(
                gradient(lambda x: flexvar_ext.resample2d(x, (40, 30), mode=mode, antialias=antialias), x, weight)
            )
    finally:
        torch.set_num_threads(threads)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_every_instruction_set_is_as_accurate(monkeypatch, instruction_set, dtype):
    monkeypatch.setenv("FLEXVAR_CPU_ISA", instruction_set)
    for mode, antialias in MODES:
        for shape, size in (((2, 3, 16, 16), (23, 7)), ((1, 5, 33, 3), (2, 18)), ((1, 1, 2, 1), (1, 3))):
            assert_accurate(randn(*shape).to(dtype), size, mode=mode, antialias=antialias)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_local(device, value):
    x = randn(1, 2, 16, 16, device=device)
    x[0, 1, 0, 0] = value
    out = flexvar_ext.resample2d(x, (24, 24), mode="bilinear")
    assert out[0, 0].isfinite().all()
    assert not out[0, 1, 0, 0].isfinite()
    assert out[0, 1, 4:].isfinite().all()
    assert out[0, 1, :, 4:].isfinite().all()


@pytest.mark.parametrize(("mode", "antialias"), MODES)
@pytest.mark.parametrize(("shape", "size"), [((2, 3, 5, 7), (9, 4)), ((1, 1, 1, 1), (3, 3))])
def test_opcheck(device, mode, antialias, shape, size):
    x = randn(*shape, device=device).requires_grad_()
    torch.library.opcheck(torch.ops.flexvar.resample2d.default, (x, *size, mode, antialias))
    grad = randn(*shape[:2], *size, device=device).requires_grad_()
    torch.library.opcheck(torch.ops.flexvar.resample2d_backward.default, (grad, *shape[2:], mode, antialias))


def test_compiles_without_graph_breaks(device):
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(x, height, width):
        return flexvar_ext.resample2d(x, (height, width), mode="bicubic")

    for shape, size in (((2, 3, 8, 9), (5, 13)), ((3, 4, 10, 7), (21, 6))):
        x = randn(*shape, device=device).requires_grad_()
        expected = flexvar_ext.resample2d(x, size, mode="bicubic")
        out = compiled(x, *size)
        assert torch.equal(out, expected)
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


def test_autocast_keeps_the_dtype(device):
    for dtype in (torch.float32, torch.float16):
        x = randn(1, 2, 4, 4, device=device).to(dtype)
        expected = flexvar_ext.resample2d(x, (6, 6), mode="bicubic")
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert torch.equal(flexvar_ext.resample2d(x, (6, 6), mode="bicubic"), expected)


@pytest.mark.cuda
def test_devices_agree():
    x = randn(2, 3, 16, 12)
    for mode, antialias in MODES:
        expected = flexvar_ext.resample2d(x, (7, 20), mode=mode, antialias=antialias)
        on_gpu = flexvar_ext.resample2d(x.cuda(), (7, 20), mode=mode, antialias=antialias)
        torch.testing.assert_close(on_gpu.cpu(), expected, rtol=0, atol=1e-5)


X = torch.zeros(1, 2, 4, 4)


@pytest.mark.parametrize(
    ("x", "size", "options", "error", "message"),
    [
        ([1.0], (2, 2), {}, TypeError, "x must be a torch.Tensor, got list"),
        (X[0], (2, 2), {}, ValueError, r"x must have shape \[B, C, H, W\], got \(2, 4, 4\)"),
        (X.long(), (2, 2), {}, TypeError, "x must have dtype float32, .*, got int64"),
        (X[:, :, :0], (2, 2), {}, ValueError, r"x must have at least one pixel, got shape \(1, 2, 0, 4\)"),
        (X, 2, {}, ValueError, r"size must be \(height, width\), got 2"),
        (X, (2, 2, 2), {}, ValueError, r"size must be \(height, width\), got \(2, 2, 2\)"),
        (X, (2.0, 2), {}, TypeError, r"size must hold integers, got \(2.0, 2\)"),
        (X, (0, 2), {}, ValueError, r"size must be positive, got \(0, 2\)"),
        (X, (2, -1), {}, ValueError, r"size must be positive, got \(2, -1\)"),
        (X, (2, 2**31), {}, ValueError, r"size must be below 2\*\*31, got \(2, 2147483648\)"),
        (X, (2, 2), {"mode": "cubic"}, ValueError, "mode must be one of nearest, bilinear, bicubic, area, got 'cubic'"),
        (
            X,
            (2, 2),
            {"mode": "area", "antialias": True},
            ValueError,
            "antialias must go with mode 'bilinear', got mode 'area'",
        ),
        (
            torch.zeros(4, 4, 1, 1),
            (2**30, 2**30),  # 2**64 elements
            {},
            ValueError,
            r"size must make fewer than 2\*\*48 elements, got \(1073741824, 1073741824\)",
        ),
        (X.to_sparse(), (2, 2), {}, TypeError, "x must be a dense tensor, got layout sparse_coo"),
        (X, (2, 2), {"antialias": 1}, TypeError, "antialias must be a bool, got int"),
    ],
)
def test_bad_input(x, size, options, error, message):
    with pytest.raises(error, match="resample2d: " + message):
        flexvar_ext.resample2d(x, size, **{"mode": "bilinear", **options})
    assert flexvar_ext.resample2d(X, (2, 2), mode="area").shape == (1, 2, 2, 2)


def test_bad_arguments_do_not_reach_the_kernel():
    for arguments in ((X[0], 2, 2, "area", False), (X, 0, 2, "area", False), (X.int(), 2, 2, "area", False)):
        with pytest.raises(RuntimeError, match="resample2d: "):
            torch.ops.flexvar.resample2d(*arguments)
    with pytest.raises(RuntimeError, match="resample2d: mode must be one of"):
        torch.ops.flexvar.resample2d(X, 2, 2, "cubic", False)
