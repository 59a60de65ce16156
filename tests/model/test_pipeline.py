"""Generation: what an image depends on, what the loop leaves behind, what is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from flexvar import (
    FlexVARPipeline,
    FlexVARTransformer,
    KVCache,
    MultiScaleTokenizer,
    ScaleSchedule,
    TokenizerConfig,
    TransformerConfig,
)
from flexvar.generation import GenerationSettings
from flexvar.generation.settings import GenerationOptions
from PIL import Image

SMALL = ScaleSchedule([1, 2, (3, 4)])
NAMES = ("circle", "star", "heart", "Blue ring", "cross")


def random_weights(model: torch.nn.Module, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def pipe(backend: str) -> FlexVARPipeline:
    """Patches of 4 px, 64 codes, 5 classes; weights strong enough for class, position and guidance to matter."""
    modes = {"downsample_mode": "bilinear", "upsample_mode": "bilinear"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = MultiScaleTokenizer(
            TokenizerConfig(64, 8, 32, 32, (1, 1, 2), num_res_blocks=1, **modes), backend=backend
        )
        config = TransformerConfig(2, 64, 2, 5, 64, 8, upsample_mode="bilinear", class_names=NAMES)
        transformer = FlexVARTransformer(config, backend=backend)
    random_weights(transformer, 0.2)
    return FlexVARPipeline(tokenizer, transformer)


def pyramids_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def of_image(pyramid: list[torch.Tensor], image: int) -> list[torch.Tensor]:
    return [indices[image : image + 1] for indices in pyramid]


# What an image depends on


def test_same_arguments_same_images(pipe: FlexVARPipeline) -> None:
    first = pipe([1, 2], schedule=SMALL, seed=5)
    for _ in range(250 if pipe.transformer.backend == "native" else 2):
        again = pipe([1, 2], schedule=SMALL, seed=5)
        assert pyramids_equal(first.pyramid, again.pyramid)
        assert [image.tobytes() for image in first.images] == [image.tobytes() for image in again.images]


@pytest.fixture(scope="module", params=[None, torch.bfloat16], ids=["as stored", "bfloat16 autocast"])
def pipe_and_autocast(request: pytest.FixtureRequest, pipe: FlexVARPipeline, backend: str) -> Any:
    """Native ops are exact in any batch. Plain PyTorch rounds by its size: in float64, no draw sees that."""
    if backend == "native":
        return pipe, request.param
    if request.param is not None:
        pytest.skip("plain PyTorch promises nothing here")
    return FlexVARPipeline(deepcopy(pipe.tokenizer).double(), deepcopy(pipe.transformer).double()), None


@pytest.mark.parametrize("style", ["var", "llamagen", "off"])
def test_image_is_the_same_alone_and_anywhere_in_a_batch(pipe_and_autocast: Any, style: Any) -> None:
    whole, autocast_dtype = pipe_and_autocast
    pipe = partial(whole, schedule=SMALL, guidance_style=style, autocast_dtype=autocast_dtype)
    labels, seeds = [3, 1, 4, 1, None], [11, 12, 13, 14, 15]
    together = pipe(labels, seed=seeds).pyramid
    order = [4, 2, 0, 3, 1]
    shuffled = pipe([labels[i] for i in order], seed=[seeds[i] for i in order]).pyramid
    for place, image in enumerate(order):
        alone = pipe(labels[image], seed=seeds[image]).pyramid
        assert pyramids_equal(alone, of_image(together, image))
        assert pyramids_equal(alone, of_image(shuffled, place))


def test_one_seed_gives_different_images_that_image_ids_single_out(pipe: FlexVARPipeline) -> None:
    batch = pipe([2] * 4, schedule=SMALL, seed=9).pyramid
    assert len({tuple(grid.flatten().tolist()) for grid in batch[-1]}) == 4
    longer = pipe([2] * 6, schedule=SMALL, seed=9).pyramid
    for image in range(4):
        assert pyramids_equal(of_image(longer, image), of_image(batch, image))
        assert pyramids_equal(pipe(2, schedule=SMALL, seed=9, image_ids=[image]).pyramid, of_image(batch, image))
    assert pyramids_equal(pipe(2, schedule=SMALL, seed=[9]).pyramid, of_image(batch, 0))


def test_seed_label_and_guidance_matter(pipe: FlexVARPipeline) -> None:
    base = pipe(1, schedule=SMALL, seed=0).pyramid
    for changed in ({"seed": 1}, {"class_labels": 2}, {"guidance_scale": 9.0}, {"guidance_style": "off"}):
        arguments = {"class_labels": 1, "schedule": SMALL, "seed": 0, **changed}
        assert not pyramids_equal(pipe(**arguments).pyramid, base)


@pytest.mark.usefixtures("untouched_global_rng")
def test_global_state_is_neither_used_nor_changed(pipe: FlexVARPipeline) -> None:
    numpy_state = np.random.get_state()[1].copy()
    expected = pipe(1, schedule=SMALL).pyramid
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pyramids_equal(pipe(1, schedule=SMALL).pyramid, expected)


def test_labels_by_number_name_tensor_and_none(pipe: FlexVARPipeline) -> None:
    expected = pipe([1, 3, 5], schedule=SMALL).pyramid
    assert pyramids_equal(pipe(["star", "BLUE RING", None], schedule=SMALL).pyramid, expected)
    assert pyramids_equal(pipe(torch.tensor([1, 3, 5], dtype=torch.uint8), schedule=SMALL).pyramid, expected)
    assert pyramids_equal(pipe("star", schedule=SMALL).pyramid, of_image(expected, 0))
    assert pyramids_equal(pipe(np.int64(1), schedule=SMALL).pyramid, of_image(expected, 0))
    assert pyramids_equal(pipe(torch.tensor(1), schedule=SMALL).pyramid, of_image(expected, 0))


# Schedules and sizes


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_small_integers_of_numpy_do_not_wrap_around(kind: type[np.integer]) -> None:
    options = {"height": kind(120), "width": kind(64), "steps": kind(20)}
    assert GenerationSettings(**options).layout(4) == GenerationSettings(height=120, width=64, steps=20).layout(4)


@pytest.mark.parametrize(
    "schedule",
    [[5], [(2, 7)], range(1, 19), [(1, 2), (2, 4), (4, 8)], [4, 2, 6], [3, 3, 3], ScaleSchedule.preset(6)],
    ids=lambda sizes: f"{len(sizes)} steps",
)
def test_any_schedule(pipe: FlexVARPipeline, schedule: Any) -> None:
    out = pipe([0, 1], schedule=schedule, output_type="pt")
    sizes = ScaleSchedule(schedule)
    assert [tuple(indices.shape) for indices in out.pyramid] == [(2, *size) for size in sizes]
    assert out.images.shape == (2, 3, 4 * sizes.final_size[0], 4 * sizes.final_size[1])
    assert all(int(indices.min()) >= 0 and int(indices.max()) < 64 for indices in out.pyramid)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"height": 8, "width": 20}, (8, 20)),
        ({"height": 9, "width": 1, "steps": 3}, (9, 1)),
        ({"height": 12, "steps": 1}, (12, 12)),
        ({"width": 6, "steps": 20}, (6, 6)),
        ({"steps": 2}, (64, 64)),
        ({"schedule": [1, (2, 3)]}, (8, 12)),
        ({"schedule": [1, (2, 3)], "height": 7}, (7, 12)),
    ],
)
def test_any_size(pipe: FlexVARPipeline, sizes: dict[str, Any], expected: tuple[int, int]) -> None:
    out = pipe(0, output_type="np", **sizes)
    assert out.images.shape == (1, *expected, 3)
    assert len(out.steps) == len(sizes.get("schedule", ())) or sizes.get("steps", 10)


def test_odd_sizes_are_crops(pipe: FlexVARPipeline) -> None:
    whole = pipe(0, height=12, width=16, steps=3, output_type="pt").images
    part = pipe(0, height=10, width=13, steps=3, output_type="pt").images
    assert torch.equal(part, whole[:, :, :10, :13])


def test_default_is_the_ten_step_preset(pipe: FlexVARPipeline) -> None:
    step = next(pipe.stream(0))
    assert step.num_steps == 10
    assert GenerationSettings().layout(16).schedule == ScaleSchedule.preset(10)
    assert GenerationSettings(steps=8).layout(16).schedule == ScaleSchedule.preset(8)


# Results


def test_output_types(pipe: FlexVARPipeline) -> None:
    outputs = {kind: pipe([1, 2], schedule=SMALL, output_type=kind).images for kind in ("pil", "np", "pt", "latent")}
    assert outputs["pt"].shape == (2, 3, 12, 16)
    assert outputs["pt"].dtype == torch.float32
    assert outputs["np"].dtype == np.uint8
    assert outputs["latent"].shape == (2, 8, 3, 4)
    for image, pixels in zip(outputs["pil"], outputs["np"], strict=True):
        assert np.array_equal(np.asarray(image), pixels)
    decoded = pipe.tokenizer.decode(outputs["latent"])
    assert torch.allclose(decoded, outputs["pt"], atol=1e-5)


def test_stream_equals_call_and_previews_every_step(pipe: FlexVARPipeline) -> None:
    out = pipe([1, 2], schedule=SMALL, height=11, width=15, seed=3)
    steps = list(pipe.stream([1, 2], schedule=SMALL, height=11, width=15, seed=3))
    assert [(step.index, step.num_steps, step.size) for step in steps] == [
        (0, 3, (1, 1)),
        (1, 3, (2, 2)),
        (2, 3, (3, 4)),
    ]
    assert pyramids_equal([step.indices for step in steps], out.pyramid)
    assert [step.preview()[0].size for step in steps] == [(4, 4), (8, 8), (15, 11)]
    assert steps[-1].preview()[1].tobytes() == out.images[1].tobytes()


def test_results_can_be_trained_on(pipe: FlexVARPipeline) -> None:
    out = pipe(1, schedule=SMALL, output_type="pt")
    weight = torch.ones((), requires_grad=True)
    ((out.images * weight).sum() + torch.nn.functional.embedding(out.pyramid[0], weight.expand(64, 1)).sum()).backward()
    assert weight.grad is not None


def test_no_context_is_left_entered_between_steps(pipe: FlexVARPipeline) -> None:
    stream = pipe.stream(1, schedule=SMALL, autocast_dtype=torch.bfloat16)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()


def test_reconstruct(pipe: FlexVARPipeline) -> None:
    photographs = [Image.new("RGB", (13, 9), colour) for colour in ("red", "navy")]
    out = pipe.reconstruct(photographs, steps=4)
    assert [image.size for image in out.images] == [(13, 9)] * 2
    assert len(out.pyramid) == 4
    assert out.steps[0].preview()[0].size[0] < 13
    tensor = torch.zeros(1, 3, 8, 8)
    with torch.no_grad():  # as the pipeline: the decoder then sums in another order
        expected = pipe.tokenizer.reconstruct(tensor, ScaleSchedule([1, 2]))[-1]
    assert torch.allclose(pipe.reconstruct(tensor, schedule=[1, 2], output_type="pt").images, expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"last grid \(1, 1\), got 8 x 8 px"):
        pipe.reconstruct(tensor, schedule=[1])
    assert len(pipe.reconstruct(tensor[0], schedule=[1, 2]).images) == 1
    with pytest.raises(ValueError, match=r"shape \[3, H, W\] or \[B, 3, H, W\], got \(8, 8\)"):
        pipe.reconstruct(tensor[0, 0])


def test_autocast(pipe: FlexVARPipeline) -> None:
    out = pipe([1, 2], schedule=SMALL, autocast_dtype=torch.bfloat16, output_type="pt")
    assert out.images.dtype == torch.float32
    assert torch.isfinite(out.images).all()


# State


def test_exception_in_mid_generation_leaves_nothing(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pipe([1, 2], schedule=SMALL).pyramid
    caches: list[weakref.ref[KVCache]] = []
    real_step: Callable[..., Any] = FlexVARTransformer.step

    def failing_step(self: FlexVARTransformer, state: Any, inputs: Any) -> Any:
        caches.append(weakref.ref(state.cache))
        if state.next_step == 1:
            raise MemoryError("no room")
        return real_step(self, state, inputs)

    monkeypatch.setattr(FlexVARTransformer, "step", failing_step)
    with pytest.raises(MemoryError):
        pipe([1, 2], schedule=SMALL)
    monkeypatch.undo()
    gc.collect()
    assert caches
    assert all(cache() is None for cache in caches)
    assert not torch.is_inference_mode_enabled()
    assert pyramids_equal(pipe([1, 2], schedule=SMALL).pyramid, expected)


def test_abandoned_stream_leaves_nothing(pipe: FlexVARPipeline) -> None:
    expected = pipe([1, 2], schedule=SMALL).pyramid
    stream = pipe.stream([1, 2], schedule=SMALL)
    next(stream)
    other = pipe.stream([4], schedule=SMALL)  # two at once do not disturb each other
    next(other)
    assert torch.equal(next(stream).indices, expected[1])
    stream.close()
    assert pyramids_equal(pipe([1, 2], schedule=SMALL).pyramid, expected)


def test_nan_weights_are_an_error(pipe: FlexVARPipeline) -> None:
    expected = pipe(1, schedule=SMALL).pyramid
    bias = pipe.transformer.head.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits must be numbers, got only NaN or -infinity for a token of step 0"):
        pipe(1, schedule=SMALL)
    with torch.no_grad():
        bias.copy_(kept)
    assert pyramids_equal(pipe(1, schedule=SMALL).pyramid, expected)


@pytest.mark.cuda
def test_nan_weights_are_an_error_on_a_gpu(pipe: FlexVARPipeline) -> None:
    """Computed step by step, recorded and replayed; of a stream instead of the last step."""
    on_gpu = FlexVARPipeline(deepcopy(pipe.tokenizer), deepcopy(pipe.transformer)).to("cuda")
    with torch.no_grad():
        on_gpu.transformer.head.bias.fill_(torch.nan)
    message = "logits must be numbers, got only NaN or -infinity for a token of step"
    for output_type in ("pil", "pt", "latent"):
        with pytest.raises(ValueError, match=message):
            on_gpu(1, schedule=SMALL, output_type=output_type)
    stream = on_gpu.stream(1, schedule=SMALL)
    assert [next(stream).index, next(stream).index] == [0, 1]
    with pytest.raises(ValueError, match=message):
        next(stream)


@pytest.mark.cuda
def test_on_a_gpu(pipe: FlexVARPipeline) -> None:
    on_gpu = FlexVARPipeline(deepcopy(pipe.tokenizer), deepcopy(pipe.transformer)).to("cuda")
    labels, seeds = [3, 1, 4], [11, 12, 13]
    together = on_gpu(labels, schedule=SMALL, seed=seeds).pyramid
    assert together[0].device.type == "cuda"
    for image in range(3):
        alone = on_gpu(labels[image], schedule=SMALL, seed=seeds[image]).pyramid
        assert pyramids_equal(alone, of_image(together, image))
    assert len(on_gpu(labels, schedule=SMALL, autocast_dtype=torch.bfloat16).images) == 3
    with torch.no_grad():
        on_gpu.transformer.head.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits must be numbers"):  # seen after the last step only
        on_gpu(labels, schedule=SMALL)


def test_models_on_two_devices_are_refused(pipe: FlexVARPipeline) -> None:
    apart = FlexVARPipeline(pipe.tokenizer, deepcopy(pipe.transformer).to("meta"))
    with pytest.raises(ValueError, match="both models must be on one device, got cpu and meta"):
        apart(1, schedule=SMALL)


def test_training_mode_is_refused(pipe: FlexVARPipeline) -> None:
    pipe.transformer.train()
    try:
        with pytest.raises(ValueError, match="transformer must be in evaluation mode"):
            pipe(1, schedule=SMALL)
    finally:
        pipe.transformer.eval()


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"class_labels": []}, ValueError, "class_labels must hold at least one label, got none"),
        ({"class_labels": 6}, ValueError, "class_labels must be from 0 to 5, got 6"),
        ({"class_labels": [-1]}, ValueError, "class_labels must be from 0 to 5, got -1"),
        ({"class_labels": 1.0}, TypeError, r"class_labels must be an int, got 1\.0"),
        ({"class_labels": True}, TypeError, "class_labels must be an int, got True"),
        ({"class_labels": [[1]]}, TypeError, r"class_labels must be an int, got \[1\]"),
        ({"class_labels": "sta"}, ValueError, "names that the model knows, got 'sta'; did you mean star"),
        ({"class_labels": "zzz"}, ValueError, "for example circle, star"),
        ({"class_labels": "z" * 10**5}, ValueError, f"got '{'z' * 99}; for example"),
        ({"seed": "7" * 10**5}, TypeError, f"seed must be an int, got '{'7' * 99}$"),
        ({"seed": 10**300}, ValueError, f"got 1{'0' * 99}$"),
        ({"height": 10**300}, ValueError, f"got 1{'0' * 99} x 1{'0' * 99}$"),
        ({"class_labels": torch.zeros(2)}, TypeError, "must be integers, got a tensor of torch.float32"),
        ({"class_labels": torch.zeros(1, 1, dtype=torch.int64)}, ValueError, r"shape \[B\], got \(1, 1\)"),
        ({"schedule": []}, ValueError, "at least one step"),
        ({"schedule": [0]}, ValueError, "from 1 to"),
        ({"schedule": [(1, -2)]}, ValueError, "from 1 to"),
        ({"schedule": [1.5]}, TypeError, "must be an int"),
        ({"schedule": "1 2 3"}, TypeError, "must be a list of ints"),
        ({"schedule": [1], "steps": 3}, ValueError, "steps must be left out"),
        ({"schedule": [1, 4], "height": 24}, ValueError, r"last grid \(4, 4\), got 24 x 16 px"),
        ({"schedule": [1, 30000]}, ValueError, "at most 4194304 tokens, all steps together, got 900000001"),
        ({"height": 30000, "steps": 2}, ValueError, "height x width must be at most 268435456 pixels, got 30000 x 300"),
        ({"height": 16000, "steps": 2}, ValueError, "at most 4194304 tokens, all steps together"),
        ({"height": 0}, ValueError, "height must be at least 1, got 0"),
        ({"width": 64.0}, TypeError, r"width must be an int, got 64\.0"),
        ({"steps": -3}, ValueError, "steps must be at least 1, got -3"),
        ({"guidance_scale": float("nan")}, ValueError, r"guidance_scale must be from -1e\+30 to 1e\+30, got nan"),
        ({"guidance_scale": -2e30}, ValueError, r"guidance_scale must be from .* got -2e\+30"),
        ({"guidance_scale": 10**400}, ValueError, "guidance_scale must be from .* got 1000"),
        ({"guidance_scale": "2"}, TypeError, "guidance_scale must be a number, got '2'"),
        ({"guidance_style": "cfg"}, ValueError, "guidance_style must be one of var, llamagen, off, got 'cfg'"),
        ({"top_k": -1}, ValueError, "top_k must be from 0 to 9223372036854775807, got -1"),
        ({"top_k": 2**63}, ValueError, "top_k must be from 0 to .*, got 9223372036854775808"),
        ({"top_k": 2.5}, TypeError, r"top_k must be an int, got 2\.5"),
        ({"top_p": 1.5}, ValueError, r"top_p must be from 0 to 1, got 1\.5"),
        ({"top_p": float("nan")}, ValueError, "top_p must be from 0 to 1, got nan"),
        ({"top_p": None}, TypeError, "top_p must be a number, got None"),
        ({"seed": -1}, ValueError, "seed must be from 0 to 9223372036854775807, got -1"),
        ({"seed": 1 << 63}, ValueError, "seed must be from 0 to"),
        ({"seed": "7"}, TypeError, "seed must be an int, got '7'"),
        ({"seed": None}, TypeError, "seed must be an int, got None"),
        ({"seed": [1, 2]}, ValueError, r"seed must be one per image \(1\), got 2"),
        ({"image_ids": [0, 1]}, ValueError, r"image_ids must be one per image \(1\), got 2"),
        ({"image_ids": 3}, TypeError, "image_ids must be a list of ints, one per image, got int"),
        ({"output_type": "jpeg"}, ValueError, "output_type must be one of pil, np, pt, latent, got 'jpeg'"),
        ({"autocast_dtype": "bf16"}, TypeError, "autocast_dtype must be a torch.dtype"),
        ({"autocast_dtype": torch.int8}, ValueError, r"autocast_dtype must be torch\.bfloat16"),
        ({"published_greedy_quirk": 1}, TypeError, "published_greedy_quirk must be a bool"),
        ({"temperature": 1.0}, TypeError, "settings must be among schedule, .* got temperature"),
    ],
)
def test_bad_arguments(pipe: FlexVARPipeline, arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        pipe(**{"class_labels": 1, **arguments})
    if "output_type" not in arguments:
        with pytest.raises(error, match=text):
            pipe.stream(**{"class_labels": 1, **arguments})  # at once, not at the first step


def test_bad_models(pipe: FlexVARPipeline) -> None:
    with pytest.raises(TypeError, match="tokenizer must be a MultiScaleTokenizer, got FlexVARTransformer"):
        FlexVARPipeline(pipe.transformer, pipe.transformer)  # type: ignore[arg-type]
    other = FlexVARTransformer(TransformerConfig(1, 64, 2, 5, 65, 8, upsample_mode="bilinear"))
    with pytest.raises(ValueError, match="codebook_size of both models must agree, got 64 and 65"):
        FlexVARPipeline(pipe.tokenizer, other)


def test_devices_and_dtypes(pipe: FlexVARPipeline) -> None:
    here = deepcopy(pipe)
    for device, text in (
        ("nope", "to: device must be cpu, cuda or cuda:N, got 'nope'"),
        ("meta", "to: device must be cpu, cuda or cuda:N, got 'meta'"),
        ("cuda:99", r"to: device must be one that torch finds \(\d GPUs here\), got 'cuda:99'"),
    ):
        with pytest.raises(ValueError, match=text):
            here.to(device)
        with pytest.raises(ValueError, match=text.replace("to:", "from_pretrained:")):
            FlexVARPipeline.from_pretrained("demo", device=device)
    with pytest.raises(TypeError, match=r"to: device must be a torch\.device or a str, got float"):
        here.to(1.5)  # type: ignore[arg-type]
    for dtype in (torch.int32, torch.complex64, "float16"):
        with pytest.raises(TypeError, match=r"to: dtype must be torch\.float32, .* or None, got"):
            here.to("cpu", dtype)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"from_pretrained: dtype must be torch\.float32, .* or None, got"):
            FlexVARPipeline.from_pretrained("demo", dtype=dtype)  # type: ignore[arg-type]
    assert here.transformer.head.weight.dtype == torch.float32


def test_float64_is_for_the_reference(pipe: FlexVARPipeline) -> None:
    wide = deepcopy(pipe).to("cpu", torch.float64)
    if pipe.transformer.backend == "reference":
        assert wide(1, schedule=SMALL).images[0].size == (16, 12)
        return
    with pytest.raises(TypeError, match=r"tokenizer must not be in float64 with the native ops, got torch\.float64"):
        wide.stream(1, schedule=SMALL)  # at once, not at the first step
    with pytest.raises(TypeError, match="tokenizer must not be in float64 with the native ops"):
        wide.reconstruct(torch.zeros(3, 16, 16))


def test_autocast_is_of_the_weights_dtype_or_of_float32(pipe: FlexVARPipeline) -> None:
    narrow = deepcopy(pipe).to("cpu", torch.float16)
    for call in (narrow.stream, narrow.__call__):
        with pytest.raises(TypeError, match=r"autocast_dtype must be .* got torch\.bfloat16 for torch\.float16"):
            call(1, schedule=SMALL, autocast_dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="autocast_dtype must be the dtype of the tokenizer's weights"):
        narrow.reconstruct(torch.zeros(3, 16, 16), autocast_dtype=torch.bfloat16)
    assert narrow(1, schedule=SMALL, autocast_dtype=torch.float16).images[0].size == (16, 12)


def test_names_need_a_model_with_names(pipe: FlexVARPipeline) -> None:
    nameless = FlexVARTransformer(TransformerConfig(1, 64, 2, 5, 64, 8, upsample_mode="bilinear"))
    with pytest.raises(ValueError, match="class_labels must be numbers, as this model has no class names, got 'star'"):
        FlexVARPipeline(pipe.tokenizer, nameless)("star")


def test_keyword_arguments_are_the_settings() -> None:
    assert set(GenerationOptions.__annotations__) == set(GenerationSettings.__dataclass_fields__)
