"""The CUDA launchers of vq_lookup, run on the CPU: their indices must equal the CPU kernel's, which is exact."""

import pytest
import torch

import flexvar_ext

MODES = [("nearest", False), ("bilinear", False), ("bilinear", True), ("bicubic", False), ("area", False)]


# Rows that begin at multiples of 16 bytes are read where they are, when few; others after a kernel that prepares them.
EITHER_WAY = pytest.mark.parametrize("misalignment", [0, 1], ids=["direct", "prepared"])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(launch, latents, codebook, normalize=True, multiprocessors=1, **options) -> None:
    (indices,) = launch("vq_lookup", latents, codebook, normalize, multiprocessors=multiprocessors, **options)
    assert torch.equal(indices, torch.ops.flexvar.vq_lookup(latents, codebook, normalize))


@EITHER_WAY
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dim", [1, 4, 8, 21, 32, 36, 48, 52, 64, 70])
def test_dims(launch_in_every_order, misalignment, dim, normalize):
    check(launch_in_every_order, randn(33, dim), randn(150, dim, seed=1), normalize, misalignment=misalignment)


@EITHER_WAY
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("count", "codes"), [(1, 1), (2, 127), (7, 129), (65, 300), (257, 130), (129, 64)])
def test_sizes(launch_in_every_order, misalignment, count, codes, normalize):
    check(launch_in_every_order, randn(count, 32), randn(codes, 32, seed=1), normalize, misalignment=misalignment)


@EITHER_WAY
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_split_codes(launch_in_every_order, misalignment, multiprocessors, normalize):
    check(
        launch_in_every_order,
        randn(20, 32),
        randn(1000, 32, seed=1),
        normalize,
        multiprocessors,
        misalignment=misalignment,
    )


@pytest.mark.parametrize("warpgroups", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("count", "dim", "multiprocessors"), [(300, 8, 1), (600, 32, 2), (333, 40, 1), (290, 64, 1)])
def test_blocks_that_end_within_tiles(launch_in_every_order, count, dim, multiprocessors, normalize, warpgroups):
    """Enough for large tiles, whose codes several blocks share unevenly."""
    check(
        launch_in_every_order,
        randn(count, dim),
        randn(1700, dim, seed=1),
        normalize,
        multiprocessors,
        warpgroups=warpgroups,
    )


@EITHER_WAY
@pytest.mark.parametrize("warpgroups", [True, False])
def test_rows_with_many_near_ties_among_others(launch_in_every_order, misalignment, warpgroups):
    """More than a subgroup's maxima hold, in some rows only: a block goes through those together."""
    latents, codebook = randn(45, 32), randn(1700, 32, seed=1)
    codebook[:1024:64] = latents[3] + 1e-4 * randn(16, 32, seed=2)
    codebook[5:1600:64] = latents[4] + 1e-4 * randn(25, 32, seed=3)
    codebook[1300:1308] = latents[44] + 1e-6 * randn(8, 32, seed=4)
    codebook[1600:] = latents[10]
    codebook[1601] *= float("nan")
    check(launch_in_every_order, latents, codebook, misalignment=misalignment, warpgroups=warpgroups)


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_more_chunks_than_fit_a_block(launch_once, multiprocessors):
    check(launch_once, randn(3, 8), randn(2 * 16384 + 77, 8, seed=1), True, multiprocessors)


@pytest.mark.parametrize("count", [768, 769])
def test_the_most_latents_that_are_few(launch_once, count):
    """Twelve tiles of 64 rows and one stage of codes, for one multiprocessor; and one row more."""
    check(launch_once, randn(count, 16), randn(70, 16, seed=1))


@EITHER_WAY
@pytest.mark.parametrize("normalize", [True, False])
def test_rows_of_zeros(launch_in_every_order, misalignment, normalize):
    latents, codebook = randn(9, 32), randn(200, 32, seed=1)
    latents[2], latents[7] = 0, 1e-20
    codebook[5], codebook[130] = 0, 1e-14
    check(launch_in_every_order, latents, codebook, normalize, misalignment=misalignment)
    check(launch_in_every_order, -codebook[10:15], codebook[:8], normalize, misalignment=misalignment)


