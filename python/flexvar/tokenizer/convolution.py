"""The convolutions of the autoencoder on the backend's ops. Feature maps are [B, channels, height, width]."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexvar_ext
from flexvar._backend import check_backend, ops
from flexvar._kept import Casts, Kept


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with the arguments of :func:`flexvar_ext.conv3x3` for what is around it."""

    def __init__(self, in_channels: int, out_channels: int, *, resize: str = "none", backend: str) -> None:
        halves = resize == "down"
        super().__init__(in_channels, out_channels, 3, stride=2 if halves else 1, padding=0 if halves else 1)
        self.resize = resize
        self.backend = check_backend(backend)
        self._casts = Casts(backend)
        self._packed: Kept[Tensor | None] = Kept()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, bias = self.weight, cast(Tensor, self.bias)
        is_native = flexvar_ext.conv3x3_is_native(input, resize=self.resize, out_channels=self.out_channels)
        if self.backend == "reference" or not is_native:
            weight, bias = self._casts.of("weight", weight), self._casts.of("bias", bias)
            out: Tensor = ops(self.backend).conv3x3(input, weight, bias, resize=self.resize, residual=residual)
            return out
        packed = self._pack(flexvar_ext.reference.result_dtype(input)) if input.is_cuda else None
        return flexvar_ext.conv3x3(input, weight, bias, resize=self.resize, residual=residual, packed=packed)

    def _pack(self, dtype: torch.dtype) -> Tensor | None:
        """Kept, since the CUDA kernel would pack the weight anew at every call; None where gradients are recorded."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        weight, bias = self.weight, cast(Tensor, self.bias)
        return self._packed.get(
            dtype, [weight, bias], lambda: flexvar_ext.conv3x3_pack(weight, bias, resize=self.resize, dtype=dtype)
        )


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution: on channels-last maps, whose pixels are rows, a linear layer."""

    def __init__(self, in_channels: int, out_channels: int, *, backend: str) -> None:
        super().__init__(in_channels, out_channels, 1)
        self.backend = check_backend(backend)
        self._casts = Casts(backend)

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_contiguous(memory_format=torch.channels_last):
            return F.conv2d(input, *self._cast_parameters())
        return self.of_pixels(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def of_pixels(self, pixels: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in_channels] -> [..., out_channels]."""
        weight, bias = self._cast_parameters()
        out: Tensor = ops(self.backend).linear(pixels, weight.flatten(1), bias, residual=residual)
        return out

    def _cast_parameters(self) -> tuple[Tensor, Tensor]:
        return self._casts.of("weight", self.weight), self._casts.of("bias", cast(Tensor, self.bias))
