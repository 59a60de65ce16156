"""The bundled model fits the presets that are said to have made it, and what it was trained on."""

import pytest
import torch
from flexvar.data import SHAPE_NAMES, ShapeDataset
from flexvar.data.dataset import to_model_range
from flexvar.generation import FlexVARPipeline
from flexvar.generation.pretrained import DEMO_FOLDER, FILES
from flexvar.schedule import ScaleSchedule
from flexvar.training.classifier import ShapeClassifier
from flexvar.training.evaluate import generated_accuracy
from flexvar.training.presets import DEMO_GENERATION, DEMO_TOKENIZER, DEMO_TRANSFORMER


@pytest.fixture(scope="module")
def demo():
    return FlexVARPipeline.from_pretrained("demo", backend="reference")


def test_size_and_configs(demo):
    assert sum((DEMO_FOLDER / file).stat().st_size for file in FILES) <= 12 * 2**20
    assert demo.tokenizer.config == DEMO_TOKENIZER
    assert demo.transformer.config == DEMO_TRANSFORMER
    assert demo.class_names == SHAPE_NAMES
    assert demo.defaults == DEMO_GENERATION


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96)])
def test_the_tokenizer_knows_the_shapes(demo, height, width):
    images, _ = ShapeDataset(12, height, width, seed=9).batch(range(12))
    images = to_model_range(images)
    with torch.inference_mode():
        decoded = demo.tokenizer.reconstruct(images, ScaleSchedule([(height // 4, width // 4)]))[0]
    error = (decoded - images).abs().mean()
    assert error < 0.09  # in [-1, 1]; a grey image has 0.7, the right brightness alone 0.25


def test_accuracy_counts_named_classes(demo):
    """A classifier that always says "ring" is right for one class in twelve."""
    judge = ShapeClassifier(12).eval()
    with torch.no_grad():
        judge.head.weight.zero_()
        judge.head.bias.copy_(torch.arange(12) == SHAPE_NAMES.index("ring"))
    assert generated_accuracy(demo, judge, (16, 32), 4, images_per_class=1) == pytest.approx(1 / 12)
