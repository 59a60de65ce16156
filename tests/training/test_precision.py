"""Training multiplies in bfloat16 only where torch has products of it that are worth having."""

from __future__ import annotations

import warnings

import pytest
import torch
from flexvar import cli_train
from flexvar.data import ShapeDataset
from flexvar.training import TrainingConfig, evaluate, loop, precision
from flexvar.training.checkpoint import save_checkpoint
from flexvar.training.classifier import train_classifier

CPU = torch.device("cpu")


@pytest.mark.parametrize("is_fast", [False, True])
def test_the_command_line_takes_what_is_fast_unless_told(monkeypatch, capsys, is_fast):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: is_fast)
    assert cli_train._takes_bfloat16(None, CPU) == is_fast
    assert ("training in float32" in capsys.readouterr().err) == (not is_fast)
    for dtype in cli_train.TrainingPrecision:
        assert cli_train._takes_bfloat16(dtype, CPU) == (dtype.value == "bfloat16")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_slow_run_warns(monkeypatch, tmp_path, bfloat16):
    monkeypatch.setattr(loop, "multiplies_bfloat16", lambda device: False)
    config = TrainingConfig(steps=1, batch_size=1, warmup_steps=0, bfloat16=bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Not of 8 pixels: torch's bfloat16 gradient of a convolution of stride 2 on a map of one pixel holds memory
        # that nobody wrote (oneDNN on AVX512-BF16).
        train_classifier([ShapeDataset(8, 32, 32)], tmp_path, config, progress=False)
    assert any("loop of scalars" in str(one.message) for one in caught) == bfloat16


def test_a_classifier_goes_on_in_what_it_was_begun_in(monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(evaluate, "multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr(evaluate, "train_classifier", lambda *given, resume: taken.append(given[2].bfloat16))
    evaluate.shape_classifier(tmp_path)
    save_checkpoint(tmp_path, 1, {}, {"training": {"bfloat16": True}})
    evaluate.shape_classifier(tmp_path)
    assert taken == [False, True]


def test_on_a_gpu_it_is_fast():
    assert precision.multiplies_bfloat16("cuda")
    assert isinstance(precision.multiplies_bfloat16(CPU), bool)