@EITHER_WAY
def test_equal_codes_in_distant_chunks(launch_in_every_order, misalignment):
    """The nearest is in two groups, of other lanes and blocks, and rounds alike in fp32: the first of them wins."""
    latents, codebook = randn(6, 32), randn(1000, 32, seed=1)
    codebook[[997, 3]] = codebook[[500, 69]] = latents[:2]
    codebook[[640, 12]] = 2 * latents[2]
    codebook[901] = latents[3] * (1 + 2**-20)
    codebook[900] = latents[3]
    check(launch_in_every_order, latents, codebook, True, 3, misalignment=misalignment)


@EITHER_WAY
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("distance", [1e-3, 1e-5, 1e-7])
def test_close_codes(launch_in_every_order, misalignment, distance, normalize):
    """Within the error of tensor cores, of packing, and of fp32: groups of candidates, up to whole subgroups."""
    centres = randn(20, 32)
    codebook = centres.repeat(30, 1) + distance * randn(600, 32, seed=1)
    check(launch_in_every_order, centres + 1e-2 * randn(20, 32, seed=2), codebook, normalize, misalignment=misalignment)


@EITHER_WAY
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_codes(launch_in_every_order, misalignment, normalize):
    check(
        launch_in_every_order,
        randn(9, 32),
        randn(1, 32, seed=1).repeat(700, 1),
        normalize,
        3,
        misalignment=misalignment,
    )
    check(
        launch_in_every_order, randn(9, 32), randn(50, 32, seed=1).repeat(9, 1), normalize, 3, misalignment=misalignment
    )


@EITHER_WAY
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite(launch_in_every_order, misalignment, value, normalize):
    latents, codebook = randn(20, 32), randn(100, 32, seed=1)
    latents[3], latents[5, 1], codebook[0, 0], codebook[7] = value, -value, -value, value
    check(launch_in_every_order, latents, codebook, normalize, misalignment=misalignment)
    check(launch_in_every_order, latents, torch.full_like(codebook, value), normalize, misalignment=misalignment)


@EITHER_WAY
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-15, 1e15, 1e25, 1e38])
def test_extreme_magnitudes(launch_in_every_order, misalignment, scale, normalize):
    latents, codebook = (randn(10, 16) * scale).clamp(-3e38, 3e38), (randn(150, 16, seed=1) * scale).clamp(-3e38, 3e38)
    check(launch_in_every_order, latents, codebook, normalize, misalignment=misalignment)


@EITHER_WAY
def test_components_below_half_precision(launch_in_every_order, misalignment):
    """Rows of a few large components and many that fp16 rounds to nothing."""
    latents, codebook = randn(30, 32), randn(300, 32, seed=1)
    latents[:, 2:] *= 1e-6
    codebook[:, 2:] *= 1e-6
    codebook[:, :2] = codebook[:1, :2]
    check(launch_in_every_order, latents, codebook, misalignment=misalignment)


@EITHER_WAY
def test_codes_at_the_error_bound(launch_in_every_order, misalignment):
    """fp16 rounds every component of rows and second nearest codes up, and every one of the nearest codes down."""
    middle, spacing = (1 + 2**-11) / 8, 2**-13  # of 1/8 and the next number of fp16
    signs = torch.where(randn(6, 64) < 0, -1.0, 1.0)

    def rows(components):  # of length 1: normalising changes no rounding
        last = (1 - components.double().square().sum()).sqrt().float()
        return signs * torch.cat([components, last[None]])

    up, down = torch.full((63,), middle + 2**-23), torch.full((63,), middle - 2**-23)
    further_up = up.clone()
    further_up[:8] += 2 * spacing
    others = torch.nn.functional.normalize(randn(294, 64, seed=1))
    latents, codebook = rows(up), torch.cat([rows(further_up), others, rows(down)])
    assert torch.equal((latents.half().double() @ codebook.half().double().T).argmax(1), torch.arange(6))
    assert torch.equal((latents.double() @ codebook.double().T).argmax(1), torch.arange(300, 306))
    check(launch_in_every_order, latents, codebook, misalignment=misalignment)


