"""The bundled demo model: 64 x 64 px, shapes of twelve classes. These values made the weights in ``flexvar/demo``."""

from __future__ import annotations

from flexvar.data import SHAPE_NAMES, ImageDataset, ShapeDataset
from flexvar.generation.settings import GenerationOptions
from flexvar.tokenizer import TokenizerConfig
from flexvar.training.config import TokenizerTrainingConfig, TransformerTrainingConfig
from flexvar.transformer import TransformerConfig

DEMO_TOKENIZER = TokenizerConfig(
    codebook_size=512,
    codebook_dim=16,
    z_channels=64,
    base_channels=16,
    channel_multipliers=(1, 2, 4),
    num_res_blocks=1,
    norm_groups=4,
    downsample_mode="bilinear",
    upsample_mode="bilinear",
)

DEMO_TOKENIZER_TRAINING = TokenizerTrainingConfig(
    steps=5000,
    batch_size=8,
    learning_rate=2e-3,
    warmup_steps=50,
    ema_decay=0.995,
    checkpoint_every=100,
    num_scales=2,
    gradient_weight=0.5,
    continuous_steps=400,
    revive_every=50,
)

DEMO_TRANSFORMER = TransformerConfig(
    depth=6,
    width=128,
    heads=2,
    num_classes=len(SHAPE_NAMES),
    class_names=SHAPE_NAMES,
    codebook_size=512,
    codebook_dim=16,
    upsample_mode="bilinear",
)

DEMO_TRANSFORMER_TRAINING = TransformerTrainingConfig(
    steps=10_000,
    batch_size=8,
    learning_rate=2e-3,
    warmup_steps=100,
    gradient_clip=1.0,
    ema_decay=0.995,
    checkpoint_every=250,
    step_dropout=0.1,
    short_steps=5000,
    short_batch_size=32,
)

#: What suits the demo's transformer: the same guidance at every step, and not the least likely codes. (With top_p 0.5 a
#: wide image often stays empty: nowhere is the shape likelier than not.)
DEMO_GENERATION: GenerationOptions = {"guidance_scale": 2.5, "guidance_style": "llamagen", "top_p": 0.9}


def demo_tokenizer_data() -> list[ImageDataset]:
    """What the demo's tokenizer learns from."""
    return [ShapeDataset(24_000), ShapeDataset(6_000, height=48, width=96), ShapeDataset(6_000, height=96, width=48)]


def demo_transformer_data() -> list[ImageDataset]:
    """What the demo's transformer learns from: squares, and some images of 1:2 and 2:1 with about as many pixels."""
    return [ShapeDataset(24_000), ShapeDataset(8_000, height=48, width=96), ShapeDataset(8_000, height=96, width=48)]
