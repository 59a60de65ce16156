"""guided_sample's CUDA launcher, run on the CPU, gives the specification's tokens; so does the arithmetic it shares."""

import numpy as np
import pytest
import torch

from flexvar_ext import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_logits(vocabulary, dtype):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(2, 3, vocabulary, generator=generator)).to(dtype)
    logits[0, 1, ::3] = logits[0, 1, 0].clone()
    logits[1, 0, ::5] = torch.nan
    logits[1, 1, ::2] = -torch.inf
    return logits


def check(launch, logits, top_k, top_p, **options):
    expected = reference.guided_sample(logits, top_k=top_k, top_p=top_p, seed=[5, 2**64 - 1], image_ids=[0, 9], step=3)
    arguments = (logits, top_k, top_p, torch.tensor([5, -1]), torch.tensor([0, 9]), 3)
    (tokens,) = launch("guided_sample", *arguments, **options)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("multiprocessors", [1, 100], ids=["many-rows", "few-rows"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocabulary", "top_k", "top_p"),
    [(1, 0, 0.0), (2, 1, 0.5), (33, 7, 0.0), (300, 0, 0.0), (300, 0, 0.9), (1500, 40, 0.9), (1500, 1200, 0.99)],
)
def test_equals_reference(launch_in_every_order, vocabulary, top_k, top_p, dtype, multiprocessors):
    check(launch_in_every_order, random_logits(vocabulary, dtype), top_k, top_p, multiprocessors=multiprocessors)


@pytest.mark.parametrize("misalignment", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_at_any_address(launch_in_every_order, dtype, misalignment):
    check(launch_in_every_order, random_logits(1037, dtype), 100, 0.9, misalignment=misalignment)


@pytest.mark.parametrize("multiprocessors", [1, 100], ids=["many-rows", "few-rows"])
@pytest.mark.parametrize("top_p", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("top_k", [0, 1, 30, 900])
@pytest.mark.parametrize("dtype", DTYPES)
def test_candidates_of_a_large_vocabulary(launch_once, dtype, top_k, top_p, multiprocessors):
    logits = 3 * torch.randn(2, 4, 8912, generator=torch.Generator().manual_seed(top_k))
    check(launch_once, logits.to(dtype), top_k, top_p, multiprocessors=multiprocessors)


def misleading_rows():
    """Rows of which a sample tells nothing, that of every 17th logit or the first, and rows with crowds at the
    threshold."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 12, 8912, generator=generator)
    sampled = torch.zeros(8912, dtype=torch.bool)
    sampled[torch.arange(512) * 8912 // 512] = True
    noise[:, 0] = torch.where(sampled, noise[:, 0] + 10, noise[:, 0])  # too few are above the pivot
    noise[:, 1] = torch.where(sampled, noise[:, 1] - 10, noise[:, 1])  # too many
    noise[:, 2] = noise[:, 2].round()  # hundreds of ties
    noise[:, 3] = 5 + 1e-6 * noise[:, 3]  # a few neighbouring floats
    noise[:, 4] = torch.where(noise[:, 4] > 2.5, noise[:, 4], -torch.inf)  # fewer than top_k are finite
    noise[:, 5, 7::1000] = torch.inf
    noise[:, 6] = (8 * noise[:, 6]).round() / 8  # bins of more than 32 candidates: one value many times
    noise[:, 7, 5000] = 1000  # all other candidates in few bins
    noise[:, 8] = noise[:, 8].sort(descending=True).values  # one warp has all candidates
    noise[:, 9, :1024] = torch.nan  # the first logits tell nothing
    noise[:, 10, :1024] = -torch.inf
    noise[:, 11, :1024] = 7
    return noise


@pytest.mark.parametrize("multiprocessors", [1, 100], ids=["many-rows", "few-rows"])
@pytest.mark.parametrize(("top_k", "top_p"), [(900, 0.0), (900, 0.95), (200, 0.3), (0, 0.8), (0, 0.0), (5000, 0.9)])
def test_misleading_rows(launch_once, top_k, top_p, multiprocessors):
    check(launch_once, misleading_rows(), top_k, top_p, multiprocessors=multiprocessors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1024, 1032, 2048, 5000, 32768, 32776])
def test_rows_that_a_warp_samples(launch_once, vocabulary, dtype):
    """Twelve rows for one multiprocessor; the longest that a warp takes, and the next one."""
    logits = random_logits(vocabulary, dtype).repeat(1, 2, 1)
    for top_k, top_p in [(100, 0.9), (100, 0.0), (0, 0.5), (1, 0.5)]:
        check(launch_once, logits, top_k, top_p, multiprocessors=1)


@pytest.mark.parametrize(("top_k", "top_p"), [(900, 0.0), (900, 0.95), (0, 0.9)])
@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sorted_rows(launch_once, dtype, descending, top_k, top_p):
    """A warp's candidates lie side by side, whole octets of every lane."""
    logits = 3 * torch.randn(1, 8, 8912, generator=torch.Generator().manual_seed(top_k)).to(dtype)
    logits = logits.sort(descending=descending).values.repeat(2, 1, 1)
    check(launch_once, logits, top_k, top_p, multiprocessors=1)


@pytest.mark.parametrize(("top_k", "top_p"), [(900, 0.0), (900, 0.95), (0, 0.95)])
@pytest.mark.parametrize("shift", [-4, -0.9, 0.9, 4])
@pytest.mark.parametrize(("dtype", "both"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
def test_second_pivot(launch_once, dtype, both, shift, top_k, top_p):
    """A warp's sample, the row's first 1,024 logits, is off by so much that too few or too many are above its pivot; or
    the sample of the second try, units of 16 bytes at equal distances, is off as well."""
    logits = 3 * torch.randn(2, 8, 8912, generator=torch.Generator().manual_seed(top_k))
    logits[..., :1024] += shift
    if both:
        unit = 16 // dtype.itemsize
        begins = torch.arange(1024 // unit) * (8912 // (1024 // unit)) // unit * unit
        begins = begins[begins >= 1024]
        logits[..., (begins[:, None] + torch.arange(unit)).flatten()] += shift
    check(launch_once, logits.to(dtype), top_k, top_p, multiprocessors=1)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("values", [2, 5, 9, 40])
def test_crowded_bins(launch_once, values, top_p):
    """Candidates of a few values each, which one logit far above them puts into one bin: ties at every threshold."""
    generator = torch.Generator().manual_seed(values)
    logits = -100 * torch.ones(2, 4, 1504)
    logits[..., :1500:15] = torch.randint(0, values, (2, 4, 100), generator=generator) / 64
    logits[..., 0] = 10
    for top_k in 20, 60, 90:
        for multiprocessors in 1, 100:
            check(launch_once, logits, top_k, top_p, multiprocessors=multiprocessors)
            check(launch_once, logits - 8 * (logits == 10), top_k, top_p, multiprocessors=multiprocessors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [9215, 9216, 9217, 18432, 18433])
def test_rows_as_long_as_shared_memory_holds(launch_once, vocabulary, dtype):
    """A block of 256 threads holds 9,216 logits, one of 512 threads 18,432."""
    logits = random_logits(vocabulary, dtype)
    for top_k, top_p in [(300, 0.9), (0, 0.0)]:
        check(launch_once, logits, top_k, top_p, multiprocessors=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("top_k", "top_p"), [(300, 0.9), (0, 0.0)])
def test_devices_of_little_shared_memory(launch_once, top_k, top_p, dtype):
    check(launch_once, random_logits(8912, dtype), top_k, top_p, shared_memory=1 << 15)


@pytest.mark.parametrize("misalignment", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_alone(launch_in_every_order, dtype, misalignment):
    """Neither top-k nor top-p; several rows for a block, with NaN and infinities in some."""
    logits = random_logits(1037, dtype)
    logits[0, 2, 5::100] = torch.inf
    logits[1, 2] = -torch.inf
    check(launch_in_every_order, logits, 0, 0.0, misalignment=misalignment, multiprocessors=1)


@pytest.mark.parametrize("misalignment", [0, 1])
@pytest.mark.parametrize("vocabulary", [1500, 1504], ids=["block", "warp"])
def test_candidates_in_every_order(launch_in_every_order, vocabulary, misalignment):
    """Three rows to a block, some of which are bisected before and some after the next one is on its way; or a warp
    to a row, where rows are a multiple of 8 and aligned."""
    logits = 2 * torch.randn(2, 6, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[:, 1, 7] = torch.inf
    logits[:, 3, 7] = 1000  # all other candidates in few bins
    logits[:, 4] = (8 * logits[:, 4]).round() / 8
    check(launch_in_every_order, logits, 100, 0.9, misalignment=misalignment, multiprocessors=1)


@pytest.mark.parametrize(
    "row", [[np.nan] * 3, [-np.inf] * 3, [np.inf, 0.0, np.inf], [0.0, -0.0, 0.0], [1e-45, 0.0, -1e-45]]
)
def test_degenerate_rows(launch_in_every_order, row):
    logits = torch.tensor(row).expand(1, 8, 3)
    for top_k, top_p in [(0, 0.0), (2, 0.0), (0, 0.6)]:
        expected = reference.guided_sample(logits, top_k=top_k, top_p=top_p, seed=1, image_ids=[2], step=0)
        arguments = (logits, top_k, top_p, torch.tensor([1]), torch.tensor([2]), 0)
        (tokens,) = launch_in_every_order("guided_sample", *arguments)
        assert torch.equal(tokens, expected)


def test_rows_longer_than_shared_memory_holds(launch_once):
    logits = random_logits(20000, torch.float16)
    check(launch_once, logits, 900, 0.9)


@pytest.mark.parametrize("misalignment", [0, 1])
def test_inputs_that_lie_otherwise(launch_in_every_order, misalignment):
    logits, seeds = random_logits(70, torch.bfloat16), torch.tensor([7, 0, 8, 0])[::2]
    strided = logits.transpose(0, 1).contiguous().transpose(0, 1)
    expected = reference.guided_sample(logits, top_k=9, top_p=0.0, seed=[7, 8], image_ids=[4, 4], step=1)
    arguments = (strided, 9, 0.0, seeds, torch.tensor([4]).expand(2), 1)
    (tokens,) = launch_in_every_order("guided_sample", *arguments, misalignment=misalignment)
    assert torch.equal(tokens, expected)


def test_weights_for_every_fraction(emulated):
    """All 2**18 fractions of the exponent, and logits over the whole range: the specification's integers."""
    fractions = torch.arange(2**18, dtype=torch.float64) * -(2**-18) / np.log2(np.e)
    x = torch.cat([torch.zeros(1), fractions.float(), -25 * torch.rand(100_000), torch.tensor([-3e38, -torch.inf])])
    expected = reference._integer_weights(x)
    assert np.array_equal(emulated.token_weights(x.numpy(), 0.0), expected.numpy())


def test_philox_equals_the_specification(emulated):
    rng = np.random.default_rng(0)
    for words in rng.integers(0, 2**32, (200, 6)).tolist():
        *counter, key0, key1 = words
        tensors = [torch.tensor(word) for word in words]
        expected = [int(word) for word in reference._philox4x32(tensors[:4], (tensors[4], tensors[5]))]
        assert emulated.philox4x32(counter, key0 + (key1 << 32)) == expected
