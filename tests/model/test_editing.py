"""Editing: what is kept is kept exactly, what is painted is generation, and every task takes any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flexvar import (
    Expand,
    FlexVARPipeline,
    FlexVARTransformer,
    Inpaint,
    MultiScaleTokenizer,
    Outpaint,
    Refine,
    TokenizerConfig,
    TransformerConfig,
)
from flexvar.generation.fill import fill_painted
from flexvar.generation.pictures import pad_to_patches
from PIL import Image
from torch import Tensor

NAMES = ("circle", "star", "heart")
SIZES = [(16, 32), (32, 16), (17, 29), (5, 3), (1, 1)]  # (height, width): 1:2, 2:1, odd, small


@pytest.fixture(scope="module")
def pipe(backend: str) -> FlexVARPipeline:
    """Patches of 4 px, 64 codes, 3 classes; weights strong enough for class and seed to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = MultiScaleTokenizer(
            TokenizerConfig(64, 8, 32, 32, (1, 1, 2), num_res_blocks=1, norm_groups=8), backend=backend
        )
        transformer = FlexVARTransformer(TransformerConfig(2, 64, 2, 3, 64, 8, class_names=NAMES), backend=backend)
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return FlexVARPipeline(tokenizer, transformer)


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def box(height: int, width: int, *, rows: slice, columns: slice) -> Tensor:
    """A mask that is True in a box."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[rows, columns] = True
    return mask


def pyramids_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


# In-painting


@pytest.mark.parametrize("size", SIZES)
def test_known_tokens_and_pasted_pixels_are_kept_exactly(pipe: FlexVARPipeline, size: tuple[int, int]) -> None:
    height, width = size
    image = photograph(height, width)
    mask = box(height, width, rows=slice(0, (height + 1) // 2), columns=slice(0, (width + 1) // 3 + 1))
    out = pipe.inpaint(image, mask, "star", steps=4, seed=3)
    assert out.images[0].size == (width, height)
    assert torch.equal(pixels_of(out.images[0])[~mask], pixels_of(image)[~mask])
    filled = fill_painted(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1, mask[None, None])
    expected = pipe.reconstruct(filled, steps=4).pyramid
    assert mask.all() or torch.equal(out.pyramid[0], expected[0])  # one token, known by default
    padded = pad_to_patches(mask[None, None].float(), 4)[0, 0]
    num_known = 0
    for got, wanted in zip(out.pyramid, expected, strict=True):
        rows, columns = got.shape[1:]
        for row in range(rows):
            top, bottom = row * padded.shape[0] // rows, -(-(row + 1) * padded.shape[0] // rows)
            for column in range(columns):
                left, right = column * padded.shape[1] // columns, -(-(column + 1) * padded.shape[1] // columns)
                if not padded[top:bottom, left:right].any():
                    num_known += 1
                    assert got[0, row, column] == wanted[0, row, column]
    assert num_known > 0 or max(size) < 4


@pytest.mark.parametrize("size", SIZES)
def test_mask_of_nothing_keeps_the_image(pipe: FlexVARPipeline, size: tuple[int, int]) -> None:
    image, nothing = photograph(*size), torch.zeros(size)
    assert pipe.inpaint(image, nothing, "star", steps=3).images[0].tobytes() == image.tobytes()
    plain = pipe.reconstruct(image, steps=3)
    unpasted = pipe.inpaint(image, nothing, "star", steps=3, paste=False)
    assert pyramids_equal(unpasted.pyramid, plain.pyramid)
    assert unpasted.images[0].tobytes() == plain.images[0].tobytes()


@pytest.mark.parametrize("size", SIZES)
def test_mask_of_everything_is_generation(pipe: FlexVARPipeline, size: tuple[int, int]) -> None:
    expected = pipe(["star", None], height=size[0], width=size[1], steps=4, seed=7)
    out = pipe.inpaint(photograph(*size), torch.ones(size), ["star", None], steps=4, seed=7)
    assert pyramids_equal(out.pyramid, expected.pyramid)
    assert [image.tobytes() for image in out.images] == [image.tobytes() for image in expected.images]


def test_what_lies_under_the_mask_does_not_matter(pipe: FlexVARPipeline) -> None:
    mask = box(24, 24, rows=slice(5, 17), columns=slice(8, 20))
    image, other = photograph(24, 24), photograph(24, 24, seed=1)
    other.paste(image, mask=Image.fromarray((~mask).numpy()))
    first, second = (pipe.inpaint(picture, mask, "heart", steps=5, seed=1) for picture in (image, other))
    assert pyramids_equal(first.pyramid, second.pyramid)
    assert first.images[0].tobytes() == second.images[0].tobytes()


def test_painted_part_depends_on_label_and_seed(pipe: FlexVARPipeline) -> None:
    mask = box(24, 24, rows=slice(4, 20), columns=slice(4, 20))
    base = pipe.inpaint(photograph(24, 24), mask, "star", seed=0).pyramid
    for label, seed in (("heart", 0), ("star", 1), (None, 0)):
        assert not pyramids_equal(pipe.inpaint(photograph(24, 24), mask, label, seed=seed).pyramid, base)


def test_batches(pipe: FlexVARPipeline) -> None:
    images = [photograph(16, 24, seed) for seed in range(3)]
    masks = torch.stack([box(16, 24, rows=slice(0, 8), columns=slice(8 * i, 8 * i + 8)) for i in range(3)])
    together = pipe.inpaint(images, masks, ["star", "heart", None], steps=3, seed=[4, 5, 6])
    for i, label in enumerate(["star", "heart", None]):
        alone = pipe.inpaint(images[i], masks[i], label, steps=3, seed=[4 + i])
        assert pyramids_equal(alone.pyramid, [grid[i : i + 1] for grid in together.pyramid])
    variants = pipe.inpaint(images[0], masks[0], ["star"] * 4, steps=3)
    assert len({tuple(grid.flatten().tolist()) for grid in variants.pyramid[-1]}) > 1
    assert len(pipe.inpaint(images, masks[0], "star", steps=3).images) == 3
    assert len(pipe.inpaint(images[0], masks, "star", steps=3).images) == 3


def test_steps_before_start_step_are_taken_from_the_known_pixels(pipe: FlexVARPipeline) -> None:
    image, mask = photograph(16, 16), box(16, 16, rows=slice(0, 16), columns=slice(6, 16))
    filled = fill_painted(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1, mask[None, None])
    expected = pipe.reconstruct(filled, schedule=[1, 2, 4]).pyramid
    for start_step in range(4):
        pyramid = pipe.inpaint(image, mask, 0, start_step=start_step, schedule=[1, 2, 4], seed=8).pyramid
        for step in range(3):
            assert torch.equal(pyramid[step], expected[step]) == (step < start_step)
    assert pipe.inpaint(image, mask, 0, schedule=[(4, 4)]).images  # the only step is drawn
    one_token = pipe.inpaint(photograph(4, 4), torch.eye(4), ["star"] * 6, schedule=[1]).pyramid
    assert len(set(one_token[0].flatten().tolist())) > 1


def test_stream_equals_call(pipe: FlexVARPipeline) -> None:
    image, mask = photograph(16, 20), box(16, 20, rows=slice(0, 9), columns=slice(3, 11))
    out = pipe.inpaint(image, mask, "star", seed=2, steps=4)
    steps = list(pipe.stream("star", edit=Inpaint(image, mask), seed=2, steps=4))
    assert pyramids_equal([step.indices for step in steps], out.pyramid)
    assert steps[-1].preview()[0].tobytes() == out.images[0].tobytes()
    assert steps[0].preview()[0].size == (4, 4)
    again = pipe("star", edit=Inpaint(image, mask), seed=2, steps=4, output_type="np")
    assert np.array_equal(again.images[0], np.asarray(out.images[0]))


def test_a_step_is_the_callers_own(pipe: FlexVARPipeline) -> None:
    """Whatever is done to what a step gives, later steps are as they would have been."""
    image, mask = photograph(16, 16), box(16, 16, rows=slice(0, 9), columns=slice(3, 11))
    for edit in (None, Inpaint(image, mask), Refine(image, 16, 16, 2)):
        expected = [step.indices for step in pipe.stream(1, edit=edit, schedule=[1, 2, 3, 4], seed=3)]
        for step, indices in zip(pipe.stream(1, edit=edit, schedule=[1, 2, 3, 4], seed=3), expected, strict=True):
            assert torch.equal(step.indices, indices)
            step.indices.zero_()


def test_feathered_seam(pipe: FlexVARPipeline) -> None:
    image = torch.full((3, 24, 24), 0.25)
    mask = box(24, 24, rows=slice(8, 16), columns=slice(8, 16))
    plain = pipe.inpaint(image, mask, "star", steps=3, paste=False, output_type="pt").images[0]
    hard = pipe.inpaint(image, mask, "star", steps=3, output_type="pt").images[0]
    soft = pipe.inpaint(image, mask, "star", steps=3, feather=3, output_type="pt").images[0]
    assert torch.equal(hard, torch.where(mask, plain, image))
    assert torch.equal(soft[:, mask], plain[:, mask])
    for distance, weight in ((1, 0.75), (2, 0.5), (3, 0.25), (4, 0.0)):
        expected = weight * plain[:, 12, 7 - distance + 1] + (1 - weight) * image[:, 12, 7 - distance + 1]
        assert torch.allclose(soft[:, 12, 7 - distance + 1], expected, atol=1e-6)
    far = ~box(24, 24, rows=slice(5, 19), columns=slice(5, 19))
    assert torch.equal(soft[:, far], image[:, far])


def test_any_schedule_style_dtype_and_settings(pipe: FlexVARPipeline) -> None:
    image, mask = photograph(16, 24), box(16, 24, rows=slice(8, 16), columns=slice(0, 24))
    for options in (
        {"schedule": [(4, 6)]},
        {"schedule": [1, 9, (4, 6)]},
        {"guidance_style": "llamagen", "guidance_scale": 3.0, "top_k": 3, "top_p": 0.5},
        {"autocast_dtype": torch.bfloat16},
        {"published_greedy_quirk": True, "steps": 12, "image_ids": [5]},
    ):
        image_out = pipe.inpaint(image, mask, 1, **options).images[0]
        assert torch.equal(pixels_of(image_out)[:8], pixels_of(image)[:8])


# Masks and images in any form


@pytest.mark.filterwarnings("error")
def test_masks_in_every_form(pipe: FlexVARPipeline, tmp_path: Path) -> None:
    mask = box(16, 16, rows=slice(4, 12), columns=slice(2, 9))
    grey = Image.fromarray(mask.numpy()).convert("L")
    see_through = Image.merge("LA", (Image.new("L", (16, 16), 255), grey))
    grey.save(tmp_path / "mask.png")
    soft = mask.float() * 0.6 + 0.2
    expected = Inpaint(photograph(16, 16), mask).paint
    assert torch.equal(expected[0, 0], mask)
    forms: list[Any] = [
        mask.numpy(), mask.flip(1).numpy()[:, ::-1], np.asarray(grey), mask[None], mask[None, None],
        mask.byte() * 255, mask.float(), soft, soft.double().numpy(), grey,
        grey.convert("1"), grey.convert("RGB"), grey.convert("P"), see_through, see_through.convert("RGBA"),
        tmp_path / "mask.png", str(tmp_path / "mask.png"), [grey], grey.resize((64, 64), Image.Resampling.NEAREST),
    ]  # fmt: skip
    for form in forms:
        assert torch.equal(Inpaint(photograph(16, 16), form).paint, expected)
    wide = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    assert Inpaint(photograph(4, 4), wide).paint[0, 0].tolist() == [[False, False, True, True]] * 4


def test_images_in_every_form(tmp_path: Path) -> None:
    image = photograph(6, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    expected = Inpaint(image, torch.zeros(6, 8)).pixels
    for form in (
        expected,
        expected[0],
        expected.double(),
        [image],
        tmp_path / "lying.png",
        str(tmp_path / "lying.png"),
    ):
        assert torch.equal(Inpaint(form, torch.zeros(6, 8)).pixels, expected)
    clear = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    assert bool((Inpaint(clear, torch.zeros(4, 4)).pixels == 1).all())  # over white


# Out-painting and expansion


def test_outpainting_is_inpainting_of_margins(pipe: FlexVARPipeline) -> None:
    image = photograph(13, 10)
    out = pipe.outpaint(image, 3, 6, 2, 1, "star", seed=5, steps=4)
    assert out.images[0].size == (19, 16)
    assert torch.equal(pixels_of(out.images[0])[2:15, 3:13], pixels_of(image))
    canvas = Image.new("RGB", (19, 16), "red")
    canvas.paste(image, (3, 2))
    mask = ~box(16, 19, rows=slice(2, 15), columns=slice(3, 13))
    by_hand = pipe.inpaint(canvas, mask, "star", seed=5, steps=4)
    assert pyramids_equal(out.pyramid, by_hand.pyramid)
    assert out.images[0].tobytes() == by_hand.images[0].tobytes()


@pytest.mark.filterwarnings("error")
def test_margins_may_be_small_integers_of_numpy() -> None:
    assert Outpaint(torch.zeros(3, 64, 64), right=np.int8(100)).size == (64, 164)


@pytest.mark.parametrize(("size", "larger"), [((16, 16), (16, 32)), ((16, 16), (32, 16)), ((7, 9), (14, 12))])
def test_expansion_has_the_image_in_its_centre(
    pipe: FlexVARPipeline, size: tuple[int, int], larger: tuple[int, int]
) -> None:
    image = photograph(*size)
    out = pipe.expand(image, *larger, "heart", steps=5, seed=1, feather=0)
    top, left = ((large - small) // 2 for large, small in zip(larger, size, strict=True))
    assert out.images[0].size == larger[::-1]
    assert torch.equal(pixels_of(out.images[0])[top : top + size[0], left : left + size[1]], pixels_of(image))
    margins = (left, larger[1] - size[1] - left, top, larger[0] - size[0] - top)
    assert pyramids_equal(out.pyramid, pipe.outpaint(image, *margins, "heart", steps=5, seed=1).pyramid)


# Refinement


@pytest.mark.parametrize(("size", "larger"), [((16, 16), (32, 32)), ((8, 16), (32, 64)), ((16, 8), (33, 17))])
def test_refinement_takes_the_first_steps_from_the_image(
    pipe: FlexVARPipeline, size: tuple[int, int], larger: tuple[int, int]
) -> None:
    image = photograph(*size)
    out = pipe.refine(image, *larger, class_labels="star", seed=2)
    assert out.images[0].size == larger[::-1]
    grid = tuple(-(-side // 4) for side in size)
    own = [step for step in out.steps if step.size[0] <= grid[0] and step.size[1] <= grid[1]]
    assert 0 < len(own) < len(out.steps)
    if not any(side % 4 for side in (*size, *larger)):
        sizes = [step.size for step in own]
        schedule = sizes if sizes[-1] == grid else [*sizes, grid]
        kept = pipe.reconstruct(image, schedule=schedule).pyramid[: len(own)]
        assert pyramids_equal(out.pyramid[: len(own)], kept)
    other = pipe.refine(image, *larger, class_labels="star", seed=3)
    assert pyramids_equal(other.pyramid[: len(own)], out.pyramid[: len(own)])
    assert not torch.equal(other.pyramid[-1], out.pyramid[-1])


def test_start_step_from_nothing_to_everything(pipe: FlexVARPipeline) -> None:
    image = photograph(24, 16)
    assert pyramids_equal(
        pipe.refine(image, 24, 16, 0, 1, steps=5).pyramid, pipe(1, height=24, width=16, steps=5).pyramid
    )
    everything = pipe.refine(image, 24, 16, 5, 1, steps=5)
    assert everything.images[0].tobytes() == pipe.reconstruct(image, steps=5).images[0].tobytes()
    variation = pipe.refine(image, 24, 16, 3, 1, steps=5)
    assert pyramids_equal(variation.pyramid[:3], everything.pyramid[:3])
    assert not torch.equal(variation.pyramid[-1], everything.pyramid[-1])


def test_refining_larger_images_shrinks_them(pipe: FlexVARPipeline) -> None:
    assert pipe.refine(photograph(64, 40), 16, 16, 2, steps=4).images[0].size == (16, 16)


def test_known_steps_cost_no_model(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = FlexVARTransformer.step

    def counting(self: FlexVARTransformer, state: Any, inputs: Any) -> Any:
        calls.append(state.next_step)
        return real(self, state, inputs)

    monkeypatch.setattr(FlexVARTransformer, "step", counting)
    pipe.inpaint(photograph(16, 16), torch.zeros(16, 16), steps=4)
    assert calls == []
    pipe.refine(photograph(8, 8), 16, 16, 2, steps=4)
    assert calls == [0, 1, 2, 3]


# Fill


def test_fill_keeps_what_is_known_and_continues_it() -> None:
    pixels = torch.linspace(-1, 1, 33).expand(1, 3, 21, 33).contiguous()
    paint = box(21, 33, rows=slice(6, 15), columns=slice(10, 20))[None, None]
    filled = fill_painted(pixels, paint)
    assert torch.equal(filled[~paint.expand_as(filled)], pixels[~paint.expand_as(pixels)])
    assert float((filled - pixels).abs().max()) < 0.5
    scattered = (torch.arange(70) % 11 > 0).reshape(2, 1, 7, 5)
    flat = fill_painted(torch.full((2, 3, 7, 5), 0.3), scattered)
    assert torch.allclose(flat, torch.full((), 0.3), atol=1e-5)
    assert not fill_painted(torch.ones(1, 3, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool)).any()


# Bad input

IMAGE = torch.zeros(3, 8, 8)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Inpaint(3, IMAGE[0]), TypeError, "inpaint: image must be a picture, a path or a tensor, got int"),
        (lambda: Inpaint([], IMAGE[0]), ValueError, "inpaint: image must hold at least one picture"),
        (lambda: Inpaint("missing.png", IMAGE[0]), FileNotFoundError, "missing.png"),
        (lambda: Inpaint(IMAGE.byte(), IMAGE[0]), TypeError, r"floating point in .*got a tensor of torch.uint8"),
        (lambda: Inpaint(IMAGE[0], IMAGE[0]), ValueError, r"shape \[3, H, W\] or \[B, 3, H, W\], got \(8, 8\)"),
        (lambda: Inpaint(IMAGE + 255, IMAGE[0]), ValueError, r"must be in \[-1, 1\], got values from 255 to 255"),
        (lambda: Inpaint(IMAGE / 0, IMAGE[0]), ValueError, "inpaint: image must be finite"),
        (lambda: Inpaint(torch.zeros(2, 3, 8, 8), IMAGE), ValueError, r"one per image \(2\), got 3"),
        (lambda: Inpaint(IMAGE, IMAGE[0].long()), TypeError, "mask must be of bools, bytes or floats"),
        (lambda: Inpaint(IMAGE, (IMAGE[0] + 1).byte()), ValueError, "bytes from 0 to 255, got 0 and 1 only"),
        (lambda: Inpaint(IMAGE, IMAGE[0] + 2), ValueError, "mask must be from 0 to 1 .* got 2 to 2"),
        (lambda: Inpaint(IMAGE, IMAGE[0] / 0), ValueError, "mask must be from 0 to 1 .* got nan to nan"),
        (lambda: Inpaint(IMAGE, torch.zeros(3)), ValueError, r"mask must have shape \[H, W\].* got \(3,\)"),
        (lambda: Inpaint(IMAGE, IMAGE[0], paste=1), TypeError, "inpaint: paste must be a bool, got 1"),
        (lambda: Inpaint(IMAGE, IMAGE[0], feather=-1), ValueError, "inpaint: feather must be from 0 to 8, got -1"),
        (lambda: Inpaint(IMAGE, IMAGE[0], feather=2, paste=False), ValueError, "feather must be 0 where paste is"),
        (lambda: Outpaint(IMAGE), ValueError, "left, right, top or bottom must be at least 1, got 0 for each"),
        (lambda: Outpaint(IMAGE, left=-1), ValueError, "outpaint: left must be at least 0, got -1"),
        (lambda: Outpaint(IMAGE, top=1.5), TypeError, r"outpaint: top must be an int, got 1\.5"),
        (lambda: Outpaint(IMAGE, left=10**9), ValueError, "outpaint: height x width must be at most 268435456 pixels"),
        (lambda: Expand(IMAGE, 10**5, 10**4), ValueError, "expand: height x width must be .* got 100000 x 10000"),
        (lambda: Refine(IMAGE, 40000, 40000), ValueError, "refine: height x width must be .* got 40000 x 40000"),
        (lambda: Expand(IMAGE, 7, 16), ValueError, "expand: height must be at least 8, got 7"),
        (lambda: Expand(IMAGE, 8, 8), ValueError, "expand: height or width must be more than the image's, got 8 x 8"),
        (lambda: Refine(IMAGE, 0, 8), ValueError, "refine: height must be at least 1, got 0"),
        (lambda: Refine(IMAGE, 16, 16, -1), ValueError, "refine: start_step must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_bad_pictures_and_numbers(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_bad_calls(pipe: FlexVARPipeline) -> None:
    edit = Inpaint(IMAGE, IMAGE[0])
    with pytest.raises(TypeError, match="edit must be an Inpaint, Outpaint, Expand or Refine, got 'star'"):
        pipe.stream(1, edit="star")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inpaint: height must be left out of the settings, got 8"):
        pipe.stream(1, edit=edit, height=8)
    with pytest.raises(ValueError, match=r"last grid \(3, 3\), got 8 x 8 px"):
        pipe.stream(1, edit=edit, schedule=[1, 3])
    with pytest.raises(ValueError, match=r"class_labels must be one, or one per picture \(2\), got 3"):
        pipe.stream([1, 1, 1], edit=Inpaint(torch.zeros(2, 3, 8, 8), IMAGE[0]))
    with pytest.raises(ValueError, match="inpaint: start_step must be from 0 to 2, got 3"):
        pipe.stream(1, edit=Inpaint(IMAGE, IMAGE[0], start_step=3), schedule=[1, 2])
    with pytest.raises(ValueError, match="refine: start_step must be from 0 to 3, got 4"):
        pipe.stream(1, edit=Refine(IMAGE, 16, 16, 4), steps=3)
    with pytest.raises(ValueError, match=r"refine: start_step must be given where .* 2 x 2, got none"):
        pipe.stream(1, edit=Refine(IMAGE, 8, 8), steps=3)
    with pytest.raises(ValueError, match="inpaint: width must be left out of the settings, got 8"):
        pipe.inpaint(IMAGE, IMAGE[0], width=8)
