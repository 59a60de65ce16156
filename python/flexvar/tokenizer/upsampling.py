"""Upsampling by two: nearest neighbour, then a 3x3 convolution, which without gradients are one operation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexvar_ext
from flexvar.tokenizer.convolution import Conv3x3


def fold_nearest(weight: Tensor) -> Tensor:
    """The transposed convolution that equals nearest x2 and then a 3x3 convolution (padding 1).

    An output pixel sees two by two input pixels, some of them through several taps, whose sums are its weights. The
    four kinds of output pixels, even and odd by rows and columns, interleave to one kernel of a transposed convolution
    of stride 2 and padding 1: 4 products for each output pixel instead of 9.

    Args:
        weight: [out, in, 3, 3], of ``conv2d``.

    Returns:
        [in, out, 4, 4], of ``conv_transpose2d``; summed in at least float32, in weight's dtype and memory format.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    folded = _fold(_fold(wide, 2), 3).transpose(0, 1).to(weight.dtype)
    is_channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return folded.contiguous(memory_format=torch.channels_last if is_channels_last else torch.contiguous_format)


def _fold(weight: Tensor, dim: int) -> Tensor:
    """Three taps to four: tap t takes input i to output 2i + t - 1, which reaches i through these taps of the three."""
    first, middle, last = weight.unbind(dim)
    return torch.stack((last, middle + last, first + middle, first), dim)


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a 3x3 convolution. [B, C, H, W] -> [B, C, 2H, 2W].

    Where :func:`flexvar_ext.conv3x3` is this library's own it does both. Elsewhere on the native backend, without
    gradients, both are one transposed convolution (:func:`fold_nearest`), the same to rounding. That kernel is kept for
    as long as the weight stays: another storage or a raised version counter (optimizers, ``load_state_dict``,
    ``copy_``) makes a new one. Only writes through ``.data`` escape.
    """

    def __init__(self, channels: int, *, backend: str) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels, resize="up", backend=backend)
        self._folded: Tensor | None = None
        self._weight: Tensor | None = None  # keeps the storage alive, so that no other can take its address
        self._version = -1

    def forward(self, x: Tensor) -> Tensor:
        is_native = flexvar_ext.conv3x3_is_native(x, resize="up")
        if is_native or self.conv.backend == "reference" or torch.is_grad_enabled():
            out: Tensor = self.conv(x)
            return out
        return F.conv_transpose2d(x, self._kernel(), self.conv.bias, stride=2, padding=1)

    def _kernel(self) -> Tensor:
        weight = self.conv.weight
        # Tensors made in inference mode count no versions, and a compiled graph must not hold what it was traced with.
        if torch.compiler.is_compiling() or weight.is_inference():
            return fold_nearest(weight)
        stays = (
            self._weight is not None
            and self._weight.data_ptr() == weight.data_ptr()
            and self._weight.dtype == weight.dtype
            and self._version == weight._version
        )
        if self._folded is None or not stays:
            with torch.inference_mode(False), torch.no_grad():  # a tensor that may be copied and saved
                self._folded, self._weight, self._version = fold_nearest(weight), weight.detach(), weight._version
        return self._folded
