"""Weights from files: reading them safely, and loading the published checkpoints."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# Entries of the published files that are not weights: a mask, a usage counter, biases that are zero by construction.
_NOT_WEIGHTS = ("attn_bias_for_masking", "codebook_used", "zero_k_bias")
_PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_SHOWN = 5


class MissingCheckpointError(ValueError, FileNotFoundError):
    """There is no such file. A ValueError, as for any bad argument, and a FileNotFoundError."""


def load_checkpoint_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a ``.safetensors`` file, or a ``.pth`` / ``.pt`` / ``.bin`` / ``.ckpt`` file of tensors, onto the CPU.

    Pickles are read with ``weights_only=True``: a file that would run code is refused.

    Raises:
        MissingCheckpointError: there is no such file.
        ValueError: another suffix, or a truncated, foreign or unsafe file; the text names file and reason.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingCheckpointError(f"checkpoint file {path} must exist, got no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"checkpoint file {path} is not a whole safetensors file: {error}") from error
    if path.suffix not in _PICKLE_SUFFIXES:
        raise ValueError(
            f"checkpoint file {path} must end in .safetensors, {', '.join(_PICKLE_SUFFIXES)}, got {path.suffix!r}"
        )
    with path.open("rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"checkpoint file {path} holds more than tensors, or is none: {reason}") from error
        except Exception as error:  # what torch.load raises for a damaged file depends on where the damage is
            reason = str(error) or type(error).__name__
            raise ValueError(f"checkpoint file {path} is damaged or not a checkpoint: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint file {path} must hold a dict, got {type(content).__name__}")
    return content


def load_published_state_dict(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a published checkpoint (FlexVAE, FlexVAR d16 / d20 / d24, LlamaGen VQ) into a tokenizer or transformer.

    Takes the state dict itself, {"model": state_dict} or {"trainer": {"var_wo_ddp": state_dict}}. Entries that are not
    weights (``attn_bias_for_masking``, ``codebook_used``, ``zero_k_bias``) are left out; everything else must match in
    name and shape. On an error the module is unchanged.

    Raises:
        TypeError: ``state_dict`` is not a mapping of names to tensors.
        ValueError: entries are missing, unknown, of another shape or not finite; the text names the first of them.
    """
    weights = {name: value for name, value in _unwrap(state_dict).items() if not str(name).endswith(_NOT_WEIGHTS)}
    check_state_dict(module, weights, "load_published_state_dict")
    module.load_state_dict(weights)


def check_state_dict(module: nn.Module, weights: Mapping[str, Any], op: str) -> None:
    """Raise unless ``weights`` holds exactly the module's entries, in their shapes and finite (errors as above)."""
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(f"{op}: state_dict must map names to tensors, got {type(value).__name__} for {name!r}")
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    kind = type(module).__name__
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected]
    if missing or unknown:
        difference = ", ".join(part for part in (_listed("missing", missing), _listed("unknown", unknown)) if part)
        raise ValueError(f"{op}: state_dict must have exactly the entries of the {kind}, got {difference}")
    for name, shape in expected.items():
        value = weights[name]
        if tuple(value.shape) != shape:
            raise ValueError(f"{op}: {name} must have shape {shape} as in the {kind}, got {tuple(value.shape)}")
        if not value.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {value.dtype}")
        if not value.is_meta and not _is_finite(value):
            raise ValueError(f"{op}: {name} must be finite in float32, got NaN or infinity")


def _is_finite(value: Tensor) -> bool:
    # A finite sum proves finite terms and is several times cheaper than looking at each; the sum may overflow.
    return bool(value.sum(dtype=torch.float32).isfinite()) or bool(value.float().isfinite().all())


def _unwrap(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    for path in (("trainer", "var_wo_ddp"), ("model",)):
        inner: Any = state_dict
        for key in path:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            return inner
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"load_published_state_dict: state_dict must be a mapping, got {type(state_dict).__name__}")
    return state_dict


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})"
