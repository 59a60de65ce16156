"""The CUDA kernels of group_norm_silu and its backward, run on the CPU against float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from flexvar_ext import reference

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# (shape [B, C, H, W], groups): one element; nothing in vectors; vectors of channels or of pixels alone; several chunks;
# more vectors of channels than a block has threads; groups that are not vectors.
CASES = [
    ((1, 1, 1, 1), 1),
    ((2, 6, 3, 5), 3),
    ((1, 16, 3, 3), 4),
    ((2, 6, 4, 8), 2),
    ((1, 8, 40, 40), 2),
    ((1, 3, 33, 35), 1),
    ((1, 1056, 2, 2), 32),
    ((2, 24, 4, 4), 8),
]


def array(tensor: Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def tensor(values: np.ndarray) -> Tensor:
    found = torch.from_numpy(values)
    return found.view(torch.bfloat16) if found.dtype == torch.uint16 else found


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(maps: Tensor, channels_last: bool) -> np.ndarray:
    return array((maps.permute(0, 2, 3, 1) if channels_last else maps).contiguous())


def maps_of(found: np.ndarray, channels_last: bool) -> Tensor:
    result = tensor(found)
    return result.permute(0, 3, 1, 2) if channels_last else result


def assert_close(result: Tensor, exact: Tensor) -> None:
    bound = TOLERANCE[result.dtype] * max(1.0, exact.abs().max().item())
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=bound)


def check(emulated, run_in_every_order, shape, groups, dtype, channels_last, silu=True, misalignment=0, mean=0.5):
    x, grad_out = ((draw(*shape, seed=seed) + mean).to(dtype) for seed in (1, 2))
    weight, bias = draw(shape[1], seed=3), draw(shape[1], seed=4)
    x_stored, vectors = stored(x, channels_last), (array(weight), array(bias))
    out, statistics = run_in_every_order(
        emulated.group_norm_silu, x_stored, groups, *vectors, EPS, silu, channels_last, misalignment=misalignment
    )
    gradients = run_in_every_order(
        emulated.group_norm_silu_backward,
        stored(grad_out, channels_last),
        x_stored,
        groups,
        *vectors,
        statistics,
        silu,
        channels_last,
        misalignment=misalignment,
    )
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact = reference.group_norm_silu(leaves[0], groups, *leaves[1:], eps=EPS, silu=silu)
    exact_x, *exact_vectors = torch.autograd.grad(exact, leaves, grad_out.double())
    assert_close(maps_of(out, channels_last), exact.detach())
    assert_close(maps_of(gradients[0], channels_last), exact_x)
    for found, expected in zip(gradients[1:], exact_vectors, strict=True):
        assert_close(tensor(found), expected)


@pytest.mark.parametrize("misalignment", [0, 1])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "groups"), CASES)
def test_shapes(emulated, run_in_every_order, shape, groups, channels_last, misalignment):
    check(emulated, run_in_every_order, shape, groups, torch.float32, channels_last, misalignment=misalignment)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(emulated, run_in_every_order, dtype, channels_last, silu):
    for shape, groups in CASES[1:3] + CASES[7:]:
        check(emulated, run_in_every_order, shape, groups, dtype, channels_last, silu)


@pytest.mark.parametrize("channels_last", [False, True])
def test_mean_far_from_zero(emulated, channels_last):
    x = draw(1, 8, 24, 24, seed=1) * 1e-2 + 100
    weight, bias = draw(8, seed=3), draw(8, seed=4)
    out, _ = emulated.group_norm_silu(
        stored(x, channels_last), 2, array(weight), array(bias), EPS, False, channels_last, emulated.Options()
    )
    exact = reference.group_norm_silu(x.double(), 2, weight.double(), bias.double(), eps=EPS, silu=False)
    assert (maps_of(out, channels_last) - exact).abs().max() < 5e-3  # the rounding of x itself is 4e-4 of its deviation


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_in_their_group(emulated, value, channels_last):
    x = draw(2, 8, 5, 4, seed=1)
    vectors = [array(draw(8, seed=seed)) for seed in (3, 4)]

    def run() -> Tensor:
        return maps_of(
            emulated.group_norm_silu(
                stored(x, channels_last), 2, *vectors, EPS, True, channels_last, emulated.Options()
            )[0],
            channels_last,
        )

    expected = run().clone()
    x[1, 5, 3, 2] = value
    out = run()
    assert out[1, 4:].isnan().all()
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1, :4], expected[1, :4])


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_image_is_the_same_in_any_batch(emulated, channels_last):
    x = draw(3, 8, 20, 20, seed=1)
    vectors = [array(draw(8, seed=seed)) for seed in (3, 4)]

    def run(images: Tensor) -> np.ndarray:
        maps = stored(images, channels_last)
        return emulated.group_norm_silu(maps, 4, *vectors, EPS, True, channels_last, emulated.Options())[0]

    together = run(x)
    for image in range(3):
        assert run(x[image : image + 1]).tobytes() == together[image : image + 1].tobytes()
