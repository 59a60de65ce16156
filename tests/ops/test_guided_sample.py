"""guided_sample: exact supports, the right distribution, the same draw everywhere."""

import math

import numpy as np
import pytest
import torch

import flexvar_ext
from flexvar_ext import guided_sample, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEEDS, IMAGES = [5, 2**64 - 1], [0, 9]


@pytest.fixture(autouse=True)
def one_thread():
    """The reference's many small operations wait for each other's threads; those of the native op are tested."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_logits(*shape, scale=3.0, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype).to(device)


def draws(row, number, **settings):
    """Independent draws from one row, as [number]: 1000 positions of many images."""
    images = math.ceil(number / 1000)
    logits = row.expand(images, 1000, -1)
    tokens = guided_sample(logits, seed=11, image_ids=range(images), step=2, **settings)
    return tokens.flatten()[:number]


def chi_square_p_value(counts, probabilities):
    """Of the hypothesis that ``counts`` were drawn from ``probabilities``; rare tokens are pooled."""
    number = counts.sum()
    order = np.argsort(-probabilities)
    counts, expected = counts[order], probabilities[order] * number
    common = int((expected >= 10).sum())
    assert common > 1
    counts = np.append(counts[:common], counts[common:].sum())
    expected = np.append(expected[:common], expected[common:].sum())
    if expected[-1] < 10:
        counts, expected = counts[:-1], expected[:-1]
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = len(counts) - 1
    # Wilson and Hilferty's normal approximation of the chi-square distribution
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))


def support_by_definition(row, top_k, top_p):
    """The kept tokens, from the definition and float64 masses. Give it a top_p away from every cumulative mass."""
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    order = order[: top_k or len(row)]
    mass = np.exp(np.array([row[token] for token in order]) - row[order[0]])
    before = (np.cumsum(mass) - mass) / mass.sum()
    return {token for token, share in zip(order, before, strict=True) if top_p == 0 or share < top_p}


# --- Against the specification ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 15, 16, 17, 33, 257, 1000, 8912])
def test_native_equals_reference(vocabulary, dtype, device):
    for case, scale in enumerate([0.1, 3.0, 30.0]):
        logits = random_logits(2, 3, vocabulary, scale=scale, dtype=dtype, seed=case)
        logits[0, 0, ::3] = logits[0, 0, 0].clone()  # ties
        logits[1, 1, ::5] = torch.nan
        logits[1, 2, ::4] = -torch.inf
        logits[0, 2, :2] = torch.tensor([0.0, -0.0])[:vocabulary]
        logits = logits.to(device)
        few = vocabulary >= 1000
        for top_k in {0, 900} if few else {0, 1, 2, 7, vocabulary // 2, vocabulary - 1, vocabulary, vocabulary + 5}:
            for top_p in (0.0, 0.95) if few else (0.0, 5e-324, 0.3, 0.95, 1 - 2**-53, 1.0):
                settings = {"top_k": top_k, "top_p": top_p, "seed": SEEDS, "image_ids": IMAGES, "step": case}
                assert torch.equal(guided_sample(logits, **settings), reference.guided_sample(logits, **settings))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype, monkeypatch):
    logits = random_logits(2, 4, 1237, dtype=dtype)
    settings = {"top_k": 200, "top_p": 0.9, "seed": 3, "image_ids": IMAGES, "step": 1}
    expected = reference.guided_sample(logits, **settings)
    monkeypatch.setenv("FLEXVAR_CPU_ISA", isa)
    try:
        result = guided_sample(logits, **settings)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert torch.equal(result, expected)


def test_every_half_is_ordered_rightly(device):
    """All 65,536 float16 (and bfloat16) values in one row each: kept are the k largest, NaN nowhere."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        row = bits.view(dtype)
        finite = torch.where(row.isfinite(), row, -torch.inf)
        for top_k in (1, 100, 40_000):
            settings = {"top_k": top_k, "seed": 1, "image_ids": [0], "step": 0}
            logits = (finite if top_k != 1 else row).expand(1, 4, -1).to(device)
            assert torch.equal(guided_sample(logits, **settings), reference.guided_sample(logits, **settings))


def test_fixed_values(device):
    """The draws that a seed gives are part of the interface: images are reproduced from their settings."""
    logits = (torch.arange(1000) % 37 / 8).expand(2, 4, 1000).to(device)
    tokens = guided_sample(logits, top_k=900, top_p=0.95, seed=[0, 2**64 - 1], image_ids=[0, 2**40], step=3)
    assert tokens.tolist() == [[844, 171, 767, 249], [439, 168, 766, 134]]


# --- Weights and random numbers ---------------------------------------------------------------------------------------


