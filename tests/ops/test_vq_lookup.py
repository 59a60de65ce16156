"""vq_lookup: nearest codes, compared by distance in float64."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flexvar_ext
from flexvar_ext import _host, reference

TOKEN_COUNTS = (1, 2, 3, 7, 63, 64, 65, 127, 129, 255, 257, 680, 681, 1704)
INSTRUCTION_SETS = _host.build_info()["cpu_instruction_sets"].split()
INSTRUCTION_SETS = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_host.cpu_isa()) + 1]


def randn(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def rows_as_looked_up(x: Tensor, normalize: bool) -> Tensor:
    """The float32 rows whose nearest codes are asked for, in float64."""
    x = x.float().double()
    return (x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)).float().double() if normalize else x


def excess_distance(indices: Tensor, latents: Tensor, codebook: Tensor, normalize: bool) -> float:
    """How much farther than the nearest code the chosen ones are, at worst (squared distances in float64)."""
    x, codes = rows_as_looked_up(latents, normalize), rows_as_looked_up(codebook, normalize)
    nearest = torch.cdist(x, codes, compute_mode="donot_use_mm_for_euclid_dist").square().amin(1)
    return ((x - codes[indices]).square().sum(1) - nearest).max().item()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", TOKEN_COUNTS)
def test_chosen_codes_are_the_nearest(device, count, normalize):
    latents, codebook = randn(count, 32, seed=count, device=device), randn(777, 32, seed=1, device=device)
    indices = flexvar_ext.vq_lookup(latents, codebook, normalize=normalize)
    assert indices.dtype == torch.int64
    assert indices.shape == (count,)
    assert indices.device.type == device.type
    assert excess_distance(indices, latents, codebook, normalize) <= 1e-13


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("codes", "dim"), [(8912, 32), (16384, 8), (1, 4), (2, 1), (255, 3), (257, 31), (513, 130)])
def test_codebook_sizes(device, codes, dim, normalize):
    latents, codebook = randn(197, dim, device=device), randn(codes, dim, seed=1, device=device)
    indices = flexvar_ext.vq_lookup(latents, codebook, normalize=normalize)
    assert excess_distance(indices, latents, codebook, normalize) <= 1e-12 + 1e-14 * dim


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_close_codes_are_told_apart(device, dtype):
    """Clusters whose codes differ by a few float32 roundings: plain float32 distances cannot rank them."""
    centres = F.normalize(randn(40, 32), dim=1).repeat_interleave(25, 0)
    codebook = (centres + 1e-7 * randn(1000, 32, seed=1)).to(device)
    latents = (centres[::7] + 1e-6 * randn(143, 32, seed=2)).to(device, dtype)
    for normalize in (True, False):
        indices = flexvar_ext.vq_lookup(latents, codebook, normalize=normalize)
        assert excess_distance(indices, latents, codebook, normalize) <= 1e-14


def test_agrees_with_reference_where_float32_decides(device):
    latents, codebook = randn(2000, 32, device=device), randn(1024, 32, seed=1, device=device)
    native = flexvar_ext.vq_lookup(latents, codebook)
    expected = reference.vq_lookup(latents, codebook)
    scores = F.normalize(latents.double()) @ F.normalize(codebook.double()).T
    best_two = scores.topk(2, dim=1).values
    decided = best_two[:, 0] - best_two[:, 1] > 1e-6
    assert decided.float().mean() > 0.99
    assert torch.equal(native[decided], expected[decided])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_widened(device, dtype):
    latents, codebook = randn(130, 32, device=device).to(dtype), randn(300, 32, seed=1, device=device).to(dtype)
    assert torch.equal(
        flexvar_ext.vq_lookup(latents, codebook), flexvar_ext.vq_lookup(latents.float(), codebook.float())
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_go_to_the_lowest_index(device, normalize):
    unique = randn(137, 16, device=device)
    codebook = unique.repeat(11, 1)  # every code 11 times, 137 apart
    latents = unique + 1e-3 * randn(137, 16, seed=1, device=device)
    expected = torch.arange(137, device=device)
    assert torch.equal(flexvar_ext.vq_lookup(latents, codebook, normalize=normalize), expected)
    same = torch.ones(1000, 16, device=device)
    assert flexvar_ext.vq_lookup(latents, same, normalize=normalize).eq(0).all()


def test_layouts(device):
    latents, codebook = randn(70, 24, device=device), randn(90, 24, seed=1, device=device)
    expected = flexvar_ext.vq_lookup(latents, codebook)
    wide = torch.stack([latents, latents.neg()], dim=2).flatten(1)
    offset = torch.cat([latents.new_zeros(1), latents.flatten()])[1:].view(70, 24)
    for same in (latents.T.contiguous().T, wide[:, ::2], offset):
        assert torch.equal(flexvar_ext.vq_lookup(same, codebook), expected)
    offset_codes = torch.cat([codebook.new_zeros(1), codebook.flatten()])[1:].view(90, 24)
    for same in (codebook.T.contiguous().T, offset_codes):
        assert torch.equal(flexvar_ext.vq_lookup(latents, same), expected)
    assert torch.equal(flexvar_ext.vq_lookup(latents[:1].expand(9, 24), codebook), expected[:1].expand(9))
    assert flexvar_ext.vq_lookup(latents, codebook[:1].expand(300, 24)).eq(0).all()


def test_no_rows(device):
    assert flexvar_ext.vq_lookup(randn(0, 8, device=device), randn(5, 8, device=device)).shape == (0,)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_without_a_nearest_code_get_zero(device, normalize, value):
    latents, codebook = randn(150, 8, device=device), randn(50, 8, seed=1, device=device)
    expected = flexvar_ext.vq_lookup(latents, codebook, normalize=normalize)
    latents[3, 2] = value
    latents[7] = value
    expected[[3, 7]] = 0
    assert torch.equal(flexvar_ext.vq_lookup(latents, codebook, normalize=normalize), expected)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-15, 1e15, 1e25, 1e38])
@pytest.mark.parametrize("normalize", [True, False])
def test_extreme_magnitudes(device, scale, normalize):
    latents = (randn(160, 16, device=device) * scale).clamp(-3e38, 3e38)
    codebook = (randn(300, 16, seed=1, device=device) * scale).clamp(-3e38, 3e38)
    indices = flexvar_ext.vq_lookup(latents, codebook, normalize=normalize)
    x, codes = rows_as_looked_up(latents, normalize), rows_as_looked_up(codebook, normalize)
    scores = x @ codes.T - codes.square().sum(1) / 2
    shortfall = scores.amax(1) - scores.gather(1, indices[:, None])[:, 0]
    assert (shortfall <= 1e-13 * scores.abs().amax(1)).all()


def test_one_enormous_code_hides_no_other(device):
    latents, codebook = randn(160, 16, device=device), randn(300, 16, seed=1, device=device)
    codebook[17] = 2e38
    indices = flexvar_ext.vq_lookup(latents, codebook, normalize=False)
    assert excess_distance(indices, latents, codebook, normalize=False) <= 1e-12


def test_zero_latent_and_zero_code(device):
    codebook = randn(40, 8, device=device)
    codebook[23] = 0
    latents = torch.stack([codebook.new_zeros(8), codebook[5]])
    for repeats in (1, 100):
        for normalize in (True, False):
            indices = flexvar_ext.vq_lookup(latents.repeat(repeats, 1), codebook, normalize=normalize)
            assert indices.tolist() == [23, 5] * repeats


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_unchecked_lookup_never_chooses_a_code_that_is_not_finite(device, value):
    latents, codebook = randn(200, 8, device=device), randn(50, 8, seed=1, device=device)
    codebook[[0, 13], 1] = value
    kept = torch.tensor([v for v in range(50) if v not in (0, 13)], device=device)
    for normalize in (True, False):
        indices = torch.ops.flexvar.vq_lookup(latents, codebook, normalize)
        assert torch.equal(indices, kept[flexvar_ext.vq_lookup(latents, codebook[kept], normalize=normalize)])
        assert torch.ops.flexvar.vq_lookup(latents, torch.full_like(codebook, value), normalize).eq(0).all()


def test_repeats_are_bit_equal(device):
    latents, codebook = randn(65, 32, device=device), randn(1000, 32, seed=1, device=device)
    expected = flexvar_ext.vq_lookup(latents, codebook)
    for _ in range(250):
        assert torch.equal(flexvar_ext.vq_lookup(latents, codebook), expected)


def test_a_row_does_not_depend_on_the_others(device):
    latents, codebook = randn(300, 32, device=device), randn(2000, 32, seed=1, device=device)
    expected = flexvar_ext.vq_lookup(latents, codebook)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(flexvar_ext.vq_lookup(latents[order], codebook), expected[order])
    for n in (0, 1, 150, 299):
        assert torch.equal(flexvar_ext.vq_lookup(latents[n : n + 1], codebook), expected[n : n + 1])


def close_call(dim: int) -> tuple[Tensor, Tensor]:
    """Rows whose two nearest codes differ by less than float32 resolves."""
    codebook = randn(700, dim, seed=1)
    return randn(2300, dim), torch.cat([codebook, codebook + 1e-7 * randn(700, dim, seed=2)])


@pytest.mark.parametrize("dim", [8, 32, 21])
@pytest.mark.parametrize("normalize", [True, False])
def test_thread_count_changes_nothing(dim, normalize):
    latents, codebook = close_call(dim)
    threads = torch.get_num_threads()
    try:
        for count in (5, 1100, 2300):  # codes, then latents, then both are shared out
            results = []
            for number in (1, 2, 3, 4):
                torch.set_num_threads(number)
                results.append(flexvar_ext.vq_lookup(latents[:count], codebook, normalize=normalize))
            assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dim", [8, 32, 21])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_instruction_set_changes_nothing(monkeypatch, instruction_set, dim, normalize):
    latents, codebook = close_call(dim)
    expected = flexvar_ext.vq_lookup(latents, codebook, normalize=normalize)
    monkeypatch.setenv("FLEXVAR_CPU_ISA", instruction_set)
    assert torch.equal(flexvar_ext.vq_lookup(latents, codebook, normalize=normalize), expected)
    assert excess_distance(expected, latents, codebook, normalize) <= 1e-12


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("ratio", [1e-42, 1e-30, 1e-13, 1e-11, 1e30])
def test_rows_of_any_length(monkeypatch, instruction_set, ratio):
    """Normalising leaves rows shorter than 1e-12 short; they stand beside unit vectors."""
    latents, codebook = randn(90, 32), randn(400, 32, seed=1)
    codebook[::3] *= ratio
    codebook[7] = 0
    latents[::5] *= ratio
    latents[3] = 0
    monkeypatch.setenv("FLEXVAR_CPU_ISA", instruction_set)
    indices = flexvar_ext.vq_lookup(latents, codebook)
    assert excess_distance(indices, latents, codebook, True) <= 1e-13


@pytest.mark.parametrize("dim", [1, 7, 9, 64, 170, 171, 512, 513])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_dimensions(monkeypatch, instruction_set, normalize, dim):
    latents, codebook = close_call(dim)
    latents, codebook = latents[:200], codebook[200:1200]
    monkeypatch.setenv("FLEXVAR_CPU_ISA", instruction_set)
    indices = flexvar_ext.vq_lookup(latents, codebook, normalize=normalize)
    assert excess_distance(indices, latents, codebook, normalize) <= 1e-12 + 1e-14 * dim


@pytest.mark.parametrize("dim", [2, 8, 21, 32, 300])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_neighbours_in_the_codebook(monkeypatch, instruction_set, dim):
    """Pairs side by side that float32 scores cannot rank, of lengths from 1e-9 to 1e9, the last ones behind 1,000."""
    codes = randn(505, dim, seed=1).repeat_interleave(2, 0)
    codes[1::2] += 3e-8 * randn(505, dim, seed=2)
    latents = codes[::3] + 1e-3 * randn(337, dim)
    codebook = codes * 10.0 ** (torch.arange(1010) * 7 % 19 - 9)[:, None]
    monkeypatch.setenv("FLEXVAR_CPU_ISA", instruction_set)
    indices = flexvar_ext.vq_lookup(latents, codebook)
    assert excess_distance(indices, latents, codebook, True) <= 1e-15 * (1 + dim)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize(("nearest", "second"), [(0, 299), (299, 0), (16, 1), (257, 256)])
def test_codes_at_the_error_bound_of_16_bits(monkeypatch, instruction_set, nearest, second):
    """16 bits round the nearest code, and the latent where they meet, down in every component, and the second up."""
    unit = 32766  # of csrc/vq_lookup/cpu_integers.h
    halves = torch.arange(31).double() % 7 * 20 + 5700
    signs = torch.where(randn(64) < 0, -1.0, 1.0)

    def components(offset, length, turn=0):  # the last one makes the length, so that normalising changes no rounding
        some = ((halves * length).floor() + turn * (-1) ** torch.arange(31) + 0.5 + offset) / unit
        return torch.cat([some, (length**2 - some.square().sum()).sqrt()[None]])

    def rounded(x):
        return torch.round(x * unit).double()

    nothing = torch.zeros(32)
    latent = (signs * torch.cat([components(-0.02, 0.5**0.5), components(0.02, 0.5**0.5)])).float()
    codes = torch.stack([torch.cat([components(-0.02, 1), nothing]), torch.cat([nothing, components(0.02, 1, turn=2)])])
    codebook = F.normalize(randn(600, 64, seed=1), dim=1)
    codebook[[nearest, second]] = (signs * codes).float()
    scores = codebook.double() @ latent.double()
    assert torch.equal(scores.topk(2).indices, torch.tensor([nearest, second]))
    errors = rounded(codebook) @ rounded(latent) / unit**2 - scores
    assert errors[second] - errors[nearest] > 0.5 * 2 * 64**0.5 / unit  # half of what the bound allows
    monkeypatch.setenv("FLEXVAR_CPU_ISA", instruction_set)
    assert flexvar_ext.vq_lookup(latent.expand(9, 64), codebook).eq(nearest).all()


@pytest.mark.cuda
def test_devices_agree():
    latents, codebook = close_call(32)
    for normalize in (True, False):
        expected = flexvar_ext.vq_lookup(latents, codebook, normalize=normalize)
        on_gpu = flexvar_ext.vq_lookup(latents.cuda(), codebook.cuda(), normalize=normalize)
        assert torch.equal(on_gpu.cpu(), expected)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("count", "codes", "dim"), [(5, 7, 3), (64, 100, 32), (1, 1, 1), (130, 300, 8)])
def test_opcheck(device, count, codes, dim, normalize):
    arguments = (randn(count, dim, device=device), randn(codes, dim, seed=1, device=device), normalize)
    torch.library.opcheck(torch.ops.flexvar.vq_lookup.default, arguments)


def test_fake_result_of_the_op_that_checks():
    with torch._subclasses.FakeTensorMode() as mode:
        latents, codebook = (mode.from_tensor(randn(count, 8)) for count in (5, 9))
        indices, codebook_is_finite = torch.ops.flexvar.vq_lookup_checked(latents, codebook, True)
    assert indices.shape == (5,)
    assert indices.dtype == torch.int64
    assert codebook_is_finite is True


def test_compiles_without_graph_breaks(device):
    compiled = torch.compile(flexvar_ext.vq_lookup, fullgraph=True, dynamic=True)
    codebook = randn(100, 8, seed=1, device=device)
    for count in (33, 70):
        latents = randn(count, 8, device=device)
        assert torch.equal(compiled(latents, codebook), flexvar_ext.vq_lookup(latents, codebook))


def test_autocast_keeps_float32(device):
    latents, codebook = randn(200, 32, device=device), randn(500, 32, seed=1, device=device)
    expected = flexvar_ext.vq_lookup(latents, codebook)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(flexvar_ext.vq_lookup(latents, codebook), expected)


def test_inputs_that_require_gradients(device):
    latents, codebook = randn(9, 8, device=device), randn(20, 8, seed=1, device=device)
    expected = flexvar_ext.vq_lookup(latents, codebook)
    result = flexvar_ext.vq_lookup(latents.requires_grad_(), codebook.requires_grad_())
    assert torch.equal(result, expected)
    assert not result.requires_grad


@pytest.mark.parametrize(
    ("latents", "codebook", "error", "message"),
    [
        ([[1.0]], randn(2, 1), TypeError, "latents must be a torch.Tensor, got list"),
        (randn(4), randn(5, 4), ValueError, r"latents must have shape \[N, C\], got \(4,\)"),
        (randn(4, 8), randn(5, 8, 1), ValueError, r"codebook must have shape \[V, C\], got \(5, 8, 1\)"),
        (randn(4, 8), randn(512, 16), ValueError, r".*with C = 8 >= 1 as in latents, got \(512, 16\)"),
        (randn(4, 0), randn(5, 0), ValueError, r".*with C = 0 >= 1 as in latents, got \(5, 0\)"),
        (randn(4, 8), randn(0, 8), ValueError, r"codebook must hold at least one code, got shape \(0, 8\)"),
        (randn(4, 8).double(), randn(5, 8), TypeError, "latents must have dtype .*, got float64"),
        (randn(4, 8), randn(5, 8).long(), TypeError, "codebook must have dtype .*, got int64"),
        (randn(4, 8), randn(5, 8).to("meta"), ValueError, "all tensors must be on one device"),
        (randn(4, 8), torch.full((5, 8), torch.nan), ValueError, "codebook must be finite, got 5 codes with a NaN"),
    ],
)
def test_bad_input(latents, codebook, error, message):
    with pytest.raises(error, match="vq_lookup: " + message):
        flexvar_ext.vq_lookup(latents, codebook)
    assert flexvar_ext.vq_lookup(randn(3, 8), randn(5, 8)).shape == (3,)
    with pytest.raises(TypeError, match="vq_lookup: normalize must be a bool, got int"):
        flexvar_ext.vq_lookup(randn(3, 8), randn(5, 8), normalize=1)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", [0, 3, 300])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("bad", [[0], [255, 256], [699]])
def test_every_code_is_looked_at(monkeypatch, instruction_set, normalize, count, value, bad):
    codebook = randn(700, 12, seed=1)
    monkeypatch.setenv("FLEXVAR_CPU_ISA", instruction_set)
    flexvar_ext.vq_lookup(randn(count, 12), codebook, normalize=normalize)
    codebook[bad, 11] = value
    with pytest.raises(ValueError, match=f"codebook must be finite, got {len(bad)} codes"):
        flexvar_ext.vq_lookup(randn(count, 12), codebook, normalize=normalize)


def test_finite_codebook_whose_sum_overflows():
    assert flexvar_ext.vq_lookup(randn(4, 8), torch.full((5, 8), 3e38)).eq(0).all()


def test_bad_tensors_do_not_reach_the_kernel():
    for arguments in ((randn(4, 8), randn(5, 9)), (randn(4, 8).half(), randn(5, 8)), (randn(8), randn(5, 8))):
        with pytest.raises(RuntimeError, match="vq_lookup: "):
            torch.ops.flexvar.vq_lookup(*arguments, True)


def test_calls_from_many_threads(device):
    inputs = [(randn(40 + n, 32, seed=n, device=device), randn(300, 32, seed=9, device=device)) for n in range(8)]
    expected = [flexvar_ext.vq_lookup(*pair) for pair in inputs]
    with ThreadPoolExecutor(8) as pool:
        for results in [list(pool.map(lambda pair: flexvar_ext.vq_lookup(*pair), inputs)) for _ in range(5)]:
            assert all(map(torch.equal, results, expected))


@pytest.mark.cuda
def test_side_stream_and_graph_replay():
    latents, codebook = randn(680, 32).cuda(), randn(8912, 32, seed=1).cuda()
    expected = flexvar_ext.vq_lookup(latents, codebook)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(flexvar_ext.vq_lookup(latents, codebook), expected)
    torch.cuda.current_stream().wait_stream(stream)

    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(latents)
    with torch.cuda.graph(graph):
        indices = flexvar_ext.vq_lookup(static, codebook)
    for order in (latents, latents.flip(0)):
        static.copy_(order)
        graph.replay()
        assert torch.equal(indices, flexvar_ext.vq_lookup(order, codebook))


@pytest.mark.cuda
def test_more_than_2_to_the_31_elements():
    codebook = randn(16, 8, seed=1).cuda()
    rows = torch.arange(2**28 + 100, device="cuda") % 16  # codes in turn, 2**31 + 800 elements
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    assert torch.equal(flexvar_ext.vq_lookup(codebook[rows], codebook), rows)
