"""vq_lookup_multiscale: the latent resampled to every scale and looked up, compared by distance in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flexvar_ext
from flexvar_ext import _host, reference

SCALES = [(1, 1), (2, 3), (5, 4), (16, 16), (9, 21)]
MODES = [("area", False), ("bilinear", True), ("bilinear", False), ("bicubic", False), ("nearest", False)]
INSTRUCTION_SETS = _host.build_info()["cpu_instruction_sets"].split()
INSTRUCTION_SETS = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_host.cpu_isa()) + 1]


def randn(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def excess_distance(indices, latent, codebook, scales, normalize, mode, antialias) -> float:
    """How much farther than the nearest code the chosen ones are, at worst (squared distances in float64)."""
    codes = codebook.double()
    parts = [
        reference.resample2d(latent.double(), scale, mode=mode, antialias=antialias).flatten(2).transpose(1, 2)
        for scale in scales
    ]
    x = torch.cat(parts, dim=1).flatten(0, 1)
    if normalize:
        x, codes = F.normalize(x, dim=1), F.normalize(codes, dim=1)
    distances = torch.cdist(x, codes, compute_mode="donot_use_mm_for_euclid_dist").square()
    return (distances.gather(1, indices.reshape(-1, 1))[:, 0] - distances.amin(1)).max().item()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("mode", "antialias"), MODES)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (7, 13), (1, 1)])
def test_chosen_codes_are_the_nearest(device, height, width, mode, antialias, normalize):
    latent, codebook = randn(2, 32, height, width, device=device), randn(500, 32, seed=1, device=device)
    indices = flexvar_ext.vq_lookup_multiscale(
        latent, codebook, SCALES, normalize=normalize, mode=mode, antialias=antialias
    )
    assert indices.dtype == torch.int64
    assert indices.shape == (2, sum(h * w for h, w in SCALES))
    assert excess_distance(indices, latent, codebook, SCALES, normalize, mode, antialias) <= 1e-5


@pytest.mark.parametrize(("codes", "dim"), [(8912, 32), (16384, 8), (1, 3), (300, 21)])
def test_codebook_sizes(device, codes, dim):
    latent, codebook = randn(1, dim, 12, 12, device=device), randn(codes, dim, seed=1, device=device)
    indices = flexvar_ext.vq_lookup_multiscale(latent, codebook, SCALES)
    assert excess_distance(indices, latent, codebook, SCALES, True, "area", False) <= 1e-5


def test_unresampled_scale_is_vq_lookup(device):
    latent, codebook = randn(3, 8, 6, 10, device=device), randn(200, 8, seed=1, device=device)
    rows = latent.permute(0, 2, 3, 1).reshape(-1, 8)
    for mode, antialias in MODES:
        indices = flexvar_ext.vq_lookup_multiscale(latent, codebook, [(6, 10)], mode=mode, antialias=antialias)
        assert torch.equal(indices.flatten(), flexvar_ext.vq_lookup(rows, codebook))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_widened(device, dtype):
    latent, codebook = randn(2, 32, 9, 9, device=device).to(dtype), randn(300, 32, seed=1, device=device).to(dtype)
    widened = flexvar_ext.vq_lookup_multiscale(latent.float(), codebook.float(), SCALES)
    assert torch.equal(flexvar_ext.vq_lookup_multiscale(latent, codebook, SCALES), widened)


def test_layouts(device):
    latent, codebook = randn(2, 24, 6, 8, device=device), randn(90, 24, seed=1, device=device)
    expected = flexvar_ext.vq_lookup_multiscale(latent, codebook, SCALES)
    wide = torch.stack([latent, latent.neg()], dim=4).flatten(3)
    offset = torch.cat([latent.new_zeros(1), latent.flatten()])[1:].view(latent.shape)
    for same in (latent.to(memory_format=torch.channels_last), wide[..., ::2], offset, latent.mT.contiguous().mT):
        assert torch.equal(flexvar_ext.vq_lookup_multiscale(same, codebook, SCALES), expected)
    offset_codes = torch.cat([codebook.new_zeros(1), codebook.flatten()])[1:].view(codebook.shape)
    for same in (codebook.T.contiguous().T, offset_codes):
        assert torch.equal(flexvar_ext.vq_lookup_multiscale(latent, same, SCALES), expected)
    repeated = flexvar_ext.vq_lookup_multiscale(latent[:1].expand(3, 24, 6, 8), codebook, SCALES)
    assert torch.equal(repeated, expected[:1].expand(3, -1))


def test_empty_batch(device):
    empty = flexvar_ext.vq_lookup_multiscale(randn(0, 8, 4, 4, device=device), randn(5, 8, device=device), SCALES)
    assert empty.shape == (0, sum(h * w for h, w in SCALES))
    tokens = 2**31 - 1  # whose tables would not fit into memory
    indices = torch.ops.flexvar.vq_lookup_multiscale(
        randn(0, 8, 4, 4, device=device), randn(5, 8, device=device), [tokens], [1], True, "area", False
    )
    assert indices.shape == (0, tokens)


def test_an_image_does_not_depend_on_the_others(device):
    latent, codebook = randn(5, 32, 16, 16, device=device), randn(1000, 32, seed=1, device=device)
    expected = flexvar_ext.vq_lookup_multiscale(latent, codebook, SCALES)
    assert torch.equal(flexvar_ext.vq_lookup_multiscale(latent.flip(0), codebook, SCALES), expected.flip(0))
    for b in range(5):
        alone = flexvar_ext.vq_lookup_multiscale(latent[b : b + 1], codebook, SCALES)
        assert torch.equal(alone, expected[b : b + 1])


def test_windows_with_a_nan_get_zero(device):
    latent, codebook = randn(2, 8, 4, 4, device=device), randn(50, 8, seed=1, device=device)
    expected = flexvar_ext.vq_lookup_multiscale(latent, codebook, [(1, 1), (2, 2)])
    latent[1, 3, 0, 3] = torch.nan
    expected[1, [0, 2]] = 0  # the whole image, and the upper right quarter
    assert torch.equal(flexvar_ext.vq_lookup_multiscale(latent, codebook, [(1, 1), (2, 2)]), expected)


def test_repeats_and_thread_counts_are_bit_equal(device):
    latent, codebook = randn(2, 32, 16, 16, device=device), randn(300, 32, seed=1, device=device)
    expected = flexvar_ext.vq_lookup_multiscale(latent, codebook, SCALES)
    threads = torch.get_num_threads()
    try:
        for repeat in range(250):
            count = 1 + repeat * 3 // 250  # few changes: each one makes new threads
            torch.set_num_threads(count)
            assert torch.equal(flexvar_ext.vq_lookup_multiscale(latent, codebook, SCALES), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [1, 64])
def test_devices_agree_and_graphs_replay(batch):
    scales = [(side, side) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
    latent, codebook = randn(batch, 32, 16, 16), randn(8912, 32, seed=1)
    on_gpu, codes = latent.cuda(), codebook.cuda()
    expected = flexvar_ext.vq_lookup_multiscale(on_gpu, codes, scales)
    assert torch.equal(expected.cpu(), flexvar_ext.vq_lookup_multiscale(latent, codebook, scales))
    upside_down = flexvar_ext.vq_lookup_multiscale(on_gpu.flip(2), codes, scales)
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(on_gpu)
    with torch.cuda.graph(graph):
        indices = flexvar_ext.vq_lookup_multiscale(static, codes, scales)
    for _ in range(20):
        for images, found in ((on_gpu, expected), (on_gpu.flip(2), upside_down)):
            static.copy_(images)
            graph.replay()
            assert torch.equal(indices, found)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_instruction_sets(monkeypatch, instruction_set):
    monkeypatch.setenv("FLEXVAR_CPU_ISA", instruction_set)
    for dim in (8, 32, 21):
        latent, codebook = randn(1, dim, 16, 16), randn(700, dim, seed=1)
        indices = flexvar_ext.vq_lookup_multiscale(latent, codebook, SCALES)
        assert excess_distance(indices, latent, codebook, SCALES, True, "area", False) <= 1e-5


@pytest.mark.parametrize(("mode", "antialias"), MODES)
@pytest.mark.parametrize("normalize", [True, False])
def test_opcheck(device, mode, antialias, normalize):
    arguments = (randn(2, 8, 5, 6, device=device), randn(40, 8, seed=1, device=device))
    torch.library.opcheck(
        torch.ops.flexvar.vq_lookup_multiscale.default, (*arguments, [1, 3], [2, 6], normalize, mode, antialias)
    )


def test_compiles_without_graph_breaks(device):
    compiled = torch.compile(flexvar_ext.vq_lookup_multiscale, fullgraph=True, dynamic=True)
    codebook = randn(100, 8, seed=1, device=device)
    for batch, scales in ((2, [(1, 1), (3, 4)]), (3, [(2, 2), (5, 4)])):
        latent = randn(batch, 8, 6, 6, device=device)
        expected = flexvar_ext.vq_lookup_multiscale(latent, codebook, scales)
        assert torch.equal(compiled(latent, codebook, scales), expected)


def test_autocast_keeps_float32(device):
    latent, codebook = randn(2, 32, 16, 16, device=device), randn(500, 32, seed=1, device=device)
    expected = flexvar_ext.vq_lookup_multiscale(latent, codebook, SCALES)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(flexvar_ext.vq_lookup_multiscale(latent, codebook, SCALES), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"latent": randn(4, 8)}, ValueError, r"latent must have shape \[B, C, H, W\], got \(4, 8\)"),
        (
            {"latent": randn(1, 8, 4, 0)},
            ValueError,
            r"latent must have H and W of at least 1, got shape \(1, 8, 4, 0\)",
        ),
        ({"latent": randn(1, 8, 4, 4).double()}, TypeError, "latent must have dtype .*, got float64"),
        ({"codebook": randn(5, 9)}, ValueError, r".*with C = 8 >= 1 as in latent, got \(5, 9\)"),
        ({"codebook": torch.full((5, 8), torch.inf)}, ValueError, "codebook must be finite, got 5 codes"),
        ({"mode": "cubic"}, ValueError, "mode must be one of nearest, bilinear, bicubic, area, got 'cubic'"),
        ({"antialias": True}, ValueError, "antialias must be False unless mode is bilinear, got mode 'area'"),
        ({"scales": []}, ValueError, r"scales must hold at least one \(height, width\), got \[\]"),
        ({"scales": 3}, TypeError, r"scales must be a sequence of \(height, width\), got int"),
        ({"scales": [(1, 1), (2, 0)]}, ValueError, r"scales must be positive, got \(2, 0\)"),
        ({"scales": [(1, 1, 1)]}, ValueError, r"scales must be \(height, width\), got \(1, 1, 1\)"),
        ({"scales": [(1.0, 2.0)]}, TypeError, "scales must hold integers"),
        ({"normalize": 1}, TypeError, "normalize must be a bool, got int"),
        ({"mode": "bilinear", "antialias": "yes"}, TypeError, "antialias must be a bool, got str"),
        ({"latent": randn(1, 8, 4, 4).to_sparse()}, TypeError, "latent must be a dense tensor, got layout sparse_coo"),
        (
            {"scales": [(2**20, 2**20)]},
            ValueError,
            r"scales must have fewer than 2\*\*31 tokens, all images together, got 1099511627776 in 1 scales",
        ),
        ({"scales": [(2**31 - 1, 2**31 - 1)] * 3}, ValueError, r"scales must have fewer than 2\*\*31 tokens"),
        (
            {"latent": randn(8, 8, 1, 1), "scales": [(2**14, 2**14)]},
            ValueError,
            r"scales must have fewer than 2\*\*31 tokens",
        ),
    ],
)
def test_bad_input(change, error, message):
    good = {"latent": randn(1, 8, 4, 4), "codebook": randn(5, 8), "scales": [(1, 1)]}
    with pytest.raises(error, match="vq_lookup_multiscale: " + message):
        flexvar_ext.vq_lookup_multiscale(**{**good, **change})
    assert flexvar_ext.vq_lookup_multiscale(**good).shape == (1, 1)


def test_bad_arguments_do_not_reach_the_kernel():
    latent, codebook = randn(1, 8, 4, 4), randn(5, 8)
    for heights, widths, mode, antialias in (
        ([1], [1, 2], "area", False),
        ([0], [1], "area", False),
        ([1], [1], "cubic", False),
        ([1], [1], "area", True),
    ):
        with pytest.raises(RuntimeError, match="vq_lookup_multiscale: "):
            torch.ops.flexvar.vq_lookup_multiscale(latent, codebook, heights, widths, True, mode, antialias)
