"""What the benchmarks rest on: their peers compute the same thing, their tables say what was measured."""

import pytest
import torch
from flexvar import (
    FlexVARPipeline,
    FlexVARTransformer,
    MultiScaleTokenizer,
    ScaleSchedule,
    TokenizerConfig,
    TransformerConfig,
)

from benchmarks import compiled_formula, kernel_floors, kernel_table, measure, parts, released_formula, report


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(
        TokenizerConfig(codebook_size=64, z_channels=32, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1)
    )
    transformer = FlexVARTransformer(TransformerConfig(depth=2, width=128, heads=2, num_classes=5, codebook_size=64))
    return FlexVARPipeline(tokenizer, transformer)


@pytest.mark.parametrize("formula", ["released", "compiled"])
def test_peers_give_the_pipelines_codes(pipeline, formula, monkeypatch):
    labels, schedule = torch.tensor([3, 0]), ScaleSchedule([(1, 1), (2, 3), (4, 5)])
    settings = {"guidance_scale": 2.5, "top_k": 1, "top_p": 0.0}
    out = pipeline(labels, schedule=schedule, output_type="pt", **settings)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with torch.inference_mode():
        if formula == "released":
            pyramid, images = released_formula.generate(pipeline, labels, schedule, **settings)
        else:
            pyramid, images = compiled_formula.CompiledGeneration(pipeline, labels, schedule, **settings)()
    assert all(torch.equal(found, expected) for found, expected in zip(pyramid, out.pyramid, strict=True))
    torch.testing.assert_close(images, out.images, atol=1e-4, rtol=1e-4)


def test_summary_takes_medians_of_paired_ratios():
    times = {"native": [1.0, 10.0, 2.0], "reference": [3.0, 30.0, 4.0]}
    assert measure.summarize(times, "native") == {
        "rounds": 3,
        "seconds": {"native": 2.0, "reference": 4.0},
        "ratios": {"reference": 3.0},
    }


@pytest.mark.parametrize(("one_round", "rounds"), [(0.1, 20), (1e-4, 300), (1.0, 5), (10.0, 3)])
def test_long_rounds_are_repeated_less(one_round, rounds):
    assert measure.rounds_within(2.0, one_round) == rounds


def test_a_file_of_which_no_case_is_selected_has_not_failed():
    assert report.run_file("append_qkv", "no_such_case") == ([], True)


def test_nothing_is_measured_where_peers_are_only_compiled(tmp_path):
    result = tmp_path / "result.json"
    options = ["--compile-only", "--benchmark-enable", f"--benchmark-json={result}", "-W", "ignore"]
    assert report.run_pytest(["append_qkv"], options) == 0
    assert not (result.exists() and result.read_text())


def test_table():
    case = {
        "group": "vq_lookup", "case": "test_vq_lookup[680-32]", "seconds": {"native": 2e-3}, "bytes_moved": None,
        "flops": 1e9, "gemm": "float32", "ratios": {"reference": 6.0, "compiled": 2.0, "other": 0.5},
        "targets": {"reference": 5, "compiled": 3}, "images": 64, "working_memory": 5e6,
    }  # fmt: skip
    found = report.markdown(
        {
            "device": "a CPU", "commit": "c0ffee", "date": "2026-01-01", "torch": "2.13", "python": "3.12",
            "yardsticks": {"gemm_float32": 1e12, "gemm_bfloat16": 2e12, "copy": 4e10},
            "cases": [case, {**case, "case": "test_step_back[1-2]"}], "failed": ["bench_x.py"],
        }
    )  # fmt: skip
    assert "1 TFLOP/s in float32" in found
    assert "| vq_lookup | 680-32 | 2 ms | 500 GFLOP/s = 50% of matrix product, 3.2e+04 images/s, 5 MB" in found
    assert "| vq_lookup: step back | 1-2 | 2 ms |" in found
    assert "reference 6.00× (≥5) · compiled 2.00× (≥3, missed) · other 0.50× (native slower) |" in found
    assert "Failed: bench_x.py" in found


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("void flexvar::attention_forward_tensor_core<__nv_bfloat16, 64>(AttentionForwardCuda)", "attention"),
        ("flexvar::residual_layer_norm_modulate", "AdaLN"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("at::native::vectorized_elementwise_kernel", "everything else"),
    ],
)
def test_parts_by_name(name, part):
    assert parts.part_of(name) == part


def test_parts_of_a_call():
    x = torch.randn(256, 256)
    seconds, found = parts.measure_parts(lambda: torch.mm(x, x), torch.device("cpu"))
    assert next(iter(found)) == "matrix products"
    assert 0 < seconds < 1


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "expected"),
    [
        ("90a", 128, 168, 45 << 10, 12 / 64),  # registers: 3 blocks
        ("90a", 256, 32, 0, 1.0),
        ("90a", 128, 32, 100 << 10, 8 / 64),  # shared memory: 2 blocks
        ("75", 256, 64, 74 << 10, 0.0),  # a block does not fit
        ("80", 32, 16, 0, 0.5),  # 32 blocks are the most
    ],
)
def test_occupancy(arch, threads, registers, shared, expected):
    kernel = kernel_table.Kernel("kernel", threads, registers, static_shared=0, spilled=0)
    assert kernel.occupancy(arch, shared) == expected


def test_names_of_kernels_are_readable():
    arguments = "NS_20AttentionForwardCudaENS_8TileListINS_9QueryTileEEE"
    entry = f"_ZN7flexvar29attention_forward_tensor_coreI6__halfLi64EEEv{arguments}"
    assert kernel_table.readable(entry) == "attention_forward_tensor_core<__half, 64>"


def test_a_prediction_is_never_below_a_floor():
    works = kernel_floors.works()
    assert all(work.prediction > max(work.bytes_floor, work.operations_floor) > 0 for work in works)
    assert len(kernel_floors.floor_table()) == len(works) + 4
