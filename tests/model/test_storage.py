"""Models on disk: what is saved is what is loaded, and nothing else is."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from flexvar import FlexVARTransformer, MultiScaleTokenizer, TokenizerConfig, TransformerConfig
from flexvar._files import write_atomically
from flexvar.storage import load_tokenizer, load_transformer, save_model
from safetensors.torch import load_file, save_file


def tiny_transformer(**changes: object) -> FlexVARTransformer:
    options = {"depth": 1, "width": 64, "heads": 2, "num_classes": 3, "codebook_size": 16, "codebook_dim": 8}
    torch.manual_seed(0)
    return FlexVARTransformer(TransformerConfig.from_dict({**options, **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tiny_transformer(class_names=["star", "Herz", "円"]), tmp_path / "model")
    return tmp_path / "model"


def test_transformer_round_trip(folder: Path) -> None:
    loaded, saved = load_transformer(folder), tiny_transformer()
    assert loaded.config.class_names == ("star", "Herz", "円")
    assert not loaded.training
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_tokenizer_round_trip_in_half_precision(tmp_path: Path) -> None:
    config = TokenizerConfig(16, 8, 32, 32, (1, 1), num_res_blocks=1, downsample_mode="bilinear")
    tokenizer = MultiScaleTokenizer(config)
    save_model(tokenizer, tmp_path, dtype=torch.bfloat16)
    loaded = load_tokenizer(tmp_path, backend="reference")
    assert loaded.config == config
    assert loaded.backend == "reference"
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, int, "float16"])
def test_only_floating_point_types_are_stored(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"save_model: dtype must be .* or None, got "):
        save_model(tiny_transformer(), tmp_path / "model", dtype=dtype)
    assert not os.listdir(tmp_path)


def test_loaded_models_can_be_trained(folder: Path) -> None:
    loaded = load_transformer(folder)
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in loaded.parameters())


def test_loading_leaves_the_global_generator_alone(folder: Path, untouched_global_rng: None) -> None:
    load_transformer(folder)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_truncated_weights_are_refused(folder: Path, length: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_transformer(folder)


def test_every_flipped_bit_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    for at in [*range(0, 3000, 97), len(data) // 2, len(data) - 1]:
        data[at] ^= 1 << at % 8
        weights.write_bytes(data)
        with pytest.raises((ValueError, TypeError)):
            load_transformer(folder)
        data[at] ^= 1 << at % 8


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    save_model(tiny_transformer(width=128), folder.parent / "other")
    os.replace(folder.parent / "other" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: .* must have shape"):
        load_transformer(folder)


def test_weights_of_foreign_origin_need_no_checksum_but_the_right_names(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors")
    load_transformer(folder)
    save_file({**weights, "extra": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 unknown \(extra\)"):
        load_transformer(folder)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "must be JSON"),
        (b"\xff\xfe", "must be JSON"),
        (b"[" * 100_000, "must be JSON"),
        (b"[1, 2]", "must hold a JSON object, got list"),
        (b"{}" + b" " * (1 << 20), "at most 1048576 bytes"),
        (b'{"depth": 1e9}', "depth must be an int"),
        (b'{"depth": -1}', "depth must be from 1"),
        (b'{"model_type": "llama"}', "got model_type"),
        (b'{"class_names": "star"}', "class_names must be a tuple of strings"),
        (b'{"num_classes": 2, "class_names": ["a", "A"]}', "differ by more than case"),
        (b'{"num_classes": 2, "class_names": ["a"]}', "must be 2 names"),
    ],
)
def test_foreign_configs_are_refused(folder: Path, content: bytes, error: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises((ValueError, TypeError), match=error):
        load_transformer(folder)


def test_config_of_a_tokenizer_is_not_a_transformers(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(TokenizerConfig().to_dict()))
    with pytest.raises(ValueError, match="TransformerConfig: fields must be among"):
        load_transformer(folder)


def test_missing_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_transformer(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_transformer(folder)


def test_failed_save_leaves_the_old_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(tiny_transformer(width=128), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_threads_that_save_one_file_at_once_leave_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, both = os.fsync, threading.Barrier(2)

    def sync_together(descriptor: int) -> None:
        both.wait(timeout=30)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_together)
    wanted = [b"a" * 1000, b"b" * 2000]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write_atomically, [tmp_path / "file"] * 2, wanted))
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() in wanted
