"""Configuration of the transformer."""

from __future__ import annotations

from dataclasses import dataclass

from flexvar._config import RESAMPLE_MODES, JsonConfig


@dataclass(frozen=True)
class TransformerConfig(JsonConfig):
    """Shape of a :class:`~flexvar.transformer.FlexVARTransformer`. The defaults are the published FlexVAR-d16.

    Attributes:
        depth: number of blocks.
        width: channels of a token.
        heads: attention heads; ``width`` is a multiple of it, for the native ops 32, 64, 96 or 128 times it.
        num_classes: classes; index ``num_classes`` is the null class of classifier-free guidance.
        codebook_size: codes of the tokenizer.
        codebook_dim: channels of a code.
        qk_l2_norm: queries and keys of unit length, with a learned scale per head.
        shared_adaln: one AdaLN projection for all blocks, plus a learned offset per block.
        position_grid: side of the learned grid of position embeddings.
        mlp_ratio: hidden channels of the feed-forward network over ``width``.
        upsample_mode: how the codes of a step go to the next step's grid; that of the tokenizer.
        class_dropout: probability that a label becomes the null class in training.
        drop_path: probability that the last block's residual branches are dropped in training; it grows linearly from 0
            at the first block.
        class_names: a name for every class, different beyond upper and lower case; or none.
    """

    depth: int = 16
    width: int = 1024
    heads: int = 16
    num_classes: int = 1000
    codebook_size: int = 8912
    codebook_dim: int = 32
    qk_l2_norm: bool = True
    shared_adaln: bool = False
    position_grid: int = 32
    mlp_ratio: int = 4
    upsample_mode: str = "bicubic"
    class_dropout: float = 0.1
    drop_path: float = 0.0
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_int("depth", 1, 1 << 9)
        self._check_int("width", 1, 1 << 14)
        self._check_int("heads", 1, 1 << 9)
        if self.width % self.heads:
            raise ValueError(
                f"TransformerConfig: width must be a multiple of heads, got width {self.width} and heads {self.heads}"
            )
        self._check_int("num_classes", 1, 1 << 24)
        self._check_int("codebook_size", 1, 1 << 24)
        self._check_int("codebook_dim", 1, 1 << 12)
        self._check_bool("qk_l2_norm")
        self._check_bool("shared_adaln")
        self._check_int("position_grid", 1, 1 << 10)
        self._check_int("mlp_ratio", 1, 64)
        self._check_choice("upsample_mode", RESAMPLE_MODES)
        self._check_probability("class_dropout")
        self._check_probability("drop_path")
        names = self.class_names
        if not isinstance(names, (list, tuple)) or any(not isinstance(name, str) for name in names):
            raise TypeError(f"TransformerConfig: class_names must be a tuple of strings, got {type(names).__name__}")
        if len(names) not in (0, self.num_classes) or len({name.casefold() for name in names}) != len(names):
            raise ValueError(
                f"TransformerConfig: class_names must be {self.num_classes} names that differ by more than case, or "
                f"none at all, got {len(names)} names"
            )
        object.__setattr__(self, "class_names", tuple(names))

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.width // self.heads

    @property
    def null_class(self) -> int:
        """The label of the unconditional branch of classifier-free guidance."""
        return self.num_classes
