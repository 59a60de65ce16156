"""conv3x3: torch.nn.functional.conv2d with 3x3 taps, halving, doubling and a skip connection in one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flexvar_ext
from flexvar_ext import _host, reference
from tests.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, assert_as_accurate_as_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RESIZES = ["none", "down", "up"]
# B, C, N, H, W: tails of tiles, of blocks of channels, of bands and of their rows on every side.
SHAPES = [(1, 1, 1, 2, 2), (2, 3, 5, 7, 9), (1, 5, 3, 3, 2), (2, 33, 17, 2, 5), (1, 40, 70, 17, 33), (2, 64, 3, 4, 4)]
SHAPES += [(1, 128, 130, 20, 16), (1, 32, 16, 65, 70), (1, 256, 48, 33, 31), (3, 31, 31, 16, 16)]
needs_tile_unit = pytest.mark.skipif(_host.cpu_isa() != "amx", reason="this CPU has no tile unit (AMX)")
INSTRUCTION_SETS = _host.build_info()["cpu_instruction_sets"].split()
INSTRUCTION_SETS = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_host.cpu_isa()) + 1]
needs_kernel = pytest.mark.skipif(_host.cpu_isa() == "baseline", reason="this CPU has no AVX2")


def randn(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def arguments(
    shape: tuple[int, ...], resize: str, dtype: torch.dtype = torch.float32, device: object = "cpu"
) -> dict[str, Tensor]:
    batch, channels, out_channels, height, width = shape
    size = {"none": (height, width), "down": (height // 2, width // 2), "up": (2 * height, 2 * width)}[resize]
    return {
        "x": randn(batch, channels, height, width, device=device).to(dtype),
        "weight": (randn(out_channels, channels, 3, 3, seed=1, device=device) / (9 * channels) ** 0.5).to(dtype),
        "bias": randn(out_channels, seed=2, device=device).to(dtype),
        "residual": randn(batch, out_channels, *size, seed=3, device=device).to(dtype),
    }


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def call_op(tensors: dict[str, Tensor], resize: str) -> Tensor:
    return torch.ops.flexvar.conv3x3(
        tensors["x"], tensors["weight"], tensors.get("bias"), resize, tensors.get("residual"), None
    )


def assert_accurate(tensors: dict[str, Tensor], resize: str) -> None:
    assert_as_accurate_as_torch(
        flexvar_ext.conv3x3(**tensors, resize=resize),
        reference.conv3x3(**tensors, resize=resize),
        reference.conv3x3(**doubled(tensors), resize=resize),
        factor=FORWARD_FACTOR,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_torch(device, shape, resize, dtype):
    tensors = arguments(shape, resize, dtype, device)
    assert_accurate(tensors, resize)
    assert_accurate(without(tensors, "bias", "residual"), resize)


@pytest.mark.parametrize("left_out", [(), ("bias",), ("residual",), ("bias", "residual")])
@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_every_combination(device, left_out, resize, dtype):
    assert_accurate(without(arguments((2, 20, 18, 6, 5), resize, dtype, device), *left_out), resize)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_packed_weight_changes_no_bit(device, dtype, resize):
    """In any batch, which other tiles suit. Where there is nothing to pack it is None."""
    for channels, out_channels in ((64, 64), (72, 130), (3, 5)):
        for batch in (1, 40):
            tensors = arguments((batch, channels, out_channels, 9, 20), resize, dtype, device)
            packed = flexvar_ext.conv3x3_pack(tensors["weight"], tensors["bias"], resize=resize, dtype=dtype)
            runs_on_cuda = device.type == "cuda" and flexvar_ext.conv3x3_is_native(
                tensors["x"], resize=resize, out_channels=out_channels
            )
            assert (packed is not None) == runs_on_cuda
            out = flexvar_ext.conv3x3(**tensors, resize=resize, packed=packed)
            assert torch.equal(out, flexvar_ext.conv3x3(**tensors, resize=resize))


@needs_kernel
def test_what_runs_natively(monkeypatch):
    x = randn(1, 2, 3, 4)
    assert flexvar_ext.conv3x3_is_native(x)
    assert flexvar_ext.conv3x3_is_native(x.bfloat16())
    assert not flexvar_ext.conv3x3_is_native(x.half())
    assert not flexvar_ext.conv3x3_is_native(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flexvar_ext.conv3x3_is_native(x.half())
        assert not flexvar_ext.conv3x3_is_native(x.double())
    assert all(flexvar_ext.conv3x3_is_native(x, resize=resize) for resize in RESIZES)
    monkeypatch.setenv("FLEXVAR_CPU_ISA", "baseline")
    assert not flexvar_ext.conv3x3_is_native(x)
    tensors = arguments((1, 3, 4, 5, 6), "up")
    assert torch.equal(flexvar_ext.conv3x3(**tensors, resize="up"), reference.conv3x3(**tensors, resize="up"))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(monkeypatch, dtype, resize, isa):
    monkeypatch.setenv("FLEXVAR_CPU_ISA", isa)
    for shape in [(2, 3, 5, 7, 9), (1, 5, 7, 3, 2), (1, 131, 70, 6, 33), (1, 258, 3, 5, 70), (1, 70, 66, 65, 70)]:
        tensors = arguments(shape, resize, dtype)
        exact = reference.conv3x3(**doubled(tensors), resize=resize)
        expected = reference.conv3x3(**tensors, resize=resize)
        out = call_op(tensors, resize)
        assert_as_accurate_as_torch(out, expected, exact, factor=FORWARD_FACTOR)
        turned = dict(tensors, weight=tensors["weight"].contiguous(memory_format=torch.channels_last))
        assert torch.equal(call_op(turned, resize), out)
        alone = without(tensors, "bias", "residual")
        exact = reference.conv3x3(**doubled(alone), resize=resize)
        expected = reference.conv3x3(**alone, resize=resize)
        assert_as_accurate_as_torch(call_op(alone, resize), expected, exact, factor=FORWARD_FACTOR)


@needs_tile_unit
@pytest.mark.parametrize("resize", RESIZES)
def test_float32_on_tiles_is_more_accurate_than_float32(resize):
    tensors = arguments((1, 256, 64, 16, 16), resize)
    exact = reference.conv3x3(**doubled(tensors), resize=resize)
    error = (flexvar_ext.conv3x3(**tensors, resize=resize) - exact).abs().max()
    assert error < (reference.conv3x3(**tensors, resize=resize) - exact).abs().max()


@pytest.mark.parametrize("channels", [(6, 4), (40, 70)])  # by the definition; by Winograd's way where it keeps its size
@pytest.mark.parametrize("resize", RESIZES)
def test_values_that_are_not_finite_stay_where_they_are_seen(device, resize, channels):
    tensors = arguments((2, *channels, 8, 20), resize, device=device)
    plain = flexvar_ext.conv3x3(**tensors, resize=resize)
    for value in (float("nan"), float("inf"), 3.4e38):
        changed = tensors["x"].clone()
        changed[1, 2, 4, 10] = value
        out = flexvar_ext.conv3x3(**dict(tensors, x=changed), resize=resize)
        expected = reference.conv3x3(**dict(tensors, x=changed), resize=resize)
        # Winograd's error is small against the largest number and tap that an output sees.
        is_large = value == 3.4e38 and channels == (40, 70)
        atol = 1e-7 * expected[expected.isfinite()].abs().max().item() if is_large else 1e-5
        torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-5, atol=atol)
        assert torch.equal(out[0], plain[0])


@needs_kernel
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_winograd_is_the_same_in_any_batch_and_on_any_number_of_threads(dtype, tolerance):
    tensors = without(arguments((3, 130, 64, 37, 70), "none", dtype), "residual")
    tensors["x"][1, 5, 20, 30], tensors["x"][2] = float("inf"), float("nan")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [call_op(dict(tensors, x=image[None]), "none") for image in tensors["x"]]
        torch.set_num_threads(3)
        torch.testing.assert_close(call_op(tensors, "none"), torch.cat(alone), rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(threads)
    expected = reference.conv3x3(**doubled(tensors))
    torch.testing.assert_close(torch.cat(alone).double(), expected, equal_nan=True, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["positive", "mean 100", "pixels of all sizes", "channels of all sizes"])
def test_winograd_of_values_that_are_not_alike(monkeypatch, kind, dtype, isa):
    monkeypatch.setenv("FLEXVAR_CPU_ISA", isa)
    tensors = without(arguments((1, 128, 64, 20, 24), "none"), "bias", "residual")
    x = tensors["x"]
    tensors["x"] = {
        "positive": x.abs(),
        "mean 100": x + 100,
        "pixels of all sizes": x * 10 ** randn(1, 1, 20, 24, seed=4),
        "channels of all sizes": x * 10 ** randn(1, 128, 1, 1, seed=4),
    }[kind]
    if kind == "positive":
        tensors["weight"] = tensors["weight"].abs()
    assert_accurate({name: tensor.to(dtype) for name, tensor in tensors.items()}, "none")


@pytest.mark.parametrize("isa", INSTRUCTION_SETS[1:])  # the first has torch's
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resize", RESIZES)
def test_taps_that_are_not_finite_or_whose_sums_are_not(monkeypatch, resize, dtype, isa):
    monkeypatch.setenv("FLEXVAR_CPU_ISA", isa)
    x, weight = randn(1, 2, 6, 5).to(dtype), randn(3, 2, 3, 3, seed=1).to(dtype)
    x[0, 0, 3, 2] = float("inf")
    weight[0, 0, 1, 1], weight[0, 0, 1, 2] = 1, -2
    weight[1, 1, 0, 0] = float("inf")
    # By the definition: torch's product of bfloat16 leaves out the zeros around the map on some CPUs, which times an
    # infinite tap are NaN.
    expected = reference.conv3x3(x.double(), weight.double(), resize=resize).to(dtype)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    torch.testing.assert_close(flexvar_ext.conv3x3(x, weight, resize=resize), expected, equal_nan=True, **tolerance)
    x, weight = torch.full((1, 1, 6, 6), 1e-10, dtype=dtype), torch.full((1, 1, 3, 3), 3e38, dtype=dtype)
    expected = reference.conv3x3(x, weight, resize=resize)
    torch.testing.assert_close(flexvar_ext.conv3x3(x, weight, resize=resize), expected)


def test_numbers_near_zero(device):
    """Products below the normal range may become zero, as they do in bfloat16 arithmetic."""
    tensors = arguments((1, 8, 4, 6, 6), "none", device=device)
    tensors["x"] *= 1e-38
    out = flexvar_ext.conv3x3(tensors["x"], tensors["weight"])
    exact = reference.conv3x3(tensors["x"].double(), tensors["weight"].double())
    assert (out - exact).abs().max() < 1e-37
    assert_accurate(dict(tensors, x=tensors["x"] * 1e30), "none")


# The kernels of CUDA. The op itself takes every change of resolution there, whoever conv3x3 gives it to.


@pytest.mark.cuda
def test_what_runs_natively_on_cuda():
    x = randn(1, 2, 3, 4, device="cuda")
    for resize in RESIZES:
        for dtype in (torch.float16, torch.bfloat16):
            assert flexvar_ext.conv3x3_is_native(x.to(dtype), resize=resize) == (resize == "up")
            with torch.autocast("cuda", dtype=dtype):
                assert flexvar_ext.conv3x3_is_native(x, resize=resize) == (resize == "up")
                assert not flexvar_ext.conv3x3_is_native(x.double(), resize=resize)
        assert not flexvar_ext.conv3x3_is_native(x, resize=resize)
        assert not flexvar_ext.conv3x3_is_native(x.double(), resize=resize)


@pytest.mark.cuda
def test_what_runs_natively_on_hopper():
    """Where there are products of warpgroups, wide maps that keep their resolution do."""
    is_hopper = torch.cuda.get_device_capability() == (9, 0) and "90a" in _host.build_info()["cuda_architectures"]
    x = randn(1, 64, 3, 4, device="cuda").half()
    assert flexvar_ext.conv3x3_is_native(x) == is_hopper
    assert flexvar_ext.conv3x3_is_native(x, out_channels=64) == is_hopper
    assert not flexvar_ext.conv3x3_is_native(x, out_channels=3)
    assert not flexvar_ext.conv3x3_is_native(x.repeat(1, 8, 1, 1))
    assert not flexvar_ext.conv3x3_is_native(x, resize="down")
    assert not flexvar_ext.conv3x3_is_native(x[:, 1:])
    assert not flexvar_ext.conv3x3_is_native(x.float())


# Tiles of every kind: few output channels, many of a small and of a large map.
CUDA_SHAPES = [*SHAPES, (1, 512, 512, 16, 16), (2, 128, 128, 128, 128), (1, 128, 3, 256, 256)]
CUDA_SHAPES += [(9, 200, 136, 33, 50), (3, 72, 264, 61, 67), (1, 64, 64, 9, 130)]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("shape", CUDA_SHAPES)
def test_cuda_kernels_are_as_accurate_as_torch(shape, resize, dtype):
    tensors = arguments(shape, resize, dtype, "cuda")
    exact = reference.conv3x3(**doubled(tensors), resize=resize)
    expected = reference.conv3x3(**tensors, resize=resize)
    assert_as_accurate_as_torch(call_op(tensors, resize), expected, exact, factor=FORWARD_FACTOR)
    wide = dict(tensors, weight=tensors["weight"].float(), bias=tensors["bias"].float())
    assert torch.equal(call_op(wide, resize), call_op(tensors, resize))


@pytest.mark.cuda
@pytest.mark.parametrize("resize", RESIZES)
def test_cuda_results_are_the_same_in_any_batch_and_every_time(resize):
    tensors = arguments((9, 136, 136, 32, 48), resize, torch.bfloat16, "cuda")
    together = call_op(tensors, resize)
    for _ in range(20):
        assert torch.equal(call_op(tensors, resize), together)
    for i in range(9):
        alone = dict(tensors, x=tensors["x"][i : i + 1], residual=tensors["residual"][i : i + 1])
        assert torch.equal(call_op(alone, resize), together[i : i + 1])


@pytest.mark.cuda
@torch.no_grad()
def test_cuda_graphs_and_streams():
    tensors = arguments((2, 64, 96, 24, 20), "up", torch.float16, "cuda")
    expected = call_op(tensors, "up")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(call_op(tensors, "up"), expected)
    torch.cuda.current_stream().wait_stream(stream)
    x = tensors["x"].clone()
    with torch.cuda.graph(graph):
        out = call_op(dict(tensors, x=x), "up")
    x.zero_()
    graph.replay()
    assert torch.equal(out, call_op(dict(tensors, x=torch.zeros_like(x)), "up"))
    x.copy_(tensors["x"])
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.cuda
@torch.no_grad()
def test_compiles_on_cuda():
    @torch.compile(fullgraph=True)
    def compiled(tensors):
        return flexvar_ext.conv3x3(**tensors, resize="up")

    tensors = arguments((2, 16, 24, 9, 5), "up", torch.bfloat16, "cuda")
    assert torch.equal(compiled(tensors), flexvar_ext.conv3x3(**tensors, resize="up"))


@pytest.mark.cuda
@pytest.mark.parametrize("left_out", [(), ("bias",), ("residual",)])
@pytest.mark.parametrize("resize", RESIZES)
def test_opcheck_on_cuda(left_out, resize):
    given = without(arguments((2, 3, 4, 5, 6), resize, torch.bfloat16, "cuda"), *left_out)
    torch.library.opcheck(
        torch.ops.flexvar.conv3x3.default,
        (given["x"], given["weight"], given.get("bias"), resize, given.get("residual"), None),
    )


@pytest.mark.cuda
def test_more_than_2_31_elements():
    needed = 2 * (2**29 + 2**31) + 2**31
    if torch.cuda.get_device_properties(0).total_memory < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory")
    x = torch.randn(9, 1024, 1024, 64, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
    weight = torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.bfloat16) / 24
    out = flexvar_ext.conv3x3(x, weight, resize="up")
    assert torch.equal(out[8:], flexvar_ext.conv3x3(x[8:], weight, resize="up"))


@pytest.mark.cuda
@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.zeros(1, 3, 4, 6)},
        {"weight": torch.zeros(5, 3, 3, 3, dtype=torch.bfloat16)},
        {"bias": torch.zeros(5, dtype=torch.bfloat16)},
        {"bias": torch.zeros(4)},
        {"residual": torch.zeros(2, 5, 4, 6)},
    ],
)
def test_bad_arguments_do_not_reach_the_cuda_kernel(changed):
    tensors = {"x": torch.zeros(2, 3, 4, 6).half(), "weight": torch.zeros(5, 3, 3, 3).half(), **changed}
    with pytest.raises(RuntimeError, match="conv3x3: "):
        call_op({name: tensor.cuda() for name, tensor in tensors.items()}, "none")


# Determinism


@needs_kernel
@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 70, 50, 20, 90), (3, 140, 3, 20, 90), (3, 70, 130, 4, 5)])
def test_thread_count_and_batch_change_nothing(shape, resize, dtype):
    tensors = arguments(shape, resize, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(flexvar_ext.conv3x3(**tensors, resize=resize))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    for i in range(3):
        alone = dict(tensors, x=tensors["x"][i : i + 1], residual=tensors["residual"][i : i + 1])
        assert torch.equal(flexvar_ext.conv3x3(**alone, resize=resize), results[0][i : i + 1])


def test_repeats_are_bit_equal(device):
    tensors = arguments((1, 40, 20, 9, 17), "up", device=device)
    expected = flexvar_ext.conv3x3(**tensors, resize="up")
    for _ in range(250):
        assert torch.equal(flexvar_ext.conv3x3(**tensors, resize="up"), expected)


# dtypes, layouts, degenerate sizes


@pytest.mark.parametrize("resize", RESIZES)
def test_float32_weight_with_16_bit_pixels(device, resize):
    tensors = arguments((1, 40, 20, 9, 17), resize, torch.bfloat16, device)
    tensors["weight"] = tensors["weight"].float() + 1e-4 * randn(20, 40, 3, 3, seed=9, device=device)
    assert_accurate(tensors, resize)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("resize", RESIZES)
def test_autocast(device, resize, dtype):
    tensors = arguments((1, 40, 20, 8, 18), resize, device=device)
    exact = reference.conv3x3(**doubled(tensors), resize=resize)
    tensors["residual"] = tensors["residual"].to(dtype)
    with torch.autocast(device.type, dtype=dtype):
        out = flexvar_ext.conv3x3(**tensors, resize=resize)
        expected = reference.conv3x3(**tensors, resize=resize)
    assert out.dtype == expected.dtype == dtype
    assert (out - exact).abs().max() <= 2 * (expected - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resize", RESIZES)
def test_layouts(device, resize, dtype):
    tensors = arguments((2, 24, 10, 6, 8), resize, dtype, device)
    expected = flexvar_ext.conv3x3(**tensors, resize=resize)
    tolerance = max(1e-4, 16 * torch.finfo(dtype).eps)  # torch takes another algorithm for another layout
    if flexvar_ext.conv3x3_is_native(tensors["x"], resize=resize):
        assert expected.is_contiguous(memory_format=torch.channels_last)
        tolerance = 1e-5
    for name, tensor in tensors.items():
        strided = torch.stack([tensor, -tensor], dim=-1)[..., 0]
        offset = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
        turned = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        same = [strided, offset, turned]
        if tensor.dim() == 4:
            same.append(tensor.contiguous(memory_format=torch.channels_last))
        for other in same:
            out = flexvar_ext.conv3x3(**dict(tensors, **{name: other}), resize=resize)
            torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_nothing_to_do(device):
    weight = torch.ones(5, 4, 3, 3, device=device)
    assert flexvar_ext.conv3x3(torch.ones(0, 4, 6, 6, device=device), weight, resize="up").shape == (0, 5, 12, 12)


# Gradients, tracing


@pytest.mark.parametrize("resize", RESIZES)
def test_gradients_are_torchs(monkeypatch, device, resize):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # each is computed twice
    tensors = {
        name: tensor.requires_grad_() for name, tensor in arguments((2, 3, 4, 5, 4), resize, device=device).items()
    }
    out = flexvar_ext.conv3x3(**tensors, resize=resize)
    expected = reference.conv3x3(**tensors, resize=resize)
    assert torch.equal(out, expected)
    grads, expected_grads = (torch.autograd.grad(y.square().sum(), list(tensors.values())) for y in (out, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_as_accurate_as_torch(grad, expected_grad, expected_grad.double(), factor=GRADIENT_FACTOR)


@needs_kernel
@pytest.mark.parametrize("left_out", [(), ("bias",), ("residual",)])
@pytest.mark.parametrize("resize", RESIZES)
def test_opcheck(left_out, resize):
    given = without(arguments((2, 3, 4, 5, 6), resize), *left_out)
    torch.library.opcheck(
        torch.ops.flexvar.conv3x3.default,
        (given["x"], given["weight"], given.get("bias"), resize, given.get("residual"), None),
    )


@torch.no_grad()
def test_compiles_without_graph_breaks(device):
    @torch.compile(fullgraph=True)
    def compiled(tensors):
        return flexvar_ext.conv3x3(**tensors, resize="up")

    tensors = arguments((2, 3, 8, 9, 5), "up", device=device)
    torch.testing.assert_close(compiled(tensors), flexvar_ext.conv3x3(**tensors, resize="up"), rtol=1e-5, atol=1e-5)


# Bad input

X, WEIGHT = torch.zeros(2, 3, 4, 6), torch.zeros(5, 3, 3, 3)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": X[0]}, ValueError, r"x must have shape \[B, C, H, W\], got \(3, 4, 6\)"),
        ({"x": X.long()}, TypeError, "x must have dtype float32, .*, got int64"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must have dtype torch.float32 or float32, got torch.float16"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must have shape \[N, C, 3, 3\], got \(3, 3, 3\)"),
        ({"weight": WEIGHT[..., :1]}, ValueError, r"weight must have shape .* got \(5, 3, 3, 1\)"),
        ({"x": X[:, :2]}, ValueError, r"weight must have shape .* C = 2 >= 1, got \(5, 3, 3, 3\)"),
        ({"x": X[:, :0], "weight": WEIGHT[:, :0]}, ValueError, r"weight must have shape .* C = 0 >= 1"),
        ({"weight": WEIGHT[:0]}, ValueError, r"weight must have shape .* with N >= 1 .* got \(0, 3, 3, 3\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[N\] with N = 5, got \(4,\)"),
        ({"residual": X}, ValueError, r"residual must have the result's shape \(2, 5, 4, 6\), got \(2, 3, 4, 6\)"),
        (
            {"residual": torch.zeros(2, 5, 4, 6).half()},
            TypeError,
            "residual must have the result's dtype torch.float32, got torch.float16",
        ),
        ({"resize": "double"}, ValueError, "resize must be one of none, down, up, got 'double'"),
        ({"x": X[:, :, :1], "resize": "down"}, ValueError, "x must have at least 2 x 2 pixels"),
        ({"x": X[:, :, :0]}, ValueError, "x must have at least 1 x 1 pixels"),
        ({"bias": torch.zeros(5, device="meta")}, ValueError, "all tensors must be on one device"),
        (
            {"packed": torch.zeros(9).half()},
            TypeError,
            "packed must be .* torch.float32 on cpu, got 1 dimensions of torch.float16",
        ),
        ({"packed": torch.zeros(3, 3)}, ValueError, "packed must be .* got 2 dimensions of torch.float32 on cpu"),
        ({"packed": [0.0]}, TypeError, "packed must be what conv3x3_pack made .* got list"),
    ],
)
def test_bad_input(changed, error, message):
    with pytest.raises(error, match="conv3x3: " + message):
        flexvar_ext.conv3x3(**{"x": X, "weight": WEIGHT, **changed})


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"weight": [1.0]}, TypeError, "weight must be a torch.Tensor, got list"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must have shape \[N, C, 3, 3\], got \(3, 3, 3\)"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must have dtype torch.float32 or float32, got torch.float16"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[N\] with N = 5, got \(4,\)"),
        ({"resize": "double"}, ValueError, "resize must be one of none, down, up, got 'double'"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float32, float16, bfloat16 or float64, got torch.int8"),
    ],
)
def test_bad_input_to_pack(changed, error, message):
    with pytest.raises(error, match="conv3x3_pack: " + message):
        flexvar_ext.conv3x3_pack(**{"weight": WEIGHT, "dtype": torch.float32, **changed})


@needs_kernel
@pytest.mark.parametrize(
    "call",
    [
        (X[0], WEIGHT, None, "none", None),
        (X[:, :2], WEIGHT, None, "none", None),
        (X, WEIGHT[..., :1], None, "none", None),
        (X.half(), WEIGHT.half(), None, "none", None),
        (X, WEIGHT.bfloat16(), None, "none", None),
        (X, WEIGHT, torch.zeros(4), "none", None),
        (X, WEIGHT, None, "double", None),
        (X, WEIGHT, None, "none", X),
        (X[:, :, :1], WEIGHT, None, "down", None),
    ],
)
def test_bad_arguments_do_not_reach_the_kernel(call):
    with pytest.raises(RuntimeError, match="conv3x3: "):
        torch.ops.flexvar.conv3x3(*call, None)
