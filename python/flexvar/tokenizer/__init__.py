"""The multi-scale VQ tokenizer: images to pyramids of codes and back."""

from flexvar.tokenizer.config import TokenizerConfig
from flexvar.tokenizer.model import MultiScaleTokenizer
from flexvar.tokenizer.quantizer import QuantizedScale, VectorQuantizer

__all__ = ["MultiScaleTokenizer", "QuantizedScale", "TokenizerConfig", "VectorQuantizer"]
