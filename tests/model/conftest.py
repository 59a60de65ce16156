"""Golden values of the released code, and models filled with the weights they were computed with."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from flexvar import FlexVARTransformer, MultiScaleTokenizer, TokenizerConfig, TransformerConfig
from safetensors.torch import load_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parents[1] / "golden"

TOKENIZER_CONFIG = TokenizerConfig(codebook_size=512, base_channels=32, z_channels=64)
TRANSFORMER_CONFIG = TransformerConfig(depth=2, width=128, heads=2, num_classes=10, codebook_size=512)


def golden_value(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight recipe of tests/golden/README.md."""
    words = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(math.prod(shape))
    u = ((words >> 11) * 2.0**-53 - 0.5) * math.sqrt(12)
    if name.endswith("scale_mul_1H11"):
        value = math.log(4) + 0.1 * u
    elif name.endswith("embedding.weight"):
        value = u
    elif name.endswith(("class_emb.weight", "pos_start", "pos_1LC")):
        value = 0.5 * u
    elif len(shape) >= 2:
        value = u / math.sqrt(math.prod(shape[1:]))
    elif name.endswith("weight"):
        value = 1 + 0.1 * u
    else:
        value = 0.1 * u
    return torch.from_numpy(value.astype(np.float32)).view(shape)


def fill(module: nn.Module) -> nn.Module:
    """Give a module the golden weights, in evaluation mode."""
    module.load_state_dict({name: golden_value(name, tuple(v.shape)) for name, v in module.state_dict().items()})
    return module.eval()


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
