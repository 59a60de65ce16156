"""The trainers learn, and a run that stopped continues as if it had not."""

import json
import math
from dataclasses import replace

import pytest
import torch
from flexvar.data import SHAPE_NAMES, ImageFolder, ShapeDataset
from flexvar.storage import load_tokenizer, load_transformer
from flexvar.tokenizer import MultiScaleTokenizer, TokenizerConfig
from flexvar.training import (
    TokenizerTrainingConfig,
    TransformerTrainingConfig,
    draw_curves,
    train_tokenizer,
    train_transformer,
)
from flexvar.training.checkpoint import load_checkpoint, save_checkpoint
from flexvar.training.classifier import train_classifier
from flexvar.training.config import TrainingConfig
from flexvar.training.transformer import random_schedule
from flexvar.transformer import TransformerConfig
from PIL import Image

DATA = ShapeDataset(240, 16, 16)
TOKENIZER = TokenizerConfig(
    codebook_size=32, codebook_dim=8, z_channels=16, base_channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=1,
    norm_groups=2, downsample_mode="bilinear", upsample_mode="bilinear",
)  # fmt: skip
TOKENIZER_TRAINING = TokenizerTrainingConfig(
    steps=12, batch_size=4, learning_rate=4e-3, warmup_steps=2, ema_decay=0.5, num_scales=2, continuous_steps=3,
    revive_every=2, checkpoint_every=6, seed=5,
)  # fmt: skip
TRANSFORMER = TransformerConfig(
    depth=2, width=64, heads=2, num_classes=12, class_names=SHAPE_NAMES, codebook_size=32, codebook_dim=8,
    upsample_mode="bilinear",
)  # fmt: skip
TRANSFORMER_TRAINING = TransformerTrainingConfig(
    steps=12, batch_size=4, learning_rate=4e-3, warmup_steps=2, ema_decay=0.5, short_steps=6, short_batch_size=8,
    checkpoint_every=6, seed=5,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class StoppedError(Exception):
    """Stands for a kill in the middle of a run."""


class StoppingDataset(ShapeDataset):
    """A data set that stops the run at its n-th batch."""

    def __init__(self, *args, batches, **kwargs):
        self.left = 10**9
        super().__init__(*args, **kwargs)
        self.left = batches

    def batch(self, indices):
        if self.left == 0:
            raise StoppedError
        self.left -= 1
        return super().batch(indices)


def run_tokenizer(folder, data=(DATA,), config=TOKENIZER_TRAINING, backend="reference", **kwargs):
    return train_tokenizer(data, folder, TOKENIZER, config, backend=backend, progress=False, **kwargs)


def run_transformer(folder, config=TRANSFORMER_TRAINING, data=(DATA,), backend="reference", **kwargs):
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(TOKENIZER, backend=backend)
    return train_transformer(data, folder, tokenizer, TRANSFORMER, config, backend=backend, progress=False, **kwargs)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def same_weights(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_tokenizer_learns_and_is_saved(tmp_path):
    state = torch.get_rng_state()
    config = replace(TOKENIZER_TRAINING, steps=24, batch_size=16, continuous_steps=12, num_scales=1, revive_every=0)
    tokenizer = run_tokenizer(tmp_path, config=config)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers stay the caller's"
    curve = losses(tmp_path)
    assert len(curve) == 24
    assert sum(curve[-4:]) / 4 < 0.8 * curve[0]
    assert not tokenizer.training
    assert same_weights(load_tokenizer(tmp_path, backend="reference"), tokenizer)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_training_on_the_cpu_seeds_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's generator was seeded"))
    run_tokenizer(tmp_path, config=replace(TOKENIZER_TRAINING, steps=2))


def test_transformer_learns_and_is_saved(tmp_path):
    model = run_transformer(tmp_path, replace(TRANSFORMER_TRAINING, steps=30, short_steps=15))
    curve = losses(tmp_path)
    assert sum(curve[-4:]) < 0.9 * sum(curve[:4])
    assert same_weights(load_transformer(tmp_path, backend="reference"), model)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_tokenizer_resumes_exactly(tmp_path, backend):
    whole = run_tokenizer(tmp_path / "whole", backend=backend)
    batches = TOKENIZER_TRAINING.steps * 2  # with those of the revivals it stops in the second half
    state = torch.get_rng_state()
    with pytest.raises(StoppedError):
        run_tokenizer(tmp_path / "stopped", [StoppingDataset(240, 16, 16, batches=batches)], backend=backend)
    assert torch.equal(torch.get_rng_state(), state), "nor does a run that ends early touch them"
    resumed = run_tokenizer(tmp_path / "stopped", backend=backend, resume=True)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert same_weights(resumed, whole)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_transformer_resumes_exactly(tmp_path, monkeypatch, backend):
    whole = run_transformer(tmp_path / "whole", backend=backend)

    import flexvar.training.transformer as module

    calls = iter(range(9))

    def stopping(*args, **kwargs):
        if next(calls, None) is None:
            raise StoppedError
        return random_schedule(*args, **kwargs)

    monkeypatch.setattr(module, "random_schedule", stopping)
    with pytest.raises(StoppedError):
        run_transformer(tmp_path / "stopped", backend=backend)
    monkeypatch.undo()
    resumed = run_transformer(tmp_path / "stopped", backend=backend, resume=True)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert same_weights(resumed, whole)


def test_a_run_is_not_overwritten_nor_mixed(tmp_path):
    config = replace(TOKENIZER_TRAINING, steps=2)
    with pytest.raises(ValueError, match=r"folder must hold checkpoint\.json"):
        run_tokenizer(tmp_path, config=config, resume=True)
    run_tokenizer(tmp_path, config=config)
    with pytest.raises(ValueError, match="already holds a run; resume it or choose another folder"):
        run_tokenizer(tmp_path, config=config)
    with pytest.raises(ValueError, match="to resume, training must be that of the checkpoint"):
        run_tokenizer(tmp_path, config=replace(config, learning_rate=1.0), resume=True)


def test_a_run_is_not_resumed_with_other_data(tmp_path):
    config = replace(TOKENIZER_TRAINING, steps=2)
    run_tokenizer(tmp_path, config=config)
    for data in (
        [ShapeDataset(240, 16, 20)],
        [ShapeDataset(120, 16, 16)],
        [ShapeDataset(240, 16, 16, seed=1)],
        [DATA, DATA],
    ):
        with pytest.raises(ValueError, match=r"to resume, data must be that of the checkpoint, .*'width': 16.*, got"):
            run_tokenizer(tmp_path, data, config, resume=True)
    run_tokenizer(tmp_path, [ShapeDataset(240, 16, 16)], config, resume=True)


def test_a_run_is_not_resumed_with_other_pictures(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "data" / name / "1.png")
    config = replace(TOKENIZER_TRAINING, steps=2)
    run_tokenizer(tmp_path / "run", [ImageFolder(tmp_path / "data", 16, 16)], config)
    (tmp_path / "data").rename(tmp_path / "moved")
    run_tokenizer(tmp_path / "run", [ImageFolder(tmp_path / "moved", 16, 16)], config, resume=True)
    (tmp_path / "moved" / "a" / "1.png").rename(tmp_path / "moved" / "a" / "2.png")
    with pytest.raises(ValueError, match="to resume, data must be that of the checkpoint"):
        run_tokenizer(tmp_path / "run", [ImageFolder(tmp_path / "moved", 16, 16)], config, resume=True)


def test_a_transformer_is_not_resumed_with_another_tokenizer(tmp_path):
    config = replace(TRANSFORMER_TRAINING, steps=2, short_steps=1)
    run_transformer(tmp_path, config)
    other = MultiScaleTokenizer(TOKENIZER, backend="reference")
    with pytest.raises(ValueError, match=r"to resume, tokenizer_weights must be that of the checkpoint, \w{8}, got"):
        train_transformer([DATA], tmp_path, other, TRANSFORMER, config, resume=True, progress=False)
    with pytest.raises(ValueError, match="to resume, data must be that of the checkpoint"):
        run_transformer(tmp_path, config, [ShapeDataset(120, 16, 16)], resume=True)
    run_transformer(tmp_path, config, resume=True)


def test_a_checkpoint_that_says_less_is_refused(tmp_path):
    config = replace(TOKENIZER_TRAINING, steps=2)
    run_tokenizer(tmp_path, config=config)
    step, tensors, values = load_checkpoint(tmp_path)
    del values["data"]
    save_checkpoint(tmp_path, step, tensors, values)
    with pytest.raises(ValueError, match="to resume, the checkpoint must say its data, got one of another kind"):
        run_tokenizer(tmp_path, config=config, resume=True)


def test_a_run_that_diverges_says_so(tmp_path):
    config = TrainingConfig(steps=20, batch_size=4, learning_rate=1e30, warmup_steps=0, bfloat16=False)
    with pytest.raises(ValueError, match=r"losses must stay finite, got .* lower the learning rate"):
        train_classifier([DATA], tmp_path, config, progress=False)


def test_a_full_disk_names_the_curves(tmp_path, largest_file):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    with largest_file(100), pytest.raises(OSError, match=r"File too large: '.*/curves\.png'"):
        draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_images_of_one_token_and_patches_of_one_pixel(tmp_path):
    pixels = replace(TOKENIZER, channel_multipliers=(2,))  # a latent is as large as its image, and shrinks to 1 x 1
    data = [ShapeDataset(24, 8, 8)]
    config = replace(TOKENIZER_TRAINING, num_scales=6)
    train_tokenizer(data, tmp_path / "pixels", pixels, config, backend="reference", progress=False)
    patches = MultiScaleTokenizer(replace(TOKENIZER, channel_multipliers=(1, 1, 1, 2)), backend="reference")
    train_transformer(data, tmp_path / "one", patches, TRANSFORMER, TRANSFORMER_TRAINING, progress=False)
    assert all(math.isfinite(loss) for folder in ("pixels", "one") for loss in losses(tmp_path / folder))


def test_random_schedules():
    import numpy as np

    rng = np.random.default_rng(0)
    for grid in ((16, 16), (12, 24), (24, 12)):
        lengths = set()
        for _ in range(200):
            schedule = random_schedule(rng, grid, 0.1)
            assert schedule.final_size == grid
            assert schedule[0] == (1, 1)
            assert 2 <= len(schedule) <= 12
            lengths.add(len(schedule))
            short = random_schedule(rng, grid, 0.1, short=True)
            assert 2 * max(short.final_size) <= max(grid)
        assert lengths >= set(range(4, 12))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be from 1 to"),
        ({"steps": 2.5}, TypeError, "steps must be an int, got 2.5"),
        ({"learning_rate": 0.0}, ValueError, r"learning_rate must be above 0, got 0\.0"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a float, got 'fast'"),
        ({"weight_decay": -1.0}, ValueError, r"weight_decay must be at least 0, got -1\.0"),
        ({"ema_decay": 1.0}, ValueError, "ema_decay must be at least 0 and below 1"),
        ({"bfloat16": 1}, TypeError, "bfloat16 must be a bool, got 1"),
        ({"num_scales": 0}, ValueError, "num_scales must be from 1 to 64, got 0"),
    ],
)
def test_bad_configs(values, error, message):
    with pytest.raises(error, match=message):
        TokenizerTrainingConfig(**values)


def test_data_and_models_must_fit(tmp_path):
    with pytest.raises(ValueError, match="train_tokenizer: datasets must each hold at least one image"):
        run_tokenizer(tmp_path, [DATA, ShapeDataset(0)])
    with pytest.raises(ValueError, match="must be multiples of patch size 4, got 18 and 16"):
        run_tokenizer(tmp_path, [ShapeDataset(12, 18, 16)])
    with pytest.raises(ValueError, match="datasets must each hold at least one image"):
        run_transformer(tmp_path, data=())
    tokenizer = MultiScaleTokenizer(TOKENIZER, backend="reference")
    for changes, message in (
        ({"codebook_size": 16}, "codebook_size must be that of the tokenizer, 32, got 16"),
        ({"upsample_mode": "bicubic"}, "upsample_mode must be that of the tokenizer, 'bilinear', got 'bicubic'"),
        ({"num_classes": 11, "class_names": ()}, "num_classes = 11"),
    ):
        with pytest.raises(ValueError, match=message):
            train_transformer(
                [DATA], tmp_path, tokenizer, replace(TRANSFORMER, **changes), TRANSFORMER_TRAINING, progress=False
            )