def test_philox_known_answers():
    """The known-answer vectors of the authors' Random123 library, philox4x32 with 10 rounds."""
    ones, pi = [0xFFFFFFFF] * 6, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    answers = [
        ([0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (ones, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]
    for numbers, expected in answers:
        words = [torch.tensor(number) for number in numbers]
        found = reference._philox4x32(words[:4], (words[4], words[5]))
        assert [int(word) for word in found] == expected


def test_scaled_draw_is_the_high_half_of_the_product():
    rng = np.random.default_rng(0)
    for number, total in zip(rng.integers(0, 2**64, 500, dtype=np.uint64), rng.integers(0, 2**62, 500), strict=True):
        low, high = torch.tensor(int(number) % 2**32), torch.tensor(int(number) >> 32)
        assert int(reference._scaled_draw(low, high, torch.tensor(int(total)))) == int(number) * int(total) >> 64


def test_weights_are_the_softmax():
    x = torch.linspace(0, -25, 100_001)[None]
    weights = reference._integer_weights(x)[0]
    assert weights[0] == 2**30
    assert (weights.diff() <= 0).all()
    exact = x[0].double().exp() * 2**30
    assert ((weights - exact).abs() <= 1 + 4.3e-6 * exact).all()
    assert reference._integer_weights(torch.tensor([[0.0, -31 * math.log(2), -1e30, -torch.inf]]))[0, 1:].sum() == 0


# --- Distribution and support -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (40, 0.0), (0, 0.9), (40, 0.8)])
def test_distribution(top_k, top_p, device):
    row = random_logits(300, scale=1.5, seed=4).to(device)
    counts = torch.bincount(draws(row, 200_000, top_k=top_k, top_p=top_p), minlength=300).cpu().numpy()
    support = support_by_definition(row.tolist(), top_k, top_p)
    probabilities = np.zeros(300)
    for token in support:
        probabilities[token] = math.exp(row[token].item())
    probabilities /= probabilities.sum()
    assert counts[probabilities == 0].sum() == 0
    assert chi_square_p_value(counts, probabilities) > 1e-4


def test_images_steps_positions_and_seeds_are_independent(device):
    """Two draws that differ in one part of the counter or key: each pair of tokens equally often."""
    logits = torch.zeros(100, 1000, 4, device=device)
    base = guided_sample(logits, seed=0, image_ids=range(100), step=0)
    others = {
        "image": guided_sample(logits, seed=0, image_ids=range(100, 200), step=0),
        "high word of the image": guided_sample(logits, seed=0, image_ids=range(2**40, 2**40 + 100), step=0),
        "step": guided_sample(logits, seed=0, image_ids=range(100), step=1),
        "position": base.roll(1, 1),
        "seed": guided_sample(logits, seed=1, image_ids=range(100), step=0),
        "high word of the seed": guided_sample(logits, seed=2**32, image_ids=range(100), step=0),
    }
    for name, other in others.items():
        pairs = torch.bincount((base * 4 + other).flatten(), minlength=16).cpu().numpy()
        assert chi_square_p_value(pairs, np.full(16, 1 / 16)) > 1e-4, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("top_k", "top_p"), [(1, 0.0), (5, 0.0), (13, 0.0), (0, 0.41), (9, 0.61), (0, 0.0)])
def test_support_is_exact(top_k, top_p, dtype, device):
    """Flat enough that every kept token turns up in 20,000 draws; with ties across the threshold."""
    row = torch.tensor([0.5, 1.0, 0.25, 1.0, 0.5, 0.5, 0.125, 0.5, 1.0, 0.25, 0.0, 0.5, 0.25, 0.5], dtype=dtype)
    found = set(draws(row.to(device), 20_000, top_k=top_k, top_p=top_p).tolist())
    assert found == support_by_definition(row.tolist(), top_k, top_p)


def test_top_p_keeps_the_token_that_crosses_it(device):
    row = torch.zeros(8, device=device)
    for top_p, kept in [(1e-9, 1), (0.125, 1), (0.1251, 2), (0.5, 4), (0.5001, 5), (0.999, 8), (1.0, 8)]:
        assert set(draws(row, 5000, top_p=top_p).tolist()) == set(range(kept)), top_p


# --- Degenerate rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_k": 1}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.5}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan(settings, dtype, device):
    inf, nan = math.inf, math.nan
    expected = [
        ([-inf, -inf, -inf, -inf], {-1}),
        ([nan, nan, nan, -inf], {-1}),
        ([nan, -inf, 3.0, nan], {2}),
        ([5.0, inf, nan, -inf], {1}),
        ([torch.finfo(dtype).max, 0.0, torch.finfo(dtype).min, -inf], {0}),
        ([torch.finfo(dtype).min, -inf, nan, -inf], {0}),
    ]
    for row, tokens in expected:
        assert set(draws(torch.tensor(row, dtype=dtype, device=device), 50, **settings).tolist()) == tokens, row
    shared = set(draws(torch.tensor([inf, 5.0, inf, -inf], dtype=dtype, device=device), 500, **settings).tolist())
    one_is_enough = settings.get("top_k") == 1 or settings.get("top_p") == 0.5
    assert shared == ({0} if one_is_enough else {0, 2})


def test_one_row_without_mass_leaves_the_others_alone(device):
    logits = random_logits(2, 5, 100, device=device)
    settings = {"top_k": 20, "top_p": 0.9, "seed": 1, "image_ids": [3, 4], "step": 0}
    expected = guided_sample(logits, **settings)
    logits[1, 2] = -torch.inf
    tokens = guided_sample(logits, **settings)
    assert tokens[1, 2] == -1
    tokens[1, 2] = expected[1, 2]
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("shape", [(0, 3, 7), (2, 0, 7), (0, 0, 1)])
def test_empty(shape, device):
    tokens = guided_sample(torch.zeros(shape, device=device), seed=0, image_ids=range(shape[0]), step=0)
    assert tokens.shape == shape[:2]
    assert tokens.dtype == torch.int64
    assert tokens.device.type == device.type


def test_top_k_one_is_argmax(device):
    logits = random_logits(3, 70, 8912, device=device)
    for top_k, top_p in [(1, 0.0), (1, 0.5), (0, 1e-12)]:
        tokens = guided_sample(logits, top_k=top_k, top_p=top_p, seed=7, image_ids=range(3), step=9)
        assert torch.equal(tokens, logits.argmax(-1))


def test_large_vocabulary(device):
    logits = random_logits(1, 1, 2**20 + 3, device=device)
    for settings in ({}, {"top_k": 900, "top_p": 0.9}, {"top_k": 2**19}, {"top_p": 0.5}):
        arguments = {"seed": 1, "image_ids": [0], "step": 0, **settings}
        assert torch.equal(guided_sample(logits, **arguments), reference.guided_sample(logits, **arguments))


# --- The same draw everywhere -----------------------------------------------------------------------------------------


def test_an_image_does_not_depend_on_its_batch(device):
    logits = random_logits(5, 33, 500, dtype=torch.bfloat16, device=device)
    settings = {"top_k": 50, "top_p": 0.9, "step": 4}
    seeds, images = [1, 2, 2, 2**63, 5], [0, 0, 1, 7, 8]
    together = guided_sample(logits, seed=seeds, image_ids=images, **settings)
    for i in range(5):
        alone = guided_sample(logits[i : i + 1], seed=seeds[i], image_ids=[images[i]], **settings)
        assert torch.equal(alone[0], together[i])
    order = [3, 1, 4, 0, 2]
    shuffled = guided_sample(
        logits[order], seed=[seeds[i] for i in order], image_ids=[images[i] for i in order], **settings
    )
    assert torch.equal(shuffled, together[order])


def test_repeats_and_thread_counts(device):
    logits = random_logits(2, 64, 1000, device=device)
    settings = {"top_k": 100, "top_p": 0.95, "seed": 1, "image_ids": [0, 1], "step": 0}
    expected = guided_sample(logits, **settings)
    assert all(torch.equal(guided_sample(logits, **settings), expected) for _ in range(250))
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        assert torch.equal(guided_sample(logits, **settings), expected)


def test_global_generator_is_untouched(untouched_global_rng):
    guided_sample(torch.zeros(1, 2, 3), seed=1, image_ids=[0], step=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, device):
    logits = random_logits(2, 6, 129, dtype=dtype, device=device)
    settings = {"top_k": 30, "top_p": 0.9, "seed": 1, "image_ids": [0, 1], "step": 0}
    expected = guided_sample(logits, **settings)
    offset = torch.empty(logits.numel() + 1, dtype=dtype, device=device)[1:].view(2, 6, 129).copy_(logits)
    strided = torch.empty(2, 6, 258, dtype=dtype, device=device)[..., ::2].copy_(logits)
    transposed = logits.transpose(0, 2).contiguous().transpose(0, 2)
    for same in (offset, strided, transposed):
        assert torch.equal(guided_sample(same, **settings), expected)
    expanded = logits[:1, :1].expand(2, 6, 129)
    assert torch.equal(guided_sample(expanded, **settings), guided_sample(expanded.contiguous(), **settings))


def test_forms_of_seed_and_image_ids(device):
    logits = torch.zeros(3, 4, 1000, device=device)
    expected = guided_sample(logits, seed=[2**63 + 5] * 3, image_ids=[4, 5, 6], step=1)
    seeds = torch.full((3,), 5 - 2**63, device=device)
    images = torch.tensor([4, 0, 5, 0, 6], device=device)[::2]
    assert torch.equal(guided_sample(logits, seed=2**63 + 5, image_ids=(4, 5, 6), step=1), expected)
    assert torch.equal(guided_sample(logits, seed=seeds, image_ids=images, step=1), expected)


# --- Contract ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "top_k", "top_p"), [((2, 3, 50), 0, 0.0), ((1, 5, 129), 7, 0.9), ((2, 0, 9), 1, 1)])
def test_opcheck(shape, top_k, top_p, dtype, device):
    logits = random_logits(*shape, dtype=dtype, device=device)
    images = torch.arange(shape[0], device=device)
    torch.library.opcheck(torch.ops.flexvar.guided_sample.default, (logits, top_k, top_p, images, images, 3))


def test_compile_in_one_graph(device):
    def sample(logits, seeds, images, step):
        return guided_sample(2 * logits, top_k=20, top_p=0.9, seed=seeds, image_ids=images, step=step)

    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager", dynamic=True)
    images = torch.arange(2, device=device)
    for step, length in enumerate((1, 4, 9)):
        logits = random_logits(2, length, 100, device=device)
        assert torch.equal(compiled(logits, images, images, step), sample(logits, images, images, step))
        assert torch.equal(compiled(logits, 17, images, step), sample(logits, 17, images, step))


def test_no_gradient(device):
    logits = torch.zeros(1, 2, 3, device=device, requires_grad=True)
    assert not guided_sample(logits, seed=0, image_ids=[0], step=0).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [[0.0]]}, TypeError, "logits must be a torch.Tensor, got list"),
        ({"logits": torch.zeros(3, 4)}, ValueError, r"logits must have shape \[B, l, V\], got \(3, 4\)"),
        ({"logits": torch.zeros(2, 3, 0)}, ValueError, r"V >= 1, got \(2, 3, 0\)"),
        ({"logits": torch.zeros(2, 3, 4, dtype=torch.int64)}, TypeError, "dtype float32, float16, bfloat16, got int64"),
        ({"logits": torch.zeros(2, 3, 4, dtype=torch.float64)}, TypeError, "got float64"),
        ({"top_k": -1}, ValueError, r"top_k must be in \[0, 2\*\*63\), got -1"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer, got 1.5"),
        ({"top_k": True}, TypeError, "top_k must be an integer, got True"),
        ({"top_p": -0.1}, ValueError, r"top_p must be in \[0, 1\], got -0.1"),
        ({"top_p": 1.01}, ValueError, r"top_p must be in \[0, 1\], got 1.01"),
        ({"top_p": math.nan}, ValueError, r"top_p must be in \[0, 1\], got nan"),
        ({"top_p": "0.9"}, TypeError, "top_p must be a number, got '0.9'"),
        ({"step": -1}, ValueError, r"step must be in \[0, 2\*\*32\), got -1"),
        ({"step": 2**32}, ValueError, r"step must be in \[0, 2\*\*32\)"),
        ({"step": None}, TypeError, "step must be an integer, got None"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"seed": 2**64}, ValueError, r"seed must be in \[0, 2\*\*64\)"),
        ({"seed": [1, -2]}, ValueError, r"seed must be in \[0, 2\*\*64\), got -2"),
        ({"seed": [1, 2, 3]}, ValueError, r"seed must hold one number per image \(2\), got 3"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        ({"seed": torch.zeros(2)}, TypeError, "seed must have dtype int64, got float32"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seed must have shape \[B\] with B = 2, got \(3,\)"),
        ({"image_ids": [1]}, ValueError, r"image_ids must hold one number per image \(2\), got 1"),
        ({"image_ids": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, r"image_ids must have shape \[B\]"),
        ({"image_ids": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "image_ids must be on"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    arguments = {"logits": torch.zeros(2, 3, 4), "seed": 0, "image_ids": [0, 1], "step": 0, **change}
    with pytest.raises(error, match=f"guided_sample: {message}|guided_sample: .*{message}"):
        guided_sample(arguments.pop("logits"), **arguments)


def test_native_op_guards_memory():
    logits, images = torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64)
    for bad in [
        (logits[0], 0, 0.0, images, images, 0),
        (logits, 0, 0.0, images[:1], images, 0),
        (logits, 0, 0.0, images, images.float(), 0),
        (logits, -1, 0.0, images, images, 0),
        (logits, 0, math.nan, images, images, 0),
        (logits[..., :0], 0, 0.0, images, images, 0),
    ]:
        with pytest.raises(RuntimeError, match="guided_sample"):
            torch.ops.flexvar.guided_sample(*bad)
    assert flexvar_ext.guided_sample(logits, seed=0, image_ids=[0, 1], step=0).shape == (2, 3)
