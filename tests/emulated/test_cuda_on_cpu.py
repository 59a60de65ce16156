"""What the emulation offers to kernels (csrc/testing/self_test.cpp) against numpy."""

import numpy as np
import pytest
import torch


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)


def float_of(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()


SHAPES = [(1, 1, 8), (16, 8, 16), (33, 40, 72), (65, 31, 128)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("by_shuffles", [False, True], ids=["mma", "shuffles"])
@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_gemm_of_small_integers_is_exact(emulated, run_in_every_order, m, n, k, by_shuffles, dtype):
    rng = np.random.default_rng(m * n * k)
    a, b = (rng.integers(-8, 9, (rows, k)).astype(np.float32) for rows in (m, n))
    encode = bfloat16_bits if dtype == "bfloat16" else lambda x: x.astype(np.float16)
    (c,) = run_in_every_order(getattr(emulated, f"gemm_{dtype}"), encode(a), encode(b), by_shuffles)
    np.testing.assert_array_equal(c, a @ b.T)


def test_mma_truncates_as_an_a100_does(emulated):
    """A term keeps one bit below the fp32 significand of the largest; the sum is truncated to fp32."""

    def product(*terms: tuple[float, float]) -> float:
        a, b = np.zeros((16, 16), np.float16), np.zeros((8, 16), np.float16)
        a[0, : len(terms)], b[0, : len(terms)] = np.array(terms, np.float16).T
        return float(emulated.gemm_half(a, b, False, emulated.Options())[0, 0])

    half_ulp = (2.0**-12, 2.0**-12)
    assert product((1, 1), half_ulp) == 1
    assert product((1, 1), half_ulp, half_ulp) == 1 + 2.0**-23
    assert product((1, 1), (2.0**-12, 2.0**-13), (2.0**-12, 2.0**-13)) == 1  # each is cut off before the sum
    assert product((-1, 1), (2.0**-12, -(2.0**-12))) == -1  # toward zero


def test_mma_propagates_infinity_and_nan(emulated):
    a, b = np.ones((16, 16), np.float16), np.ones((8, 16), np.float16)
    a[0, 0], a[1, 0], a[1, 1], a[2, 0] = np.inf, np.inf, -np.inf, np.nan
    c = emulated.gemm_half(a, b, False, emulated.Options())
    assert c[0, 0] == np.inf
    assert np.isnan(c[1, 0])
    assert np.isnan(c[2, 0])
    np.testing.assert_array_equal(c[3:], 16)


def test_tf32(emulated, run_in_every_order):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 8)).astype(np.float32), rng.standard_normal((8, 8)).astype(np.float32)

    def round_to_tf32(x: np.ndarray) -> np.ndarray:
        return ((x.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32).astype(np.float64)

    exact = round_to_tf32(a) @ round_to_tf32(b)
    (c,) = run_in_every_order(emulated.tf32, a, b)
    np.testing.assert_allclose(c[0], exact, atol=8 * 2.0**-22)
    np.testing.assert_allclose(c[1], exact, atol=8 * 2.0**-22)


def test_ldmatrix(emulated, run_in_every_order):
    rows = np.arange(256, dtype=np.uint16).reshape(32, 8)
    plain, transposed = run_in_every_order(emulated.ldmatrix, rows)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for matrix in range(4):
            block = rows[8 * matrix : 8 * matrix + 8]
            np.testing.assert_array_equal(plain[lane, matrix], block[g, 2 * t : 2 * t + 2])
            np.testing.assert_array_equal(transposed[lane, matrix], block[2 * t : 2 * t + 2, g])


def test_warp_operations(emulated, run_in_every_order):
    x = np.random.default_rng(0).integers(-50, 50, 96).astype(np.int32)
    (rows,) = run_in_every_order(emulated.warp_operations, x)
    lane = np.arange(32)
    for warp in range(3):
        v = x[32 * warp : 32 * warp + 32]
        expected = [
            np.full(32, v[5]),
            v[lane // 8 * 8 + (lane + 1) % 8],
            np.where(lane >= 3, v[lane - 3], v),
            np.where(lane % 16 < 14, v[np.minimum(lane + 2, 31)], v),
            v[lane ^ 9],
            np.full(32, np.sum((v > 0).astype(np.uint32) << lane.astype(np.uint32), dtype=np.uint32)),
            np.full(32, np.all(v > -100)),
            np.full(32, np.any(v > 100)),
            np.array([np.sum((v == w).astype(np.uint32) << lane.astype(np.uint32), dtype=np.uint32) for w in v]),
            np.full(32, v.sum()),
            np.full(32, v.min()),
            np.full(32, v.max()),
            np.full(32, np.bitwise_xor.reduce(v)),
            np.full(32, np.sum(x > 0)),
            np.full(32, np.all(x > 0)),
            np.full(32, np.any(x > 0)),
        ]
        for row, values in zip(rows[:, 32 * warp : 32 * warp + 32], expected, strict=True):
            np.testing.assert_array_equal(row.view(np.uint32), values.astype(np.int64).astype(np.uint32))


@pytest.mark.parametrize("rounds", [1, 2, 3, 9])
def test_named_barriers(emulated, run_in_every_order, rounds):
    x = np.arange(32 * rounds, dtype=np.int32).reshape(rounds, 32)
    (y,) = run_in_every_order(emulated.producer_consumer, x)
    np.testing.assert_array_equal(y, x.sum(0)[::-1])


@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_last_block_sums_what_all_left(emulated, run_in_every_order, blocks):
    x = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    (total,) = run_in_every_order(emulated.sum, x, blocks)
    np.testing.assert_allclose(total[0], x.astype(np.float64).sum(), rtol=1e-4)


class TestSixteenBitFloats:
    ALL = np.arange(65536, dtype=np.uint32).astype(np.uint16)

    def test_decode(self, emulated):
        np.testing.assert_array_equal(emulated.decode_half(self.ALL), self.ALL.view(np.float16).astype(np.float32))
        np.testing.assert_array_equal(emulated.decode_bfloat16(self.ALL), float_of(self.ALL))

    def test_encode(self, emulated):
        """Every value, every midpoint of two neighbours (ties to even) and its two float neighbours."""
        for decode, encode, expected in [
            (emulated.decode_half, emulated.encode_half, lambda x: x.astype(np.float16).view(np.uint16)),
            (emulated.decode_bfloat16, emulated.encode_bfloat16, bfloat16_bits),
        ]:
            values = decode(self.ALL)
            values = np.sort(values[np.isfinite(values)])
            middle = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
            x = np.concatenate([values, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)])
            x = np.concatenate([x, np.float32([np.inf, -np.inf, 65519.99, 65520, 3.4e38, -3.4e38, 1e-45, -1e-45])])
            with np.errstate(over="ignore"):
                np.testing.assert_array_equal(encode(x), expected(x))
            assert np.isnan(decode(encode(np.float32([np.nan])))).all()

    @pytest.mark.parametrize("dtype", ["half", "bfloat16"])
    def test_fma_rounds_once(self, emulated, dtype):
        rng = np.random.default_rng(0)
        a, b, c = (rng.integers(0, 65536, 20000).astype(np.uint16) for _ in range(3))
        decode = getattr(emulated, f"decode_{dtype}")
        mantissa = 10 if dtype == "half" else 7
        with np.errstate(all="ignore"):
            x, y, z = (decode(bits).astype(np.longdouble) for bits in (a, b, c))
            exact = x * y + z  # 64 bits of significand: wrong only where the terms are far apart
            result = decode(getattr(emulated, f"fma_{dtype}")(a, b, c)).astype(np.longdouble)
        finite = np.isfinite(result) & np.isfinite(exact)
        assert finite.sum() > 5000
        result, exact = result[finite], exact[finite]
        exponent = np.maximum(np.frexp(exact)[1] - 1, -14 if dtype == "half" else -126)
        assert (np.abs(result - exact) <= np.ldexp(np.longdouble(0.5), exponent - mantissa)).all()