@EITHER_WAY
@pytest.mark.parametrize("multiprocessors", [1, 2], ids=["many", "few"])
@pytest.mark.parametrize("dim", [16, 32, 48, 64])
def test_near_ties_and_odd_rows(launch_in_every_order, misalignment, multiprocessors, dim):
    """One row of tiles and 14 stages, too many for one multiprocessor to normalise the codes tile by tile."""
    latents, codebook = randn(40, dim), randn(1700, dim, seed=1)
    codebook[200:240] = latents + 1e-4 * randn(40, dim, seed=2)
    codebook[700:740] = latents + 1e-4 * randn(40, dim, seed=3)
    codebook[1000:1020] = codebook[200:220]
    codebook[3], codebook[4, 1], codebook[5], latents[0], latents[1] = 0, float("nan"), float("inf"), float("nan"), 0
    codebook[[6, 200, 702]] *= 1e25
    codebook[[7, 203, 203, 704]] *= 1e-25
    latents[[2, 5]] *= 1e25
    latents[[3, 6]] *= 1e-25
    check(launch_in_every_order, latents, codebook, True, multiprocessors, misalignment=misalignment)


def test_inputs_that_lie_otherwise(launch_in_every_order):
    check(launch_in_every_order, randn(20, 21), randn(100, 21, seed=1), misalignment=1)
    check(launch_in_every_order, randn(21, 20).T, randn(200, 42, seed=1)[::2, 1::2])
    check(launch_in_every_order, randn(1, 32).expand(5, 32), randn(100, 1, seed=1).expand(100, 32))
    check(launch_in_every_order, randn(0, 32), randn(100, 32, seed=1))


def check_multiscale(launch, latent, codebook, scales, mode, normalize):
    arguments = (latent, codebook, *map(list, zip(*scales, strict=True)), normalize, *mode)
    (indices,) = launch("vq_lookup_multiscale", *arguments, multiprocessors=1)
    assert torch.equal(indices, torch.ops.flexvar.vq_lookup_multiscale(*arguments))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalize", [True, False])
def test_multiscale(launch_in_every_order, mode, normalize):
    scales, codebook = [(1, 1), (2, 3), (7, 5), (4, 9)], randn(100, 8, seed=1)
    check_multiscale(launch_in_every_order, randn(2, 8, 7, 5), codebook, scales, mode, normalize)
    last = randn(2, 7, 5, 8).permute(0, 3, 1, 2)
    check_multiscale(launch_in_every_order, last, codebook, scales[:2], mode, normalize)


@pytest.mark.parametrize("dim", [6, 16], ids=["prepared", "four channels a thread"])
def test_multiscale_dims(launch_in_every_order, dim):
    scales = [(1, 1), (2, 3), (7, 5), (4, 9)]
    for normalize in (True, False):
        for mode in MODES:
            latent, codebook = randn(2, dim, 7, 5), randn(100, dim, seed=1)
            check_multiscale(launch_in_every_order, latent, codebook, scales, mode, normalize)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("batch", "dim"), [(2, 8), (4, 16)], ids=["one channel a thread", "four"])
def test_rows_resampled_to_the_last_bit(launch_in_every_order, mode, batch, dim):
    """Codes a bit apart in one component of every row; windows of up to 35 columns."""
    latent, scales = randn(batch, dim, 5, 35), [(1, 1), (2, 2), (3, 4), (7, 1)]
    parts = [
        flexvar_ext.reference.resample2d(latent.double(), scale, mode=mode[0], antialias=mode[1]) for scale in scales
    ]
    rows = torch.cat([part.flatten(2).transpose(1, 2).flatten(0, 1) for part in parts]).float()
    above, below = rows.clone(), rows.clone()
    n = torch.arange(len(rows))
    above[n, n % dim] = above[n, n % dim].nextafter(torch.tensor(9.0))
    below[n, n % dim] = below[n, n % dim].nextafter(torch.tensor(-9.0))
    codebook = torch.cat([above, rows, below])
    check_multiscale(launch_in_every_order, latent, codebook, scales, mode, False)


def test_more_scales_than_a_launch_takes(launch_in_every_order):
    scales = [(1 + i % 3, 1 + i % 4) for i in range(33)]
    check_multiscale(launch_in_every_order, randn(2, 8, 7, 5), randn(100, 8, seed=1), scales, ("area", False), True)
