"""guided_sample's CUDA kernel, run on the CPU, gives the specification's tokens; so does the arithmetic it shares."""

import numpy as np
import pytest
import torch

from flexvar_ext import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def as_numpy(x):
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def random_logits(vocabulary, dtype):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(2, 2, vocabulary, generator=generator)).to(dtype)
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
def test_equals_reference(emulated, run_in_every_order, vocabulary, top_k, top_p, dtype, in_shared):
    logits = random_logits(vocabulary, dtype)
    settings = {"seed": [5, 2**64 - 1], "image_ids": [0, 9], "step": 3}
    expected = reference.guided_sample(logits, top_k=top_k, top_p=top_p, **settings)
    kernel = getattr(emulated, f"guided_sample_{str(dtype).removeprefix('torch.')}")
    blocks = 4 if in_shared else 3  # fewer blocks than rows: each keeps its workspace for several
    seeds, images = np.array([5, -1]), np.array([0, 9])
    (tokens,) = run_in_every_order(kernel, as_numpy(logits), seeds, images, top_k, top_p, 3, in_shared, blocks)
    assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "row", [[np.nan] * 3, [-np.inf] * 3, [np.inf, 0.0, np.inf], [0.0, -0.0, 0.0], [1e-45, 0.0, -1e-45]]
)
def test_degenerate_rows(emulated, run_in_every_order, row):
    logits = torch.tensor(row).expand(1, 8, 3).contiguous()
    for top_k, top_p in [(0, 0.0), (2, 0.0), (0, 0.6)]:
        expected = reference.guided_sample(logits, top_k=top_k, top_p=top_p, seed=1, image_ids=[2], step=0)
        one = np.array([1])
        (tokens,) = run_in_every_order(
            emulated.guided_sample_float32, logits.numpy(), one, 2 * one, top_k, top_p, 0, True, 8
        )
        assert tokens.tolist() == expected.tolist()


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
