"""append_qkv: queries and keys normalised, keys and values put into their caches, and nothing else touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flexvar_ext
from flexvar_ext import _host, reference
from tests.tolerances import assert_as_accurate_as_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAIRS = [(a, b) for a in DTYPES for b in DTYPES] + [(torch.float64, torch.float64)]
INSTRUCTION_SETS = _host.build_info()["cpu_instruction_sets"].split()
INSTRUCTION_SETS = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_host.cpu_isa()) + 1]


def problem(
    shape: tuple[int, int, int, int] = (2, 5, 3, 64),
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    room: int = 9,
    device: Any = "cpu",
) -> dict[str, Tensor]:
    """``shape`` is (B, l, H, D). Caches hold NaN, which must stay outside the step's tokens."""
    batch, tokens, heads, dim = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 3, heads, dim, generator=generator, dtype=torch.float64) * 3
    cache = torch.full((batch, room, heads, dim), torch.nan, dtype=cache_dtype or dtype, device=device)
    scale = torch.rand(heads, generator=generator, dtype=torch.float64) * 10
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "qkv": qkv.to(dtype).to(device),
        "k_cache": cache,
        "v_cache": cache.clone(),
        "q_scale": scale.to(arithmetic).to(device),
    }


def run(op: Any, tensors: dict[str, Tensor], position: int = 2, *, normalize: bool = True) -> tuple[Tensor, ...]:
    """Queries and both caches; the caches given stay as they are."""
    k_cache, v_cache = tensors["k_cache"].clone(), tensors["v_cache"].clone()
    q = op(tensors["qkv"], k_cache, v_cache, position, q_scale=tensors["q_scale"] if normalize else None)
    return q, k_cache, v_cache


def assert_accurate(tensors: dict[str, Tensor], position: int = 2, *, normalize: bool = True) -> None:
    tokens = tensors["qkv"].shape[1]
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    results = zip(
        run(flexvar_ext.append_qkv, tensors, position, normalize=normalize),
        run(reference.append_qkv, tensors, position, normalize=normalize),
        run(reference.append_qkv, exact, position, normalize=normalize),
        strict=True,
    )
    for index, (native, same_dtype, expected) in enumerate(results):
        if index:
            kept = torch.ones(native.shape[1], dtype=torch.bool)
            kept[position : position + tokens] = False
            assert native[:, kept].isnan().all()
            native, same_dtype, expected = (x[:, ~kept] for x in (native, same_dtype, expected))
        assert_as_accurate_as_torch(native, same_dtype, expected)


@pytest.mark.parametrize(("dtype", "cache_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_as_accurate_as_torch(device, dtype, cache_dtype, normalize):
    assert_accurate(problem(dtype=dtype, cache_dtype=cache_dtype, device=device), normalize=normalize)


@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 63, 64, 65, 127, 255, 257, 680])
def test_shapes(device, tokens, dim):
    assert_accurate(problem((2, tokens, 2, dim), torch.bfloat16, room=tokens + 3, device=device), 3)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize(("dtype", "cache_dtype"), PAIRS, ids=str)
def test_every_instruction_set(monkeypatch, instruction_set, dtype, cache_dtype):
    monkeypatch.setenv("FLEXVAR_CPU_ISA", instruction_set)
    assert_accurate(problem((1, 7, 3, 96), dtype, cache_dtype))


def test_copies_are_exact_without_a_scale(device):
    tensors = problem(device=device)
    q, k_cache, v_cache = run(flexvar_ext.append_qkv, tensors, normalize=False)
    for part, found in enumerate((q, k_cache[:, 2:7], v_cache[:, 2:7])):
        assert torch.equal(found, tensors["qkv"][:, :, part])


