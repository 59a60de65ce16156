"""The CUDA launchers of group_norm_silu and its backward, run on the CPU against float64."""

import pytest
import torch
from torch import Tensor

from flexvar_ext import reference

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# (shape [B, C, H, W], groups): one element; nothing in vectors; vectors of channels or of pixels alone; several chunks;
# more vectors of channels than a block has threads; groups that are not vectors; groups that several blocks share, two
# channels at a time. With the channels last, groups that a block holds: of several vectors, of several items a thread.
# What a block does not hold: too many pixels, the last chunk short of rows; too many vectors; three pairs.
CASES = [
    ((1, 1, 1, 1), 1),
    ((2, 6, 3, 5), 3),
    ((1, 16, 3, 3), 4),
    ((2, 6, 4, 8), 2),
    ((1, 8, 40, 40), 2),
    ((1, 3, 33, 35), 1),
    ((1, 1056, 2, 2), 32),
    ((2, 24, 4, 4), 8),
    ((1, 1056, 2, 2), 16),
    ((2, 24, 5, 7), 2),
    ((1, 8, 24, 26), 1),
    ((1, 8, 48, 50), 2),
    ((1, 132, 2, 2), 1),
    ((1, 24, 9, 9), 4),
]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(maps: Tensor, channels_last: bool) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def assert_close(result: Tensor, exact: Tensor) -> None:
    bound = TOLERANCE[result.dtype] * max(1.0, exact.abs().max().item())
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=bound)


def check(launch, x, grad_out, groups, silu=True, **options):
    weight, bias = draw(x.shape[1], seed=3), draw(x.shape[1], seed=4)
    out, statistics = launch("group_norm_silu", x, groups, weight, bias, EPS, silu, x.dtype, **options)
    saved = (x, groups, weight, bias, statistics, silu)
    gradients = launch("group_norm_silu_backward", grad_out, *saved, **options)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact = reference.group_norm_silu(leaves[0], groups, *leaves[1:], eps=EPS, silu=silu)
    for found, expected in zip(
        (out, *gradients), (exact.detach(), *torch.autograd.grad(exact, leaves, grad_out.double())), strict=True
    ):
        assert_close(found, expected)


def maps(shape, dtype, channels_last):
    return [stored((draw(*shape, seed=seed) + 0.5).to(dtype), channels_last) for seed in (1, 2)]


@pytest.mark.parametrize("misalignment", [0, 1])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "groups"), CASES)
def test_shapes(launch_in_every_order, shape, groups, channels_last, misalignment):
    check(launch_in_every_order, *maps(shape, torch.float32, channels_last), groups, misalignment=misalignment)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(launch_in_every_order, dtype, channels_last, silu):
    for shape, groups in CASES[1:3] + CASES[7:10]:
        check(launch_in_every_order, *maps(shape, dtype, channels_last), groups, silu)


def test_inputs_that_lie_otherwise(launch_in_every_order):
    """Gradients in another memory format than x, neither format at all."""
    x, grad = maps((2, 6, 4, 8), torch.float32, False)
    strided = x.mT.contiguous().mT
    for inputs in ((x, stored(grad, True)), (stored(x, True), grad), (strided, grad), (x, grad[:1].expand_as(grad))):
        check(launch_in_every_order, *inputs, 2)


def test_no_image(launch_in_every_order):
    x, vector = torch.empty(0, 6, 4, 8), torch.ones(6)
    out, statistics = launch_in_every_order("group_norm_silu", x, 2, vector, vector, EPS, True, torch.half)
    assert out.shape == x.shape
    saved = (x, 2, vector, vector, statistics, True)
    grad_x, *gradients = launch_in_every_order("group_norm_silu_backward", x, *saved)
    assert grad_x.shape == x.shape
    assert all(torch.equal(gradient, torch.zeros(6)) for gradient in gradients)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_in_another_dtype(launch_in_every_order, dtype):
    x = maps((2, 6, 4, 8), torch.bfloat16, True)[0]
    weight, bias = draw(6, seed=3), draw(6, seed=4)
    out, _ = launch_in_every_order("group_norm_silu", x, 2, weight, bias, EPS, True, dtype)
    assert out.dtype == dtype
    exact = reference.group_norm_silu(x.double(), 2, weight.double(), bias.double(), eps=EPS)
    assert_close(out, exact)


# Where both are of x's dtype they are read as they are, otherwise in float32.
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_weight_and_bias_of_any_dtype(launch_in_every_order, channels_last, bias_dtype, weight_dtype):
    weight, bias = draw(24, seed=3).to(weight_dtype), draw(24, seed=4).to(bias_dtype)
    for dtype in DTYPES:
        x = maps((2, 24, 4, 4), dtype, channels_last)[0]
        out, _ = launch_in_every_order("group_norm_silu", x, 8, weight, bias, EPS, True, dtype)
        expected, _ = launch_in_every_order("group_norm_silu", x, 8, weight.float(), bias.float(), EPS, True, dtype)
        assert torch.equal(out, expected)


def normalised(launch, x, groups, silu):
    """With a weight and a bias drawn for its channels."""
    vectors = (draw(x.shape[1], seed=3), draw(x.shape[1], seed=4))
    return launch("group_norm_silu", x, groups, *vectors, EPS, silu, x.dtype)[0]


# The last one: more pixels of a channel than one thread takes differences from the same number for.
@pytest.mark.parametrize(
    ("shape", "groups", "channels_last"),
    [
        ((1, 8, 24, 24), 2, False),
        ((1, 8, 24, 24), 2, True),
        ((1, 8, 48, 50), 2, True),
        ((1, 255, 92, 92), 3, True),
    ],
)
def test_mean_far_from_zero(launch_once, shape, groups, channels_last):
    x = draw(*shape, seed=1) * 1e-2 + 100
    out = normalised(launch_once, stored(x, channels_last), groups, False)
    weight, bias = draw(shape[1], seed=3), draw(shape[1], seed=4)
    exact = reference.group_norm_silu(x.double(), groups, weight.double(), bias.double(), eps=EPS, silu=False)
    assert (out - exact).abs().max() < 5e-3  # the rounding of x itself is 4e-4 of its deviation


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_in_their_group(launch_once, value, channels_last):
    x = draw(2, 8, 5, 4, seed=1)
    expected = normalised(launch_once, stored(x, channels_last), 2, True)
    x[1, 5, 3, 2] = value
    out = normalised(launch_once, stored(x, channels_last), 2, True)
    assert out[1, 4:].isnan().all()
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1, :4], expected[1, :4])


# The last one: in a batch its blocks write more of the result.
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((3, 8, 20, 20), 4), ((3, 8, 20, 20), 2), ((2, 8, 48, 50), 2), ((2, 129, 33, 34), 3)]
)
def test_an_image_is_the_same_in_any_batch(launch_once, shape, groups, channels_last):
    x = stored(draw(*shape, seed=1), channels_last)
    together = normalised(launch_once, x, groups, True)
    for image in range(shape[0]):
        assert torch.equal(normalised(launch_once, x[image : image + 1], groups, True), together[image : image + 1])
