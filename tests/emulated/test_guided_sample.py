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


@pytest.mark.parametrize("in_shared", [True, False], ids=["shared", "workspace"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocabulary", "top_k", "top_p"),
    [(1, 0, 0.0), (2, 1, 0.5), (33, 7, 0.0), (300, 0, 0.0), (300, 0, 0.9), (1500, 40, 0.9), (1500, 1200, 0.99)],
)
def test_equals_reference(emulated, launch_in_every_order, vocabulary, top_k, top_p, dtype, in_shared):
    logits = random_logits(vocabulary, dtype)
    settings = {"seed": [5, 2**64 - 1], "image_ids": [0, 9], "step": 3}
    expected = reference.guided_sample(logits, top_k=top_k, top_p=top_p, **settings)
    # Without shared memory for them: fewer blocks than rows, each keeps its workspace for several.
    small = {"shared_memory": emulated.guided_sample_static_shared_bytes, "multiprocessors": 1}
    device = {} if in_shared else small
    arguments = (logits, top_k, top_p, torch.tensor([5, -1]), torch.tensor([0, 9]), 3)
    (tokens,) = launch_in_every_order("guided_sample", *arguments, **device)
    assert torch.equal(tokens, expected)


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


def test_more_than_48_kib_of_shared_memory(launch_once):
    """Which a kernel may have only with leave."""
    logits = random_logits(20000, torch.float16)
    expected = reference.guided_sample(logits, top_k=900, top_p=0.9, seed=1, image_ids=[2, 3], step=0)
    arguments = (logits, 900, 0.9, torch.tensor([1, 1]), torch.tensor([2, 3]), 0)
    (tokens,) = launch_once("guided_sample", *arguments)
    assert torch.equal(tokens, expected)


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