def test_zero_and_tiny_and_not_finite_vectors(device):
    tensors = problem((1, 5, 1, 32), device=device)
    tensors["qkv"][0, 0, :2] = 0
    tensors["qkv"][0, 1, :2] = 1e-20
    tensors["qkv"][0, 2, :2, :, 3] = torch.nan
    tensors["qkv"][0, 3, :2, :, 3] = torch.inf
    tensors["qkv"][0, 4, :2] *= 1e-40  # denormal
    for native, expected in zip(run(flexvar_ext.append_qkv, tensors), run(reference.append_qkv, tensors), strict=True):
        torch.testing.assert_close(native, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_layouts(device):
    tensors = problem(device=device)
    expected = run(flexvar_ext.append_qkv, tensors)
    qkv = tensors["qkv"]
    strided = torch.empty(2, 5, 3, 3, 130, device=device)[..., 1:129:2].copy_(qkv)
    offset = torch.empty(qkv.numel() + 1, device=device)[1:].view(qkv.shape).copy_(qkv)
    for layout in (qkv.transpose(0, 1).contiguous().transpose(0, 1), strided, offset):
        found = run(flexvar_ext.append_qkv, dict(tensors, qkv=layout))
        assert all(torch.equal(a, b) for a, b in zip(found[:1], expected[:1], strict=True))
        assert torch.equal(found[1][:, 2:7], expected[1][:, 2:7])
    whole = torch.full((4, 9 * 2 * 3 * 64 + 1), torch.nan, device=device)  # caches that are slices, off by one element
    k_cache, v_cache = (whole[i, 1:].view(2, 9, 3, 64) for i in (1, 2))
    flexvar_ext.append_qkv(qkv, k_cache, v_cache, 2, q_scale=tensors["q_scale"])
    assert torch.equal(k_cache[:, 2:7], expected[1][:, 2:7])
    assert torch.equal(v_cache[:, 2:7], expected[2][:, 2:7])
    assert whole[[0, 3]].isnan().all()


def test_expanded_and_strided_arguments(device):
    tensors = problem(device=device)
    one = tensors["qkv"][:1]
    scale = torch.stack([tensors["q_scale"], -tensors["q_scale"]], dim=1)[:, 0]
    found = run(flexvar_ext.append_qkv, dict(tensors, qkv=one.expand(2, -1, -1, -1, -1), q_scale=scale))
    expected = run(flexvar_ext.append_qkv, dict(tensors, qkv=one.repeat(2, 1, 1, 1, 1)))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, expected, strict=True))


def test_repeats_are_bit_equal(device):
    tensors = problem(dtype=torch.bfloat16, device=device)
    expected = run(flexvar_ext.append_qkv, tensors)
    for _ in range(250):
        again = run(flexvar_ext.append_qkv, tensors)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(again, expected, strict=True))


