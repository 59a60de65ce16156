"""The CUDA launcher of conv3x3, run on the CPU against float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from flexvar.tokenizer.upsampling import fold_nearest
from torch import Tensor

from flexvar_ext import reference

DTYPES = [torch.float16, torch.bfloat16]
RESIZES = ("none", "down", "up")
HALF_ULP = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
MANY = 10**9  # multiprocessors: tiles are made small


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(shape, resize: str, dtype: torch.dtype) -> dict[str, Tensor]:
    batch, channels, out_channels, height, width = shape
    size = {"none": (height, width), "down": (height // 2, width // 2), "up": (2 * height, 2 * width)}[resize]
    return {
        "x": draw(batch, channels, height, width).to(dtype),
        "weight": (draw(out_channels, channels, 3, 3, seed=1) / (9 * channels) ** 0.5).to(dtype),
        "bias": draw(out_channels, seed=2).to(dtype),
        "residual": draw(batch, out_channels, *size, seed=3).to(dtype),
    }


def run(launch, tensors: dict[str, Tensor], resize: str, multiprocessors: int = 1, **options) -> Tensor:
    x, weight, bias, residual, packed = (tensors.get(name) for name in ("x", "weight", "bias", "residual", "packed"))
    (out,) = launch("conv3x3", x, weight, bias, resize, residual, packed, multiprocessors=multiprocessors, **options)
    return out


def pack(launch, tensors: dict[str, Tensor], resize: str, **options) -> Tensor:
    weight, bias = tensors["weight"], tensors.get("bias")
    (packed,) = launch("conv3x3_pack", weight, bias, resize, tensors["x"].dtype, **options)
    return packed


def exact(x: Tensor, weight: Tensor, resize: str, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """In float64, of the weight that the kernel uses: rounded to x's dtype, for ``up`` after folding."""
    bias = None if bias is None else bias.double()
    if resize == "up":
        folded = fold_nearest(weight.float()).to(x.dtype).double()
        out = F.conv_transpose2d(x.double(), folded, bias, stride=2, padding=1)
        return out if residual is None else out + residual.double()
    wide = weight.to(x.dtype).double()
    return reference.conv3x3(
        x.double(), wide, bias, resize=resize, residual=None if residual is None else residual.double()
    )


def assert_exact(out: Tensor, tensors: dict[str, Tensor], resize: str) -> None:
    """Rounded once, after sums whose every addition may lose a unit of fp32 of what went into it."""
    expected = exact(**tensors, resize=resize)
    assert out.shape == expected.shape
    sizes = exact(**{name: tensor.abs() for name, tensor in tensors.items()}, resize=resize)
    depth = 9 * tensors["x"].shape[1]
    summing = (depth / 8 + 3) * 2**-23 * sizes
    smallest = 2**-25 if out.dtype == torch.float16 else 0.0  # half of its smallest subnormal number
    bound = HALF_ULP[out.dtype] * (expected.abs() + summing) + summing + smallest
    assert ((out.double() - expected).abs() <= bound).all()


def check(launch, shape, resize, dtype, *, left_out=(), multiprocessors=1, **options) -> Tensor:
    tensors = {name: tensor for name, tensor in arguments(shape, resize, dtype).items() if name not in left_out}
    out = run(launch, tensors, resize, multiprocessors, **options)
    assert_exact(out, tensors, resize)
    return out


SIZES = [(1, 1), (1, 7), (5, 3), (17, 9)]
RESIZED = [(size, resize) for size in SIZES for resize in RESIZES if resize != "down" or min(size) > 1]
# B, C, N, H, W
CHANNELS = [(2, 3, 16, 5, 3), (2, 8, 3, 5, 3), (1, 20, 100, 5, 3), (1, 64, 130, 3, 5), (1, 130, 64, 3, 2)]


