"""FlexVAR: visual autoregressive generation at any resolution and in any number of steps.

Nothing is loaded before it is used: ``import flexvar`` imports neither torch nor the native ops.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexvar.checkpoint import load_checkpoint_file, load_published_state_dict
    from flexvar.generation import Expand, FlexVARPipeline, GenerationSettings, Inpaint, Outpaint, Refine
    from flexvar.schedule import ScaleSchedule
    from flexvar.storage import load_tokenizer, load_transformer, save_model
    from flexvar.tokenizer import MultiScaleTokenizer, TokenizerConfig
    from flexvar.transformer import FlexVARTransformer, KVCache, TransformerConfig, next_scale_inputs

__version__ = "0.1.0"

_MODULE_OF = {
    "Expand": "flexvar.generation",
    "FlexVARPipeline": "flexvar.generation",
    "FlexVARTransformer": "flexvar.transformer",
    "GenerationSettings": "flexvar.generation",
    "Inpaint": "flexvar.generation",
    "KVCache": "flexvar.transformer",
    "MultiScaleTokenizer": "flexvar.tokenizer",
    "Outpaint": "flexvar.generation",
    "Refine": "flexvar.generation",
    "ScaleSchedule": "flexvar.schedule",
    "TokenizerConfig": "flexvar.tokenizer",
    "TransformerConfig": "flexvar.transformer",
    "load_checkpoint_file": "flexvar.checkpoint",
    "load_published_state_dict": "flexvar.checkpoint",
    "load_tokenizer": "flexvar.storage",
    "load_transformer": "flexvar.storage",
    "next_scale_inputs": "flexvar.transformer",
    "save_model": "flexvar.storage",
}

__all__ = [
    "Expand",
    "FlexVARPipeline",
    "FlexVARTransformer",
    "GenerationSettings",
    "Inpaint",
    "KVCache",
    "MultiScaleTokenizer",
    "Outpaint",
    "Refine",
    "ScaleSchedule",
    "TokenizerConfig",
    "TransformerConfig",
    "load_checkpoint_file",
    "load_published_state_dict",
    "load_tokenizer",
    "load_transformer",
    "next_scale_inputs",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'flexvar' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