def test_degenerate(device):
    for shape in ((0, 3, 2, 32), (2, 0, 2, 32), (2, 3, 0, 32)):
        q, _, _ = run(flexvar_ext.append_qkv, problem(shape, device=device))
        assert q.shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_the_same_in_any_batch_and_on_any_number_of_threads(dtype):
    tensors = problem((3, 300, 4, 64), dtype, room=302)
    expected = run(flexvar_ext.append_qkv, tensors)
    alone = {name: tensor[1:2, :7] for name, tensor in tensors.items() if name == "qkv"}
    caches = {name: tensors[name][1:2] for name in ("k_cache", "v_cache")}
    found = run(flexvar_ext.append_qkv, dict(tensors, **alone, **caches))
    assert torch.equal(found[0], expected[0][1:2, :7])
    assert torch.equal(found[1][:, 2:9], expected[1][1:2, 2:9])
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            again = run(flexvar_ext.append_qkv, tensors)
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(again, expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_two_views_of_one_cache_are_refused(device):
    tensors = problem(device=device)
    tensors["v_cache"] = tensors["k_cache"].view(tensors["k_cache"].shape)
    with pytest.raises(ValueError, match="append_qkv: v_cache must have memory of its own, got that of k_cache"):
        flexvar_ext.append_qkv(**tensors, position=2)


def test_opcheck(device):
    for dtype, shape in (
        (torch.float32, (2, 5, 3, 64)),
        (torch.bfloat16, (1, 1, 1, 32)),
        (torch.float64, (0, 2, 1, 96)),
    ):
        tensors = problem(shape, dtype, device=device)
        tensors["k_cache"].zero_()
        tensors["v_cache"].zero_()
        for scale in (tensors["q_scale"], None):
            torch.library.opcheck(
                torch.ops.flexvar.append_qkv, (tensors["qkv"], tensors["k_cache"], tensors["v_cache"], 2, scale)
            )


def test_compiles_whole():
    tensors = problem()

    def step(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, q_scale: Tensor) -> Tensor:
        q = flexvar_ext.append_qkv(qkv, k_cache, v_cache, 2, q_scale=q_scale)
        return flexvar_ext.scale_attention_step(q, k_cache, v_cache, 7, softmax_scale=1.0)

    caches = [torch.zeros_like(tensors["k_cache"]) for _ in range(4)]
    expected = step(tensors["qkv"], caches[0], caches[1], tensors["q_scale"])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = compiled(tensors["qkv"], caches[2], caches[3], tensors["q_scale"])
    assert torch.equal(found, expected)
    assert torch.equal(caches[2], caches[0])


BAD = [
    ({"qkv": [1]}, TypeError, r"qkv must be a torch.Tensor, got list"),
    ({"qkv": torch.zeros(2, 5, 192)}, ValueError, r"qkv must have shape \[B, l, 3, H, D\], got \(2, 5, 192\)"),
    ({"qkv": torch.zeros(2, 5, 2, 3, 64)}, ValueError, r"qkv must have shape \[B, l, 3, H, D\] with D"),
    ({"qkv": torch.zeros(2, 5, 3, 3, 48)}, ValueError, r"D = 32, 64, 96 or 128, got \(2, 5, 3, 3, 48\)"),
    ({"qkv": torch.zeros(2, 5, 3, 3, 64, dtype=torch.int64)}, TypeError, "qkv must have dtype"),
    ({"qkv": torch.zeros(2, 5, 3, 3, 64, dtype=torch.float64)}, TypeError, "float64 only where qkv has"),
    ({"k_cache": torch.zeros(2, 9, 3, 32)}, ValueError, r"k_cache must have shape \[B, L_max, H, D\] with B, H, D"),
    ({"v_cache": torch.zeros(2, 8, 3, 64)}, ValueError, "v_cache must have shape .* one L_max, got"),
    ({"v_cache": torch.zeros(2, 9, 3, 64).half()}, TypeError, "v_cache must have the dtype of k_cache"),
    ({"k_cache": torch.zeros(2, 9, 64, 3).transpose(2, 3)}, ValueError, "k_cache must be contiguous in H and D"),
    (
        {"k_cache": torch.zeros(1, 9, 3, 64).expand(2, -1, -1, -1)},
        ValueError,
        "k_cache must have memory for every token",
    ),
    (
        {"v_cache": torch.zeros(2, 1, 3, 64).expand(-1, 9, -1, -1)},
        ValueError,
        "v_cache must have memory for every token",
    ),
    (
        dict.fromkeys(("k_cache", "v_cache"), torch.zeros(2, 9, 3, 64)),
        ValueError,
        "v_cache must have memory of its own",
    ),
    ({"position": 1.0}, TypeError, "position must be an integer, got 1.0"),
    ({"position": -1}, ValueError, "position must be in"),
    ({"position": 5}, ValueError, "position must leave room for 5 tokens in a cache of 9, got 5"),
    ({"q_scale": torch.ones(3, 1)}, ValueError, r"q_scale must have shape \[H\]"),
    ({"q_scale": torch.ones(4)}, ValueError, r"q_scale must have shape \[H\] with H = 3, got \(4,\)"),
    ({"q_scale": torch.ones(3, requires_grad=True)}, ValueError, "must not require a gradient"),
    ({"k_cache": torch.zeros(2, 9, 3, 64, device="meta")}, ValueError, "all tensors must be on one device"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD)
def test_bad_arguments(change, error, text):
    arguments = {**problem(), "position": 2, **change}
    with pytest.raises(error, match=f"append_qkv: .*{text}"):
        flexvar_ext.append_qkv(**arguments)
    run(flexvar_ext.append_qkv, problem())