@pytest.mark.parametrize(("size", "resize"), RESIZED)
def test_sizes(launch_in_every_order, size, resize):
    for shape in ((2, 8, 16, *size), (2, 3, 3, *size)):
        check(launch_in_every_order, shape, resize, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("shape", CHANNELS)
def test_channels(launch_in_every_order, shape, resize, dtype):
    check(launch_in_every_order, shape, resize, dtype)


@pytest.mark.parametrize("left_out", [("bias",), ("residual",), ("bias", "residual")])
@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("shape", [(2, 8, 16, 5, 3), (1, 20, 35, 3, 3)])
def test_left_out(launch_in_every_order, shape, resize, left_out):
    check(launch_in_every_order, shape, resize, torch.float16, left_out=left_out)


@pytest.mark.parametrize("resize", RESIZES)
def test_misaligned(launch_in_every_order, resize):
    """Pointers that allow no copies of 16 bytes, for all the numbers of channels do."""
    check(launch_in_every_order, (1, 32, 16, 5, 3), resize, torch.bfloat16, misalignment=1)
    check(launch_in_every_order, (1, 3, 130, 3, 2), resize, torch.float16, misalignment=1)


@pytest.mark.parametrize("resize", RESIZES)
def test_inputs_that_lie_otherwise(launch_in_every_order, resize):
    tensors = arguments((2, 16, 24, 5, 3), resize, torch.bfloat16)
    changed = {
        "x": tensors["x"].transpose(2, 3).contiguous().transpose(2, 3),
        "weight": tensors["weight"].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "bias": tensors["bias"][:, None].expand(24, 2).contiguous()[:, 0],
        "residual": tensors["residual"].to(memory_format=torch.channels_last),
    }
    assert torch.equal(run(launch_in_every_order, changed, resize), run(launch_in_every_order, tensors, resize))
    empty = dict(tensors, x=tensors["x"][:0], residual=tensors["residual"][:0])
    assert run(launch_in_every_order, empty, resize).numel() == 0


@pytest.mark.parametrize("resize", RESIZES)
def test_strides_of_single_rows_do_not_matter(launch_in_every_order, resize):
    """Nor do those of a single image; those of pixels that are a part of others do."""
    tensors = arguments((1, 16, 24, 4, 6), resize, torch.bfloat16)
    channels_last = tensors["x"].contiguous(memory_format=torch.channels_last)
    single_image = channels_last.as_strided(channels_last.shape, (3, *channels_last.stride()[1:]))
    part = torch.cat([channels_last] * 2, dim=3).contiguous(memory_format=torch.channels_last)[..., :6]
    expected = run(launch_in_every_order, tensors, resize)
    for x in (channels_last, single_image, part):
        assert torch.equal(run(launch_in_every_order, {**tensors, "x": x}, resize), expected)
    if resize != "down":
        column = tensors | {
            "x": channels_last[..., :1],
            "residual": tensors["residual"][..., : 2 if resize == "up" else 1],
        }
        assert_exact(run(launch_in_every_order, column, resize), column, resize)


@pytest.mark.parametrize("resize", RESIZES)
def test_float32_weight_and_bias(launch_in_every_order, resize):
    """Taps are summed before they are rounded; the bias is not rounded at all."""
    tensors = arguments((1, 24, 40, 4, 3), resize, torch.bfloat16)
    tensors["weight"] = tensors["weight"].float() + 1e-4 * draw(40, 24, 3, 3, seed=8)
    tensors["bias"] = tensors["bias"].float() + 1e-4 * draw(40, seed=9)
    assert_exact(run(launch_in_every_order, tensors, resize), tensors, resize)


# B, C, N, H, W: more than one tile of rows and of columns, tiles that end inside of an image and behind the last.
@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize(
    ("shape", "multiprocessors", "tile"),
    [
        ((2, 40, 3, 19, 13), 1, "narrow"),
        ((2, 40, 72, 11, 10), MANY, "small"),
        ((2, 40, 64, 11, 10), 1, "small"),
        ((3, 40, 136, 11, 10), 1, "large"),
    ],
)
def test_tiles(emulated, launch_once, shape, multiprocessors, tile, resize):
    batch, channels, out_channels, height, width = shape
    sizes = (batch, channels, height, width, out_channels, RESIZES.index(resize), multiprocessors)
    assert emulated.conv3x3_tile(*sizes, False) == tile
    check(launch_once, shape, resize, torch.float16, multiprocessors=multiprocessors, warpgroups=False)


# One step of 64 channels, and several, whose pixels come in while those before are multiplied; squares of pixels that
# are cut off, a second image, columns beyond the tile's.
@pytest.mark.parametrize("resize", ["none", "up"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "multiprocessors", "tile"),
    [
        ((2, 456, 72, 5, 4), 1, "warpgroup_large"),
        ((1, 456, 72, 3, 18), 1, "warpgroup_large"),
        ((2, 72, 136, 9, 5), 4, "warpgroup"),
        ((1, 136, 68, 3, 17), 2, "warpgroup"),
        ((2, 136, 72, 9, 7), MANY, "warpgroup_small"),
        ((1, 32, 33, 6, 10), 1, "warpgroup_small"),
    ],
)
def test_tiles_of_warpgroups(emulated, launch_once, shape, multiprocessors, tile, dtype, resize):
    batch, channels, out_channels, height, width = shape
    if resize == "up" and tile == "warpgroup":
        multiprocessors *= 4  # for four phases
    sizes = (batch, channels, height, width, out_channels, RESIZES.index(resize), multiprocessors)
    assert emulated.conv3x3_tile(*sizes, True) == tile
    check(launch_once, shape, resize, dtype, multiprocessors=multiprocessors)


@pytest.mark.parametrize("resize", ["none", "up"])
def test_warpgroups_in_every_order(launch_in_every_order, resize):
    check(launch_in_every_order, (1, 136, 40, 4, 9), resize, torch.bfloat16, multiprocessors=MANY)
    check(launch_in_every_order, (1, 72, 65, 4, 9), resize, torch.bfloat16, left_out=["residual"])
    check(launch_in_every_order, (1, 32, 40, 4, 9), resize, torch.bfloat16, misalignment=1)


@pytest.mark.parametrize("warpgroups", [False, True])
@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize(
    ("channels", "dtype"), [((3, 5), torch.float16), ((40, 72), torch.bfloat16), ((72, 136), torch.float16)]
)
def test_a_packed_weight_suits_every_tile(launch_in_every_order, launch_once, channels, dtype, resize, warpgroups):
    launch = partial(launch_once, warpgroups=warpgroups)
    tensors = arguments((2, *channels, 6, 5), resize, dtype)
    tensors["weight"] = tensors["weight"].float()
    packed = pack(launch_in_every_order, tensors, resize, warpgroups=warpgroups)
    unread = {"weight": torch.full_like(tensors["weight"], float("nan")), "bias": torch.zeros_like(tensors["bias"])}
    for multiprocessors in (1, 4, MANY):
        expected = run(launch, tensors, resize, multiprocessors)
        assert_exact(expected, tensors, resize)
        assert torch.equal(run(launch, {**tensors, **unread, "packed": packed}, resize, multiprocessors), expected)


def test_a_weight_packed_otherwise_is_refused(launch_once):
    tensors = arguments((1, 40, 40, 4, 4), "none", torch.bfloat16)
    packed = pack(launch_once, tensors, "none")
    for wrong in (packed[:-8], packed.half(), pack(launch_once, tensors, "up"), packed.repeat(2)[::2]):
        with pytest.raises(RuntimeError, match="packed"):
            run(launch_once, {**tensors, "packed": wrong}, "none")


@pytest.mark.parametrize("warpgroups", [False, True])
@pytest.mark.parametrize("resize", RESIZES)
def test_neither_batch_nor_tile_changes_a_bit(launch_once, resize, warpgroups):
    launch = partial(launch_once, warpgroups=warpgroups)
    tensors = arguments((3, 40, 72, 7, 9), resize, torch.bfloat16)
    together = run(launch, tensors, resize)
    assert torch.equal(run(launch, tensors, resize, MANY), together)
    for i in range(3):
        alone = dict(tensors, x=tensors["x"][i : i + 1], residual=tensors["residual"][i : i + 1])
        assert torch.equal(run(launch, alone, resize), together[i : i + 1])
    few = dict(tensors, weight=tensors["weight"][:36], bias=tensors["bias"][:36], residual=tensors["residual"][:, :36])
    assert torch.equal(run(launch, few, resize), together[:, :36])


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("channels", [5, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_where_they_are_seen(launch_once, value, channels, resize):
    tensors = arguments((2, channels, 12, 5, 6), resize, torch.float16)
    plain = run(launch_once, tensors, resize)
    tensors["x"][1, 2, 3, 2] = value
    out = run(launch_once, tensors, resize)
    seen = (
        reference.conv3x3(
            tensors["x"].double().isfinite().logical_not().double(),
            torch.ones(12, channels, 3, 3).double(),
            resize=resize,
        )
        != 0
    )
    assert not out[seen].isfinite().any()
    assert torch.equal(out[~seen], plain[~seen])


def test_results_beyond_the_range_become_infinite(launch_once):
    tensors = arguments((1, 8, 16, 3, 3), "up", torch.float16)
    tensors["residual"].fill_(6e4)
    tensors["bias"].fill_(6e4)
    assert (run(launch_once, tensors, "up") == float("inf")).all()
