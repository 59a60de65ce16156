"""Models on disk: a folder with ``config.json`` (the config's fields) and ``model.safetensors`` (the weights).

Nothing in these files is ever executed, and no name in them is used as a path. The weights carry a checksum, so that a
damaged file is refused rather than loaded. For the published ``.pth`` files see :mod:`flexvar.checkpoint`.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from flexvar._checks import check_weights_dtype
from flexvar._files import read_json_object, write_atomically
from flexvar.checkpoint import check_state_dict, load_checkpoint_file
from flexvar.tokenizer import MultiScaleTokenizer, TokenizerConfig
from flexvar.transformer import FlexVARTransformer, TransformerConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_CHECKSUM = "crc32"


def save_model(
    model: MultiScaleTokenizer | FlexVARTransformer,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a model's config and weights into a folder, which is made if need be.

    Args:
        model: what to save.
        folder: where to.
        dtype: what the weights are stored in, a floating point type; by default what they are.

    Raises:
        TypeError: another dtype.
        OSError: the folder cannot be written; files that were there are left whole.
    """
    check_weights_dtype("save_model", dtype)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().to(dtype).contiguous() for name, value in model.state_dict().items()}
    write_atomically(target / WEIGHTS_FILE, save(weights, metadata={_CHECKSUM: weights_checksum(weights)}))
    write_atomically(target / CONFIG_FILE, (json.dumps(model.config.to_dict(), indent=2) + "\n").encode())


def load_tokenizer(folder: str | os.PathLike[str], *, backend: str = "native") -> MultiScaleTokenizer:
    """Reads a tokenizer that :func:`save_model` wrote, in evaluation mode, float32, on the CPU.

    Raises:
        OSError: a file cannot be read, or is missing (MissingCheckpointError, which is a ValueError too).
        ValueError, TypeError: a file is damaged, or is not a tokenizer's.
    """
    config = TokenizerConfig.from_dict(read_json_object(Path(folder) / CONFIG_FILE))
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        tokenizer = MultiScaleTokenizer(config, backend=backend)
    _load_weights(tokenizer, Path(folder))
    return tokenizer.eval()


def load_transformer(folder: str | os.PathLike[str], *, backend: str = "native") -> FlexVARTransformer:
    """Reads a transformer that :func:`save_model` wrote; otherwise as :func:`load_tokenizer`."""
    config = TransformerConfig.from_dict(read_json_object(Path(folder) / CONFIG_FILE))
    with torch.device("meta"):
        transformer = FlexVARTransformer(config, backend=backend)
    _load_weights(transformer, Path(folder))
    return transformer.eval()


def _load_weights(model: MultiScaleTokenizer | FlexVARTransformer, folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    weights = load_checkpoint_file(path)
    with safe_open(path, framework="pt") as file:
        stored = (file.metadata() or {}).get(_CHECKSUM)
    if stored is not None and stored != weights_checksum(weights):
        raise ValueError(
            f"{path} must match its checksum {stored}, got {weights_checksum(weights)}: the file is damaged"
        )
    check_state_dict(model, weights, str(path))
    model.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    if isinstance(model, MultiScaleTokenizer):
        model.arrange()


def weights_checksum(weights: Mapping[str, Tensor]) -> str:
    """CRC-32 over names, types, shapes and bytes, in the order of the names."""
    crc = 0
    for name in sorted(weights):
        value = weights[name]
        crc = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), crc)
        crc = zlib.crc32(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), crc)
    return f"{crc:08x}"
