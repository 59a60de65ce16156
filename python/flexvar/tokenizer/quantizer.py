"""Vector quantisation of latents at any set of scales, with one codebook for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar._backend import check_backend, ops
from flexvar._checks import check_schedule, describe
from flexvar.schedule import ScaleSchedule
from flexvar.tokenizer.config import TokenizerConfig


@dataclass(frozen=True)
class QuantizedScale:
    """A latent quantised at one scale, for training.

    Attributes:
        codes: [B, codebook_dim, h, w], the codes; gradients pass straight through to the latent.
        indices: int64 [B, h, w], their indices.
        codebook_loss: scalar, mean squared distance that pulls the codes to the latent.
        commitment_loss: scalar, the same distance that pulls the latent to the codes.
    """

    codes: Tensor
    indices: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


def check_latent(op: str, name: str, value: object, config: TokenizerConfig) -> None:
    """Raise TypeError or ValueError unless ``value`` is a floating point [B, codebook_dim, h, w]."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating point tensor, got {describe(value)}")
    if value.ndim != 4 or value.shape[1] != config.codebook_dim or 0 in value.shape[2:]:
        raise ValueError(
            f"{op}: {name} must have shape [B, C, h, w] with C = codebook_dim = {config.codebook_dim}, "
            f"got {tuple(value.shape)}"
        )


class VectorQuantizer(nn.Module):
    """The codebook and what is looked up in it. Parameter: ``embedding.weight`` [codebook_size, codebook_dim]."""

    def __init__(self, config: TokenizerConfig, *, backend: str = "native") -> None:
        super().__init__()
        self.config = config
        self.backend = check_backend(backend)
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / config.codebook_size, 1.0 / config.codebook_size)

    def forward(self, latent: Tensor, schedule: ScaleSchedule) -> list[Tensor]:
        """The pyramid of codes nearest to a latent resampled to every size of a schedule. Carries no gradient.

        Args:
            latent: [B, codebook_dim, H, W], of any size.
            schedule: the sizes to quantise at.

        Returns:
            For every step int64 [B, h_i, w_i].

        Raises:
            TypeError: a latent that is not floating point, or something else than a schedule.
            ValueError: a latent of another shape.
        """
        check_latent("quantize", "latent", latent, self.config)
        check_schedule("quantize", schedule)
        tokens = ops(self.backend).vq_lookup_multiscale(
            latent.detach(),
            self.embedding.weight.detach(),
            schedule.sizes,
            normalize=self.config.normalize_codes,
            mode=self.config.downsample_mode,
            antialias=self.config.downsample_antialias,
        )
        parts = tokens.split(schedule.lengths, dim=1)
        return [part.unflatten(1, size) for part, size in zip(parts, schedule, strict=True)]

    def embed(self, indices: Tensor) -> Tensor:
        """int64 [B, h, w] -> codes [B, codebook_dim, h, w] (of unit length with ``normalize_codes``)."""
        size = (indices.shape[1], indices.shape[2])
        tokens = ops(self.backend).embed_resample(
            indices, self.embedding.weight, size, normalize=self.config.normalize_codes, mode="nearest"
        )
        return tokens.transpose(1, 2).unflatten(2, size)

    def quantize_straight_through(self, latent: Tensor, sizes: Iterable[tuple[int, int]]) -> list[QuantizedScale]:
        """Quantise a latent at each of ``sizes``, with gradients to the latent and to the codebook.

        Per scale: z = the latent resampled (and normalised), e = its code; codes = z + stop(e - z), codebook loss
        = mean((e - stop(z))^2), commitment loss = mean((z - stop(e))^2) (VQ-VAE, arXiv 1711.00937, eq. 3).

        Args:
            latent: [B, codebook_dim, H, W].
            sizes: the (h, w) to quantise at, a :class:`ScaleSchedule` for instance.
        """
        check_latent("quantize_straight_through", "latent", latent, self.config)
        return [self._quantize_at(latent, size) for size in ScaleSchedule(sizes)]

    def _quantize_at(self, latent: Tensor, size: tuple[int, int]) -> QuantizedScale:
        z = ops(self.backend).resample2d(
            latent, size, mode=self.config.downsample_mode, antialias=self.config.downsample_antialias
        )
        with torch.no_grad():
            (indices,) = self(z, ScaleSchedule([size]))
        if self.config.normalize_codes:
            z = F.normalize(z, dim=1)
        e = self.embed(indices).to(z.dtype)
        return QuantizedScale(
            codes=z + (e - z).detach(),
            indices=indices,
            codebook_loss=F.mse_loss(e, z.detach()),
            commitment_loss=F.mse_loss(z, e.detach()),
        )
