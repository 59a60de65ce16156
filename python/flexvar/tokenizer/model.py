"""The multi-scale tokenizer: one encoder, one codebook, one decoder, any set of scales."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from flexvar._checks import check_float
from flexvar.schedule import ScaleSchedule
from flexvar.tokenizer.autoencoder import Decoder, Encoder
from flexvar.tokenizer.config import TokenizerConfig
from flexvar.tokenizer.convolution import Conv1x1
from flexvar.tokenizer.initialization import initialize
from flexvar.tokenizer.quantizer import QuantizedScale, VectorQuantizer, check_latent


class MultiScaleTokenizer(nn.Module):
    """Turns images into pyramids of codes, one grid of codes for every scale, and grids back into images.

    Every scale of FlexVAR is the whole image at its own resolution (arXiv 2502.20313), so each grid of a pyramid
    decodes on its own. Parameter names are those of the published FlexVAE and LlamaGen checkpoints; ``quantize`` is
    therefore a module, called as ``tokenizer.quantize(latent, schedule)``.

    Args:
        config: shape of the networks and of the codebook.
        backend: "native", or "reference" for the plain-PyTorch ops.
    """

    def __init__(self, config: TokenizerConfig, *, backend: str = "native") -> None:
        super().__init__()
        if not isinstance(config, TokenizerConfig):
            raise TypeError(f"MultiScaleTokenizer: config must be a TokenizerConfig, got {type(config).__name__}")
        self.config = config
        self.encoder = Encoder(config, backend=backend)
        self.decoder = Decoder(config, backend=backend)
        self.quantize = VectorQuantizer(config, backend=backend)
        self.quant_conv = Conv1x1(config.z_channels, config.codebook_dim, backend=backend)
        self.post_quant_conv = Conv1x1(config.codebook_dim, config.z_channels, backend=backend)
        initialize(self)
        self.arrange()

    def arrange(self) -> None:
        """Puts the native backend's convolutions into channels-last memory, which every device computes fastest in.

        Values and shapes stay. Called again where parameters were replaced (``load_state_dict(assign=True)``).
        """
        if self.backend == "native":
            for parameter in self.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    @property
    def backend(self) -> str:
        """ "native" or "reference"."""
        return self.quantize.backend

    @property
    def codebook(self) -> nn.Parameter:
        """[codebook_size, codebook_dim], as stored: not normalised."""
        return cast(nn.Parameter, self.quantize.embedding.weight)

    def encode(self, images: Tensor) -> Tensor:
        """Images to the latent of their full resolution, before quantisation.

        ``quant_conv`` is 1x1 and so commutes with every resampling: it runs here, once, for all scales.

        Args:
            images: [B, 3, H, W] in [-1, 1]; H and W are multiples of ``config.patch_size``.

        Returns:
            [B, codebook_dim, H / patch_size, W / patch_size].

        Raises:
            TypeError: images that are not floating point, or not of the weights' dtype (without autocast).
            ValueError: another shape, or another device than the weights'.
        """
        check_float("encode", "images", images, self.quant_conv.weight)
        patch_size = self.config.patch_size
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"encode: images must have shape [B, 3, H, W], got {tuple(images.shape)}")
        if any(side == 0 or side % patch_size for side in images.shape[2:]):
            raise ValueError(
                f"encode: height and width of images must be positive multiples of {patch_size}, "
                f"got {tuple(images.shape)}"
            )
        return self.quant_conv(self.encoder(images))

    def decode(self, codes: Tensor) -> Tensor:
        """A grid of codes of any size to images of ``patch_size`` times that size.

        Args:
            codes: int64 [B, h, w], indices; or [B, codebook_dim, h, w], code vectors, used as they are.

        Returns:
            [B, 3, h * patch_size, w * patch_size], about in [-1, 1] (not clamped).

        Raises:
            TypeError: codes of another dtype.
            ValueError: another shape or device, or (on a CPU) an index outside the codebook.
        """
        if isinstance(codes, Tensor) and codes.dtype == torch.int64:
            if codes.ndim != 3 or 0 in codes.shape[1:]:
                raise ValueError(f"decode: int64 codes must have shape [B, h, w], got {tuple(codes.shape)}")
            codes = self.quantize.embed(codes)
        check_float("decode", "codes", codes, self.codebook)
        check_latent("decode", "codes", codes, self.config)
        return self.decoder(self.post_quant_conv(codes))

    def reconstruct(self, images: Tensor, schedule: ScaleSchedule) -> list[Tensor]:
        """Encode, quantise and decode images at every size of a schedule.

        Args:
            images: [B, 3, H, W] in [-1, 1], as for :meth:`encode`, whose errors it has.

        Returns:
            For every step [B, 3, h_i * patch_size, w_i * patch_size].
        """
        return [self.decode(indices) for indices in self.quantize(self.encode(images), schedule)]

    def quantize_straight_through(self, latent: Tensor, sizes: Iterable[tuple[int, int]]) -> list[QuantizedScale]:
        """See :meth:`VectorQuantizer.quantize_straight_through`; ``decode`` takes the ``codes`` of each scale."""
        return self.quantize.quantize_straight_through(latent, sizes)
