"""Schedules: the paper's presets, schedules for any image, hand-made ones, and what is refused."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError
from itertools import pairwise

import numpy as np
import pytest
from flexvar import ScaleSchedule
from hypothesis import given, settings
from hypothesis import strategies as st


def squares(*sides: int) -> ScaleSchedule:
    return ScaleSchedule([(side, side) for side in sides])


@pytest.mark.parametrize(
    ("image_size", "steps", "sides", "tokens"),
    [
        (256, 6, (1, 2, 4, 6, 10, 16), None),
        (256, 7, (1, 2, 3, 5, 8, 11, 16), None),
        (256, 8, (1, 2, 3, 4, 6, 10, 13, 16), None),
        (256, 9, (1, 2, 3, 4, 5, 7, 10, 13, 16), None),
        (256, 10, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 680),
        (256, 11, (1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 16), None),
        (256, 12, (*range(1, 9), 10, 12, 14, 16), None),
        (256, 13, (*range(1, 11), 12, 14, 16), None),
        (256, 14, (*range(1, 13), 14, 16), None),
        (384, 11, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 24), None),
        (512, 12, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 32), 2233),
        (512, 15, (*range(1, 11), 12, 14, 16, 23, 32), 2534),
    ],
)
def test_presets_of_the_paper(image_size: int, steps: int, sides: tuple[int, ...], tokens: int | None) -> None:
    schedule = ScaleSchedule.preset(steps, image_size)
    assert schedule == squares(*sides)
    assert len(schedule) == steps
    assert tokens is None or schedule.num_tokens == tokens


def test_preset_defaults_and_variants() -> None:
    assert ScaleSchedule.preset() == ScaleSchedule.preset(steps=10, image_size=256, variant="code")
    assert ScaleSchedule.preset(8, variant="code") == squares(1, 2, 3, 5, 7, 10, 13, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 5}, "steps must be one of 6, 7, .* got 5"),
        ({"steps": 10, "image_size": 512}, "steps must be one of 12, 15 for image_size 512, got 10"),
        ({"image_size": 300}, "image_size must be one of 256, 384, 512, got 300"),
        ({"variant": "other"}, "variant must be .* got 'other'"),
        ({"steps": [10]}, r"steps must be an int, got \[10\]"),
    ],
)
def test_no_such_preset(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ScaleSchedule.preset(**arguments)


@pytest.mark.parametrize("steps", range(6, 15))
def test_for_image_gives_the_presets(steps: int) -> None:
    assert ScaleSchedule.for_image(256, 256, steps) == ScaleSchedule.preset(steps)


def test_for_image_scales_the_sides() -> None:
    schedule = ScaleSchedule.for_image(height=256, width=512, steps=10)
    assert schedule.sizes == tuple((side, 2 * side) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    assert ScaleSchedule.for_image(48, 160, 10)[:5] == ((1, 1), (1, 1), (1, 1), (1, 2), (1, 3))
    assert ScaleSchedule.for_image(256, 256, 16).sizes == tuple((side, side) for side in range(1, 17))
    assert ScaleSchedule.for_image(64, 32, 1, patch_size=4).sizes == ((16, 8),)


def test_for_image_grows_beyond_the_table_as_the_presets_do() -> None:
    for steps, side in ((11, 384), (12, 512), (15, 512)):
        assert ScaleSchedule.for_image(side, side, steps) == ScaleSchedule.preset(steps, side)
    assert ScaleSchedule.for_image(384, 384) == ScaleSchedule.preset(11, 384)
    assert ScaleSchedule.for_image(512, 512) == ScaleSchedule.preset(12, 512)
    assert ScaleSchedule.for_image(768, 768)[9:] == ((16, 16), (23, 23), (33, 33), (48, 48))
    assert ScaleSchedule.for_image(384, 768)[8:] == ((13, 26), (16, 32), (24, 48))
    assert ScaleSchedule.for_image(320, 320) == ScaleSchedule.for_image(320, 320, 10)  # 20 x 20 is stretched
    assert ScaleSchedule.for_image(768, 768, 1).sizes == ((48, 48),)
    assert ScaleSchedule.for_image(768, 768, 4).sizes == ((1, 1), (16, 16), (28, 28), (48, 48))


@given(
    grid=st.tuples(st.integers(1, 300), st.integers(1, 300)), steps=st.integers(1, 64), patch_size=st.integers(1, 32)
)
@settings(max_examples=300, deadline=None)
def test_for_image_always_ends_on_the_grid(grid: tuple[int, int], steps: int, patch_size: int) -> None:
    schedule = ScaleSchedule.for_image(grid[0] * patch_size, grid[1] * patch_size, steps, patch_size)
    assert len(schedule) == steps
    assert schedule.final_size == grid
    for (h0, w0), (h1, w1) in pairwise(schedule):
        assert h0 <= h1
        assert w0 <= w1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 256), ValueError, "height must be at least 1, got 0"),
        ((256, -16), ValueError, "width must be at least 1, got -16"),
        ((256, 250), ValueError, "width must be a multiple of patch_size = 16, got 250"),
        ((256, 256, 0), ValueError, "steps must be at least 1, got 0"),
        ((256, 256, 10, 0), ValueError, "patch_size must be at least 1, got 0"),
        ((256.0, 256), TypeError, "height must be an int, got 256.0"),
        ((256, 256, True), TypeError, "steps must be an int, got True"),
        ((1 << 24, 256), ValueError, "every side of step"),
        ((256, 256, 10**9), ValueError, "steps must be at most 4096, got 1000000000"),
    ],
)
def test_for_image_refuses(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ScaleSchedule.for_image(*arguments)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_small_integers_of_numpy_do_not_wrap_around(kind: type[np.integer]) -> None:
    schedule = ScaleSchedule.for_image(kind(120), kind(64), kind(20), kind(4))
    assert schedule == ScaleSchedule.for_image(120, 64, 20, 4)


def test_hand_made() -> None:
    schedule = ScaleSchedule([1, (2, 4), [5, 9], np.int64(3), (7, 2)])
    assert schedule.sizes == ((1, 1), (2, 4), (5, 9), (3, 3), (7, 2))
    assert schedule.lengths == (1, 8, 45, 9, 14)
    assert schedule.offsets == (0, 1, 9, 54, 63, 77)
    assert schedule.num_tokens == 77
    assert schedule.final_size == schedule[-1] == (7, 2)
    assert schedule[1:3] == ((2, 4), (5, 9))
    assert list(schedule) == list(schedule.sizes)
    assert str(schedule) == "1x1 2x4 5x9 3x3 7x2"
    assert all(type(side) is int for size in schedule for side in size)
    assert ScaleSchedule(schedule) == schedule
    assert ScaleSchedule(side for side in (1, 2)) == squares(1, 2)


def test_immutable_and_hashable() -> None:
    schedule = ScaleSchedule([1, 2])
    assert {schedule: 1}[squares(1, 2)] == 1
    assert schedule != squares(1, 3)
    with pytest.raises(FrozenInstanceError):
        schedule.sizes = ((1, 1),)  # type: ignore[misc]
    for clone in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert clone == schedule
        assert clone.offsets == schedule.offsets


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ([], ValueError, "sizes must hold at least one step, got none"),
        ([1] * 5000, ValueError, "sizes must hold at most 4096 steps, got 5000"),
        ([1, 0], ValueError, "every side of step 1 must be from 1 to 32768, got 0"),
        ([(2, -1)], ValueError, r"every side of step 0 .* got \(2, -1\)"),
        ([(1, 2, 3)], ValueError, r"step 0 must be an int or an \(h, w\) pair, got \(1, 2, 3\)"),
        ([()], ValueError, "step 0 must be an int or an"),
        ([1.5], TypeError, "every side of step 0 must be an int, got 1.5"),
        ([(1, None)], TypeError, "every side of step 0 must be an int, got None"),
        ([True], TypeError, "must be an int, got True"),
        (["1"], TypeError, "must be an int, got '1'"),
        ("1 2 4", TypeError, "sizes must be a list .* got '1 2 4'"),
        (4, TypeError, "sizes must be a list .* got 4"),
        (None, TypeError, "sizes must be a list .* got None"),
        ([1 << 20], ValueError, "must be from 1 to 32768"),
    ],
)
def test_refused(sizes: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ScaleSchedule(sizes)  # type: ignore[arg-type]
