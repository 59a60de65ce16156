"""Recorded generations: what is replayed equals what is computed, and nothing stale is replayed.

Without a GPU a recorder stands in for CUDA graphs that computes anew, in place, what it recorded.
"""

from __future__ import annotations

import copy
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flexvar import FlexVARPipeline, FlexVARTransformer, MultiScaleTokenizer, TokenizerConfig, TransformerConfig
from flexvar.generation import Inpaint, pipeline
from flexvar.generation.cuda_graphs import CudaRecorder, GraphCache

OPTIONS: dict[str, Any] = {"schedule": [1, 2, (3, 4)], "output_type": "latent"}


class Recomputing:
    """A recorder. ``count`` is how often any of its recordings was replayed."""

    count = 0

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def record(self, function: Callable[[], torch.Tensor | None]) -> tuple[torch.Tensor | None, Callable[[], None]]:
        output = function()

        def replay() -> None:
            Recomputing.count += 1
            again = function()
            if output is not None and again is not None:
                with torch.inference_mode():
                    output.copy_(again)

        return output, replay


@pytest.fixture
def pipe() -> FlexVARPipeline:
    modes = {"downsample_mode": "bilinear", "upsample_mode": "bilinear"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = MultiScaleTokenizer(TokenizerConfig(64, 8, 32, 32, (1, 1, 2), num_res_blocks=1, **modes))
        transformer = FlexVARTransformer(TransformerConfig(2, 64, 2, 5, 64, 8, upsample_mode="bilinear"))
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return FlexVARPipeline(tokenizer, transformer)


@pytest.fixture(autouse=True)
def no_replays_yet() -> None:
    Recomputing.count = 0


def record_on_cpu(pipe: FlexVARPipeline, capacity: int = 2) -> GraphCache:
    pipe.cuda_graphs = GraphCache(capacity, Recomputing, "cpu")
    return pipe.cuda_graphs


def pyramid(pipe: FlexVARPipeline, labels: Any = (1, 2), **options: Any) -> list[torch.Tensor]:
    return pipe(list(labels), **{**OPTIONS, **options}).pyramid


def assert_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("options", [{}, {"guidance_style": "off"}, {"autocast_dtype": torch.bfloat16, "top_k": 5}])
def test_the_second_call_records_and_the_third_replays(pipe: FlexVARPipeline, options: dict[str, Any]) -> None:
    calls = [{"labels": (1, 2), "seed": 0}, {"labels": (0, 3), "seed": 7}, {"labels": (4, 4), "image_ids": [5, 6]}]
    expected = [pyramid(pipe, **call, **options) for call in calls]
    cache = record_on_cpu(pipe)
    found = [pyramid(pipe, **call, **options) for call in calls]
    for a, b in zip(found, expected, strict=True):
        assert_equal(a, b)
    assert len(cache) == 1
    assert Recomputing.count == 2 * 2 * 3


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_decoding_is_recorded_for_its_shape(pipe: FlexVARPipeline, autocast_dtype: torch.dtype | None) -> None:
    def image(seed: int, labels: tuple[int, ...] = (1, 2)) -> torch.Tensor:
        return pipe(labels, **{**OPTIONS, "output_type": "pt"}, seed=seed, autocast_dtype=autocast_dtype).images

    expected = [image(seed) for seed in range(5)]
    cache = record_on_cpu(pipe)
    found = [image(seed) for seed in range(4)]
    assert_equal(found, expected[:4])
    assert Recomputing.count == 3 * 2 * 3 + 3
    image(4, (1,))
    assert len(cache._decoders) == 2
    with torch.no_grad():
        for parameter in pipe.tokenizer.parameters():
            parameter.mul_(1.1)
    changed = image(4)
    assert not torch.equal(changed, expected[4])
    pipe.cuda_graphs = GraphCache(0)
    assert torch.equal(image(4), changed)


def test_large_images_are_decoded_without_a_recording(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = record_on_cpu(pipe)
    monkeypatch.setattr(pipeline, "_MAX_RECORDED_PIXELS", 2 * 12 * 16 - 1)
    for _ in range(2):
        pipe([1, 2], schedule=[1, 2, (3, 4)], output_type="pt")
    assert len(cache) == 1
    assert not cache._decoders


def test_results_are_not_overwritten(pipe: FlexVARPipeline) -> None:
    record_on_cpu(pipe)
    pyramid(pipe)
    first = pyramid(pipe, seed=1)
    kept = [indices.clone() for indices in first]
    pyramid(pipe, seed=2)
    assert_equal(first, kept)


def test_edits_force_their_tokens(pipe: FlexVARPipeline) -> None:
    image = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 12, 16)
    mask[..., :8] = 1
    edit = Inpaint(image, mask)
    expected = pipe([1, 2], edit=edit, schedule=[1, 2, (3, 4)], seed=3, output_type="pt")
    cache = record_on_cpu(pipe)
    for _ in range(3):
        found = pipe([1, 2], edit=edit, schedule=[1, 2, (3, 4)], seed=3, output_type="pt")
        assert_equal(found.pyramid, expected.pyramid)
    assert len(cache) == 1


def test_two_streams_of_a_kind_at_once(pipe: FlexVARPipeline) -> None:
    expected = [pyramid(pipe, seed=seed) for seed in (1, 2)]
    record_on_cpu(pipe)
    pyramid(pipe)
    streams = [pipe.stream([1, 2], seed=seed, schedule=[1, 2, (3, 4)]) for seed in (1, 2)]
    found = [[step.indices for step in steps] for steps in zip(*streams, strict=True)]
    for stream in (0, 1):
        assert_equal([indices[stream] for indices in found], expected[stream])


def test_eight_threads_draw_what_one_draws(pipe: FlexVARPipeline) -> None:
    seeds = range(8)
    expected = [pipe([1], seed=seed, **OPTIONS).pyramid for seed in seeds]

    class Slow(Recomputing):
        def record(self, function: Callable[[], torch.Tensor | None]) -> Any:
            time.sleep(0.01)  # so that others come while this one records
            return super().record(function)

    pipe.cuda_graphs = GraphCache(2, Slow, "cpu")
    pipe([1], seed=0, **OPTIONS)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            found = list(pool.map(lambda seed: pipe([1], seed=seed, **OPTIONS).pyramid, seeds))
            for one, other in zip(found, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert Recomputing.count > 0
    assert len(copy.deepcopy(pipe.cuda_graphs)) == 0


def test_an_abandoned_stream_gives_its_recording_back(pipe: FlexVARPipeline) -> None:
    expected = pyramid(pipe, seed=4)
    record_on_cpu(pipe)
    for _ in range(2):
        stream = pipe.stream([1, 2], schedule=[1, 2, (3, 4)])
        next(stream)
        stream.close()
    before = Recomputing.count
    assert_equal(pyramid(pipe, seed=4), expected)
    assert Recomputing.count == before + 6


def change_in_place(pipe: FlexVARPipeline) -> None:
    with torch.no_grad():
        pipe.transformer.pos_1LC.mul_(-2)


def move(pipe: FlexVARPipeline) -> None:
    pipe.transformer.head.weight.data = pipe.transformer.head.weight.data.flip(0).clone()


@pytest.mark.parametrize("change", [change_in_place, move])
def test_other_weights_are_noticed(pipe: FlexVARPipeline, change: Callable[[FlexVARPipeline], None]) -> None:
    cache = record_on_cpu(pipe)
    for _ in range(3):
        before = pyramid(pipe)
    assert len(cache) == 1
    change(pipe)
    found = pyramid(pipe)
    assert len(cache) == 0
    pipe.cuda_graphs = GraphCache(0)
    assert_equal(found, pyramid(pipe))
    assert any(not torch.equal(x, y) for x, y in zip(found, before, strict=True))


def test_the_kinds_used_last_are_kept(pipe: FlexVARPipeline) -> None:
    cache = record_on_cpu(pipe, capacity=2)
    for top_k in (1, 1, 2, 2, 3, 3):
        pyramid(pipe, top_k=top_k)
    assert len(cache) == 2
    replayed = Recomputing.count
    pyramid(pipe, top_k=3)
    assert Recomputing.count == replayed + 6
    pyramid(pipe, top_k=1)  # forgotten: the first of its kind again
    assert Recomputing.count == replayed + 6
    cache.clear()
    assert len(cache) == 0


class Addresses(Recomputing):
    """A recorder that, as a CUDA graph does, keeps nothing alive that was there before."""

    def record(self, function: Callable[[], torch.Tensor | None]) -> tuple[torch.Tensor | None, Callable[[], None]]:
        return function(), lambda: None


def test_what_recordings_read_stays_where_it_is(pipe: FlexVARPipeline) -> None:
    reference = FlexVARPipeline(pipe.tokenizer, FlexVARTransformer(pipe.transformer.config, backend="reference"))
    reference.cuda_graphs = GraphCache(20, Addresses, "cpu")
    for _ in range(2):
        pyramid(reference, autocast_dtype=torch.bfloat16)
    (positions,) = reference.transformer._positions._entries.values()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        read = [positions, reference.transformer.head.cast_weight()]
    kept = [weakref.ref(tensor) for tensor in read]
    del positions, read
    pyramid(reference, autocast_dtype=torch.float16)
    for side in range(3, 13):
        pyramid(reference, schedule=[1, side])
    gc.collect()
    assert len(reference.cuda_graphs) == 1
    assert all(tensor() is not None for tensor in kept)
    reference.cuda_graphs.clear()
    gc.collect()
    assert kept[0]() is None


def test_one_recording_at_a_time_on_a_stream_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole process: torch can no more. Stand-ins for torch's CUDA."""
    devices, underway, recorded = ["cuda:0"], [], []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        devices.append(str(chosen))
        yield
        devices.pop()

    @contextmanager
    def graph(_: object, *, stream: str, **options: object) -> Iterator[None]:
        underway.append(stream)
        time.sleep(0.005)
        recorded.append((*underway, devices[-1]))
        yield
        underway.pop()

    for name, stand_in in {
        "device": device, "graph": graph, "Stream": lambda: f"stream of {devices[-1]}",
        "CUDAGraph": lambda: SimpleNamespace(replay=None), "graph_pool_handle": lambda: (0, 1),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(CudaRecorder, "_streams", {})
    with ThreadPoolExecutor(4) as pool:
        for index in (0, 1, 1, 0, 1):
            pool.submit(CudaRecorder(torch.device("cuda", index)).record, lambda: None)
    assert sorted(recorded) == [(f"stream of cuda:{index}", f"cuda:{index}") for index in (0, 0, 1, 1, 1)]


def test_a_failure_while_recording_leaves_nothing(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = record_on_cpu(pipe)
    expected = pyramid(pipe)
    with monkeypatch.context() as patched:
        patched.setattr(Recomputing, "record", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pyramid(pipe)
    assert len(cache) == 0
    assert_equal(pyramid(pipe), expected)
    assert len(cache) == 1


@pytest.mark.parametrize(("capacity", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_capacity(capacity: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="GraphCache: capacity must be"):
        GraphCache(capacity)


@pytest.mark.cuda
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_on_a_gpu(pipe: FlexVARPipeline, autocast_dtype: torch.dtype | None) -> None:
    pipe.to("cuda")
    pipe.cuda_graphs = GraphCache(0)
    expected = [pyramid(pipe, seed=seed, autocast_dtype=autocast_dtype) for seed in range(4)]
    pipe.cuda_graphs = GraphCache(2)
    for seed in range(4):
        assert_equal(pyramid(pipe, seed=seed, autocast_dtype=autocast_dtype), expected[seed])
    assert len(pipe.cuda_graphs) == 1


@pytest.mark.cuda
def test_no_synchronisation_inside_a_generation(pipe: FlexVARPipeline) -> None:
    pipe.to("cuda")
    for _ in range(3):
        stream = pipe.stream([1, 2], schedule=[1, 2, 4, 5])
        next(stream)
        torch.cuda.set_sync_debug_mode("error")
        try:
            next(stream)
            next(stream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        next(stream)
