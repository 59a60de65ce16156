"""The FlexVAR transformer: predicts the codes of every scale from those of the scale before."""

from flexvar.transformer.config import TransformerConfig
from flexvar.transformer.inputs import next_scale_inputs
from flexvar.transformer.kv_cache import KVCache
from flexvar.transformer.model import FlexVARTransformer, GenerationState

__all__ = ["FlexVARTransformer", "GenerationState", "KVCache", "TransformerConfig", "next_scale_inputs"]
