"""Checkpoints of others: read safely, loaded strictly, refused clearly."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flexvar import (
    FlexVARTransformer,
    ScaleSchedule,
    TransformerConfig,
    load_checkpoint_file,
    load_published_state_dict,
)
from flexvar.checkpoint import MissingCheckpointError
from safetensors.torch import save_file
from torch import Tensor

from tests.golden.recipe import fill

CONFIG = TransformerConfig(depth=1, width=32, heads=1, num_classes=2, codebook_size=6, codebook_dim=4, position_grid=4)


@pytest.fixture
def model(backend: str) -> FlexVARTransformer:
    return FlexVARTransformer(CONFIG, backend=backend).eval()


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return fill(FlexVARTransformer(CONFIG, backend="reference")).state_dict()


def as_published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    extra = {
        "attn_bias_for_masking": torch.zeros(1, 1, 9, 9),
        "blocks.0.attn.zero_k_bias": torch.zeros(32),
        "quantize.codebook_used": torch.zeros(65536),
    }
    return {**weights, **extra}


@pytest.mark.parametrize(
    "wrap",
    [lambda w: w, lambda w: {"model": w, "epoch": 3}, lambda w: {"trainer": {"var_wo_ddp": w, "step": 1}, "args": "…"}],
    ids=["raw", "model", "trainer"],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_published_layouts(
    wrap: Callable, suffix: str, model: FlexVARTransformer, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(wrap(as_published(weights)), path)
    load_published_state_dict(model, load_checkpoint_file(path))
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_safetensors(model: FlexVARTransformer, weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "model.safetensors")
    load_published_state_dict(model, load_checkpoint_file(str(tmp_path / "model.safetensors")))
    assert torch.equal(model.head.weight, weights["head.weight"])


def test_half_precision_weights_are_converted(model: FlexVARTransformer, weights: dict[str, Tensor]) -> None:
    load_published_state_dict(model, {name: value.half() for name, value in weights.items()})
    assert model.head.weight.dtype == torch.float32


def without(weights: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w: without(w, "head.bias"), ValueError, r"got 1 missing \(head.bias\)"),
        (lambda w: {}, ValueError, r"got \d+ missing \(pos_start, .* and \d+ more\)"),
        (lambda w: {**w, "lvl_embed.weight": w["pos_start"]}, ValueError, r"got 1 unknown \(lvl_embed.weight\)"),
        (
            lambda w: {f"module.{name}": v for name, v in w.items()},
            ValueError,
            r"missing .*, \d+ unknown \(module.pos_sta",
        ),
        (lambda w: {**w, "head.bias": torch.ones(7)}, ValueError, r"head.bias must have shape \(6,\) .* got \(7,\)"),
        (
            lambda w: {**w, "head.bias": torch.ones(6).long()},
            ValueError,
            "head.bias must be floating point, got torch.int64",
        ),
        (lambda w: {**w, "head.bias": torch.full((6,), torch.nan)}, ValueError, "head.bias must be finite"),
        (
            lambda w: {**w, "head.bias": torch.tensor([1, 2, 3, 4, 5, torch.inf])},
            ValueError,
            "head.bias must be finite",
        ),
        (
            lambda w: {**w, "head.bias": torch.full((6,), 1e300, dtype=torch.float64)},
            ValueError,
            "head.bias must be finite in float32",
        ),
        (lambda w: {**w, "head.bias": [1.0] * 6}, TypeError, "must map names to tensors, got list for 'head.bias'"),
        (lambda w: {**w, 3: w["head.bias"]}, TypeError, "must map names to tensors, got Tensor for 3"),
        (lambda w: {"epoch": 3, "loss": 0.5}, TypeError, "must map names to tensors, got int for 'epoch'"),
        (lambda w: [w], TypeError, "state_dict must be a mapping, got list"),
        (lambda w: None, TypeError, "state_dict must be a mapping, got NoneType"),
    ],
)
def test_foreign_state_dicts_change_nothing(
    change: Callable, error: type[Exception], message: str, model: FlexVARTransformer, weights: dict[str, Tensor]
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=f"load_published_state_dict: .*{message}"):
        load_published_state_dict(model, change(weights))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    load_published_state_dict(model, weights)
    assert model(torch.tensor([1]), torch.zeros(1, 4, 4), ScaleSchedule([1, 2])).shape == (1, 5, 6)


def test_finite_weights_may_sum_to_infinity(model: FlexVARTransformer, weights: dict[str, Tensor]) -> None:
    load_published_state_dict(model, {**weights, "head.bias": torch.full((6,), 3e38)})
    assert (model.head.bias == 3e38).all()


def test_missing_file(tmp_path: Path) -> None:
    for error in (MissingCheckpointError, ValueError, FileNotFoundError):
        with pytest.raises(error, match=r"checkpoint file .*none\.pth must exist, got no such file"):
            load_checkpoint_file(tmp_path / "none.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "content", [b"", b"PK", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(500), bytes(1000), b"\xff" * 1000]
)
def test_other_files(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"other{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"checkpoint file .*other\{suffix} "):
        load_checkpoint_file(path)


def test_other_suffixes_and_contents(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"photo")
    with pytest.raises(ValueError, match=r"photo\.jpg must end in \.safetensors, .* got '\.jpg'"):
        load_checkpoint_file(path)
    path = tmp_path / "list.pth"
    torch.save([torch.ones(2)], path)
    with pytest.raises(ValueError, match=r"list\.pth must hold a dict, got list"):
        load_checkpoint_file(path)


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, protocol=2))], ids=["zip", "pickle"]
)
def test_no_code_is_run(save: Callable, tmp_path: Path) -> None:
    save({"model": Payload(tmp_path / "was_here")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"checkpoint file .*evil\.pth holds more than tensors, or is none"):
        load_checkpoint_file(tmp_path / "evil.pth")
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_anywhere(suffix: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    whole = path.read_bytes()
    for length in {*range(0, len(whole), len(whole) // 60), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"checkpoint file .*weights\{suffix} "):
            load_checkpoint_file(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_flipped_bits_never_crash(
    suffix: str, model: FlexVARTransformer, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """A flip in the structure is refused; one in a weight cannot be seen in formats that carry no checksum."""
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    whole = bytearray(path.read_bytes())
    generator = random.Random(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[generator.randrange(min(len(whole), 4096))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            load_published_state_dict(model, load_checkpoint_file(path))
        except (ValueError, TypeError):
            refused += 1
    assert refused > 0
