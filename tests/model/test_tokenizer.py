"""The tokenizer beyond its golden values: training, modes, sizes, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from flexvar import MultiScaleTokenizer, ScaleSchedule, TokenizerConfig

from tests.golden.recipe import fill

SMALL = {"codebook_size": 64, "codebook_dim": 8, "z_channels": 32, "base_channels": 32, "num_res_blocks": 1}
CONFIG = TokenizerConfig(**SMALL, channel_multipliers=(1, 2))


@pytest.fixture(scope="module")
def small(backend: str) -> MultiScaleTokenizer:
    return fill(MultiScaleTokenizer(CONFIG, backend=backend))


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("size", [(4, 4), (12, 20)])
@torch.inference_mode()
def test_shapes(levels: int, size: tuple[int, int], backend: str) -> None:
    tokenizer = MultiScaleTokenizer(TokenizerConfig(**SMALL, channel_multipliers=(1,) * levels), backend=backend)
    patch_size = 2 ** (levels - 1)
    assert tokenizer.config.patch_size == patch_size
    images = random_images(2, 3, *size)
    latent = tokenizer.encode(images)
    assert latent.shape == (2, 8, size[0] // patch_size, size[1] // patch_size)
    schedule = ScaleSchedule([1, (2, 3), latent.shape[2:], (40, 9)])
    pyramid = tokenizer.quantize(latent, schedule)
    assert [tuple(indices.shape[1:]) for indices in pyramid] == list(schedule)
    assert all(indices.dtype == torch.int64 for indices in pyramid)
    for indices, (height, width) in zip(pyramid, schedule, strict=True):
        assert tokenizer.decode(indices).shape == (2, 3, height * patch_size, width * patch_size)
    assert [tuple(image.shape[2:]) for image in tokenizer.reconstruct(images, schedule)] == [
        (h * patch_size, w * patch_size) for h, w in schedule
    ]


@torch.inference_mode()
def test_decode_takes_code_vectors(small: MultiScaleTokenizer) -> None:
    (indices,) = small.quantize(small.encode(random_images(2, 3, 8, 12)), ScaleSchedule([(4, 6)]))
    codes = F.normalize(small.codebook[indices], dim=-1).permute(0, 3, 1, 2)
    torch.testing.assert_close(small.decode(codes), small.decode(indices))


@pytest.mark.parametrize("mode", ["area", "bilinear"])
@pytest.mark.parametrize("normalize", [True, False])
def test_straight_through(mode: str, normalize: bool, backend: str) -> None:
    config = TokenizerConfig(**SMALL, channel_multipliers=(1, 2), downsample_mode=mode, normalize_codes=normalize)
    tokenizer = fill(MultiScaleTokenizer(config, backend=backend))
    latent = tokenizer.encode(random_images(2, 3, 16, 24)).detach().requires_grad_()
    sizes = [(8, 12), (3, 5), (1, 1)]
    pyramid = tokenizer.quantize(latent, ScaleSchedule(sizes))
    scales = tokenizer.quantize_straight_through(latent, sizes)
    for size, indices, scale in zip(sizes, pyramid, scales, strict=True):
        assert torch.equal(scale.indices, indices)
        codes = tokenizer.codebook[indices].permute(0, 3, 1, 2)
        resampled = F.interpolate(
            latent, size=size, mode=mode, **({"antialias": True, "align_corners": False} if mode == "bilinear" else {})
        )
        if normalize:
            codes, resampled = F.normalize(codes, dim=1), F.normalize(resampled, dim=1)
        torch.testing.assert_close(scale.codes, codes)
        torch.testing.assert_close(scale.codebook_loss, F.mse_loss(codes, resampled))
        torch.testing.assert_close(scale.commitment_loss, F.mse_loss(codes, resampled))

        # The codes pass their gradient straight to the resampled latent, and none to the codebook.
        weight = torch.randn(codes.shape, generator=torch.Generator().manual_seed(1))
        (actual,) = torch.autograd.grad((scale.codes * weight).sum(), latent, retain_graph=True)
        (expected,) = torch.autograd.grad((resampled * weight).sum(), latent, retain_graph=True)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        # Each loss pulls on one side only.
        for loss, moved, still in (
            (scale.codebook_loss, tokenizer.codebook, latent),
            (scale.commitment_loss, latent, tokenizer.codebook),
        ):
            grad, none = torch.autograd.grad(loss, (moved, still), retain_graph=True, allow_unused=True)
            assert grad is not None
            assert grad.abs().sum() > 0
            assert none is None or not none.any()


def test_every_parameter_learns(backend: str) -> None:
    tokenizer = fill(MultiScaleTokenizer(CONFIG, backend=backend)).train()
    images = random_images(2, 3, 8, 8)
    scales = tokenizer.quantize_straight_through(tokenizer.encode(images), ScaleSchedule([2, 4]))
    loss = sum(tokenizer.decode(s.codes).square().mean() + s.codebook_loss + s.commitment_loss for s in scales)
    loss.backward()
    idle = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    # A key bias adds the same to every logit of a query, which softmax ignores; GroupNorm then removes rounding.
    assert [name for name in idle if not name.endswith(".k.bias")] == []


@torch.inference_mode()
def test_one_image_is_the_same_in_any_batch(small: MultiScaleTokenizer) -> None:
    images = random_images(5, 3, 8, 8)
    schedule = ScaleSchedule([1, 2, 4])
    together = small.quantize(small.encode(images), schedule)
    for row in range(5):
        alone = small.quantize(small.encode(images[row : row + 1]), schedule)
        assert all(torch.equal(a[0], t[row]) for a, t in zip(alone, together, strict=True))


@torch.inference_mode()
def test_small_maps_are_the_same_on_any_number_of_threads() -> None:
    """torch's 1x1 convolution rounds otherwise on two threads than on one."""
    tokenizer = MultiScaleTokenizer(TokenizerConfig()).eval()
    codes = tokenizer.config.codebook_size
    grid = torch.randint(codes, (2, 1, 2), generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = tokenizer.decode(grid)
        torch.set_num_threads(2)
        assert torch.equal(tokenizer.decode(grid), alone)
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def test_empty_batch(small: MultiScaleTokenizer) -> None:
    pyramid = small.quantize(small.encode(torch.zeros(0, 3, 8, 8)), ScaleSchedule([1, 4]))
    assert [tuple(indices.shape) for indices in pyramid] == [(0, 1, 1), (0, 4, 4)]
    assert small.decode(pyramid[-1]).shape == (0, 3, 8, 8)


def test_copies_are_independent(small: MultiScaleTokenizer) -> None:
    clone = copy.deepcopy(small)
    with torch.no_grad():
        clone.codebook.zero_()
    assert small.codebook.any()
    assert clone.backend == small.backend


@torch.no_grad()
def test_casts_follow_the_weights(small: MultiScaleTokenizer) -> None:
    """On either backend, under autocast, whether they are kept or not."""
    tokenizer = copy.deepcopy(small)
    codes = torch.randn(1, 8, 3, 2, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        tokenizer.decode(codes)
    for parameter in tokenizer.parameters():
        parameter.mul_(1.25)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.decode(codes), copy.deepcopy(tokenizer).decode(codes))
        assert not torch.equal(tokenizer.decode(codes), small.decode(codes))


@pytest.mark.cuda
@torch.no_grad()
def test_packed_weights_follow_the_weights(small: MultiScaleTokenizer) -> None:
    tokenizer = copy.deepcopy(small).to("cuda", torch.bfloat16)
    codes = torch.randn(1, 8, 3, 2, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    before = tokenizer.decode(codes)
    assert torch.equal(tokenizer.decode(codes), before)
    for parameter in tokenizer.parameters():
        parameter.mul_(1.25)
    assert torch.equal(tokenizer.decode(codes), copy.deepcopy(tokenizer).decode(codes))
    assert not torch.equal(tokenizer.decode(codes), before)


def test_bad_input(small: MultiScaleTokenizer) -> None:
    schedule = ScaleSchedule([1, 2])
    refused = [
        (lambda: small.encode(torch.zeros(1, 3, 9, 8)), ValueError, r"multiples of 2, got \(1, 3, 9, 8\)"),
        (lambda: small.encode(torch.zeros(1, 3, 0, 8)), ValueError, "positive multiples of 2"),
        (lambda: small.encode(torch.zeros(1, 1, 8, 8)), ValueError, r"images must have shape \[B, 3, H, W\], got"),
        (lambda: small.encode(torch.zeros(3, 8, 8)), ValueError, r"images must have shape \[B, 3, H, W\], got"),
        (lambda: small.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), TypeError, "got a tensor of torch.uint8"),
        (
            lambda: small.encode(torch.zeros(1, 3, 8, 8, dtype=torch.float64)),
            TypeError,
            "weights' dtype, torch.float32",
        ),
        (lambda: small.encode("photo.jpg"), TypeError, "images must be a floating point tensor, got str"),
        (lambda: small.quantize(torch.zeros(1, 9, 4, 4), schedule), ValueError, r"C = codebook_dim = 8, got \(1, 9, 4"),
        (lambda: small.quantize(torch.zeros(1, 8, 4), schedule), ValueError, "latent must have shape"),
        (lambda: small.quantize(torch.zeros(1, 8, 4, 4), [1, 2]), TypeError, "must be a ScaleSchedule, got list"),
        (
            lambda: small.quantize_straight_through(torch.zeros(1, 8, 4, 4), []),
            ValueError,
            "at least one step, got none",
        ),
        (lambda: small.decode(torch.zeros(1, 4, 4, dtype=torch.int32)), TypeError, "got a tensor of torch.int32"),
        (lambda: small.decode(torch.zeros(4, 4, dtype=torch.int64)), ValueError, r"shape \[B, h, w\], got \(4, 4\)"),
        (lambda: small.decode(torch.zeros(1, 9, 4, 4)), ValueError, "codes must have shape"),
        (lambda: MultiScaleTokenizer(CONFIG, backend="gpu"), ValueError, "backend must be .* got 'gpu'"),
        (lambda: MultiScaleTokenizer({}), TypeError, "config must be a TokenizerConfig, got dict"),
    ]
    for call, error, message in refused:
        with pytest.raises(error, match=message):
            call()
        assert small.decode(torch.zeros(1, 1, 1, dtype=torch.int64)).shape == (1, 3, 2, 2)  # the next call works
