"""Configuration of the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from flexvar._config import RESAMPLE_MODES, JsonConfig


@dataclass(frozen=True)
class TokenizerConfig(JsonConfig):
    """Shape of a :class:`~flexvar.tokenizer.MultiScaleTokenizer`. The defaults are the published FlexVAE.

    Attributes:
        codebook_size: number of codes.
        codebook_dim: channels of a code.
        z_channels: channels between encoder and ``quant_conv``.
        base_channels: channels of the first level, a multiple of ``norm_groups``.
        channel_multipliers: channels of each level over ``base_channels``; levels but the last halve the resolution.
        num_res_blocks: residual blocks of an encoder level; a decoder level has one more.
        norm_groups: groups of every GroupNorm. A group of a single channel would forget that channel's mean over the
            image, and with it the image's colours: models of few channels want fewer groups.
        normalize_codes: compare and embed codes on the unit sphere.
        downsample_mode: how a latent goes to a smaller grid; "bilinear" is antialiased.
        upsample_mode: how codes go to the next step's grid.
    """

    codebook_size: int = 8912
    codebook_dim: int = 32
    z_channels: int = 256
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32
    normalize_codes: bool = True
    downsample_mode: str = "area"
    upsample_mode: str = "bicubic"

    def __post_init__(self) -> None:
        self._check_int("codebook_size", 1, 1 << 24)
        self._check_int("codebook_dim", 1, 1 << 12)
        self._check_int("z_channels", 1, 1 << 14)
        self._check_int("norm_groups", 1, 1 << 12)
        self._check_int("base_channels", 1, 1 << 12)
        if self.base_channels % self.norm_groups:
            raise ValueError(
                f"TokenizerConfig: base_channels must be a multiple of {self.norm_groups}, got {self.base_channels}"
            )
        multipliers = self.channel_multipliers
        if not isinstance(multipliers, (list, tuple)) or any(type(m) is not int for m in multipliers):
            raise TypeError(f"TokenizerConfig: channel_multipliers must be a tuple of ints, got {multipliers!r}")
        if not 1 <= len(multipliers) <= 8 or any(not 1 <= m <= 64 for m in multipliers):
            raise ValueError(
                f"TokenizerConfig: channel_multipliers must be 1 to 8 ints from 1 to 64, got {tuple(multipliers)}"
            )
        object.__setattr__(self, "channel_multipliers", tuple(multipliers))
        self._check_int("num_res_blocks", 1, 64)
        self._check_bool("normalize_codes")
        self._check_choice("downsample_mode", RESAMPLE_MODES)
        self._check_choice("upsample_mode", RESAMPLE_MODES)

    @property
    def patch_size(self) -> int:
        """Pixels of the image along a side of one token."""
        return 1 << (len(self.channel_multipliers) - 1)

    @property
    def downsample_antialias(self) -> bool:
        """Whether going to a smaller grid is antialiased: area averages anyway, bilinear is."""
        return self.downsample_mode == "bilinear"
