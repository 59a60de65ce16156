"""Training: the tokenizer, the transformer, and a classifier that judges what they generate."""

from flexvar.training.config import TokenizerTrainingConfig, TrainingConfig, TransformerTrainingConfig
from flexvar.training.curves import draw_curves
from flexvar.training.tokenizer import train_tokenizer
from flexvar.training.transformer import train_transformer

__all__ = [
    "TokenizerTrainingConfig",
    "TrainingConfig",
    "TransformerTrainingConfig",
    "draw_curves",
    "train_tokenizer",
    "train_transformer",
]
