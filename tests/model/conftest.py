"""Golden values of the released code, and models filled with the weights they were computed with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flexvar import FlexVARTransformer, MultiScaleTokenizer, TokenizerConfig, TransformerConfig
from safetensors.torch import load_file
from torch import Tensor

from tests.golden.recipe import fill

GOLDEN = Path(__file__).parents[1] / "golden"

TOKENIZER_CONFIG = TokenizerConfig(codebook_size=512, base_channels=32, z_channels=64)
TRANSFORMER_CONFIG = TransformerConfig(depth=2, width=128, heads=2, num_classes=10, codebook_size=512)


@pytest.fixture(autouse=True, scope="module")
def tiny_models(one_thread: None) -> None:
    """Every test here."""


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "flexvar_golden.safetensors")


@pytest.fixture(scope="session")
def published_shapes() -> dict[str, dict[str, list[int]]]:
    """Every key and shape of each published file, by the first word of its entry in checkpoint_keys.json."""
    entries = json.loads((GOLDEN / "checkpoint_keys.json").read_text())
    files = {title.split()[0]: entry for title, entry in entries.items()}
    for depth in (16, 20, 24):  # "blocks.*": blocks like blocks.0
        shapes = files[f"FlexVARd{depth}"]
        del shapes["blocks.*"]
        first = {name: shape for name, shape in shapes.items() if name.startswith("blocks.0.")}
        for block in range(1, depth):
            shapes |= {name.replace("blocks.0.", f"blocks.{block}."): shape for name, shape in first.items()}
    llamagen = files["LlamaGen"]  # "encoder.*, decoder.*": as FlexVAE's
    files["LlamaGen"] = {**files["FlexVAE.pth"], **{k: v for k, v in llamagen.items() if "*" not in k}}
    return files


@pytest.fixture(scope="session", params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def tokenizer(backend: str) -> MultiScaleTokenizer:
    return fill(MultiScaleTokenizer(TOKENIZER_CONFIG, backend=backend))


@pytest.fixture(scope="session")
def model(backend: str) -> FlexVARTransformer:
    return fill(FlexVARTransformer(TRANSFORMER_CONFIG, backend=backend))
