"""Convolutional encoder and decoder of the VQ autoencoder.

The architecture of LlamaGen's VQ models (arXiv 2406.06525), which is VQGAN's (arXiv 2012.09841); module names are
those of the published checkpoints. Feature maps are [B, channels, height, width]. ``backend``: "native", or
"reference" for the plain-PyTorch ops.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar._backend import check_backend, ops
from flexvar.tokenizer.config import TokenizerConfig
from flexvar.tokenizer.convolution import Conv1x1, Conv3x3
from flexvar.tokenizer.upsampling import Upsample

_MAX_PIXELS_BY_PRODUCTS = 1024  # of a map, in AttentionBlock


def _arranged(x: Tensor, backend: str) -> Tensor:
    """Channels last for the native backend, which every later map then is."""
    return x.contiguous(memory_format=torch.channels_last) if backend == "native" else x


class Norm(nn.GroupNorm):
    """GroupNorm and, unless ``silu`` is False, SiLU. [B, channels, h, w], in x's memory format."""

    def __init__(self, channels: int, groups: int, *, silu: bool = True, backend: str) -> None:
        super().__init__(groups, channels, eps=1e-6)
        self.silu = silu
        self.backend = check_backend(backend)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = ops(self.backend).group_norm_silu(
            x, self.num_groups, self.weight, self.bias, eps=self.eps, silu=self.silu
        )
        return out


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a skip connection (1x1 convolution where the channels change)."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, *, backend: str) -> None:
        super().__init__()
        self.norm1 = Norm(in_channels, norm_groups, backend=backend)
        self.conv1 = Conv3x3(in_channels, out_channels, backend=backend)
        self.norm2 = Norm(out_channels, norm_groups, backend=backend)
        self.conv2 = Conv3x3(out_channels, out_channels, backend=backend)
        is_changed = in_channels != out_channels
        self.nin_shortcut = Conv1x1(in_channels, out_channels, backend=backend) if is_changed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        out: Tensor = self.conv2(self.norm2(h), residual=self.nin_shortcut(x).to(h.dtype))
        return out


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, around a skip connection."""

    def __init__(self, channels: int, norm_groups: int, *, backend: str) -> None:
        super().__init__()
        self.backend = check_backend(backend)
        self.norm = Norm(channels, norm_groups, silu=False, backend=backend)
        self.q = Conv1x1(channels, channels, backend=backend)
        self.k = Conv1x1(channels, channels, backend=backend)
        self.v = Conv1x1(channels, channels, backend=backend)
        self.proj_out = Conv1x1(channels, channels, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        pixels, normed = (tensor.permute(0, 2, 3, 1).flatten(1, 2) for tensor in (x, self.norm(x)))
        attended = self._attend(*(projection.of_pixels(normed) for projection in (self.q, self.k, self.v)))
        return self.proj_out.of_pixels(attended, residual=pixels).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, h*w, channels] each; scores are scaled by channels**-0.5."""
        # torch's fused kernels for so many channels take twice as long as two products, while scores fit the L2 cache.
        has_few_scores = q.shape[1] <= _MAX_PIXELS_BY_PRODUCTS and q.dtype in (torch.float16, torch.bfloat16)
        if not (self.backend == "native" and q.is_cuda and has_few_scores) or torch.is_grad_enabled():
            return F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        scores = torch.bmm(q, k.mT, out_dtype=torch.float32) * q.shape[2] ** -0.5
        return torch.bmm(scores.softmax(dim=-1).to(v.dtype), v)


class Downsample(nn.Module):
    """Halves the resolution: one row and column of zeros below and to the right, then a strided convolution."""

    def __init__(self, channels: int, *, backend: str) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels, resize="down", backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where asked for, then a change of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_res_blocks: int,
        norm_groups: int,
        *,
        attention: bool,
        downsample: bool = False,
        upsample: bool = False,
        backend: str,
    ) -> None:
        super().__init__()
        channels = [in_channels] + [out_channels] * num_res_blocks
        self.res = nn.ModuleList(ResidualBlock(a, b, norm_groups, backend=backend) for a, b in pairwise(channels))
        self.attn = nn.ModuleList(
            AttentionBlock(out_channels, norm_groups, backend=backend) if attention else nn.Identity() for _ in self.res
        )
        self.downsample = Downsample(out_channels, backend=backend) if downsample else nn.Identity()
        self.upsample = Upsample(out_channels, backend=backend) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for res, attn in zip(self.res, self.attn, strict=True):
            x = attn(res(x))
        return self.upsample(self.downsample(x))


def _middle(channels: int, norm_groups: int, *, backend: str) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels, norm_groups, backend=backend),
        AttentionBlock(channels, norm_groups, backend=backend),
        ResidualBlock(channels, channels, norm_groups, backend=backend),
    )


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, z_channels, H / patch_size, W / patch_size]."""

    def __init__(self, config: TokenizerConfig, *, backend: str) -> None:
        super().__init__()
        channels = [config.base_channels * m for m in config.channel_multipliers]
        last = len(channels) - 1
        self.conv_in = Conv3x3(3, config.base_channels, backend=backend)
        self.conv_blocks = nn.ModuleList(
            Level(
                a, b, config.num_res_blocks, config.norm_groups,
                attention=index == last, downsample=index != last, backend=backend,
            )
            for index, (a, b) in enumerate(pairwise([config.base_channels, *channels]))
        )  # fmt: skip
        self.mid = _middle(channels[-1], config.norm_groups, backend=backend)
        self.norm_out = Norm(channels[-1], config.norm_groups, backend=backend)
        self.conv_out = Conv3x3(channels[-1], config.z_channels, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(_arranged(x, self.norm_out.backend))
        for level in self.conv_blocks:
            x = level(x)
        out: Tensor = self.conv_out(self.norm_out(self.mid(x)))
        return out


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> [B, 3, h * patch_size, w * patch_size]."""

    def __init__(self, config: TokenizerConfig, *, backend: str) -> None:
        super().__init__()
        channels = [config.base_channels * m for m in reversed(config.channel_multipliers)]
        last = len(channels) - 1
        self.conv_in = Conv3x3(config.z_channels, channels[0], backend=backend)
        self.mid = _middle(channels[0], config.norm_groups, backend=backend)
        self.conv_blocks = nn.ModuleList(
            Level(
                a, b, config.num_res_blocks + 1, config.norm_groups,
                attention=index == 0, upsample=index != last, backend=backend,
            )
            for index, (a, b) in enumerate(pairwise([channels[0], *channels]))
        )  # fmt: skip
        self.norm_out = Norm(channels[-1], config.norm_groups, backend=backend)
        self.conv_out = Conv3x3(channels[-1], 3, backend=backend)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(_arranged(z, self.norm_out.backend)))
        for level in self.conv_blocks:
            x = level(x)
        out: Tensor = self.conv_out(self.norm_out(x))
        return out
