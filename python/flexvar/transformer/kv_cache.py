"""The keys and values of the steps generated so far."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every block, allocated once for a whole schedule and written in place.

    A step writes its tokens behind those of the steps before and only then counts them (:meth:`advance`): a step that
    fails half way leaves nothing behind and can be run again.

    Attributes:
        k, v: [depth, B, max_tokens, heads, head_dim].
        length: tokens of the finished steps.
    """

    def __init__(
        self,
        depth: int,
        batch: int,
        max_tokens: int,
        heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (depth, batch, max_tokens, heads, head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_tokens(self) -> int:
        """Tokens that fit."""
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values together."""
        return self.k.nbytes + self.v.nbytes

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Put a step's keys and values of one block behind the finished steps.

        Args:
            layer: index of the block.
            k, v: [B, l, heads, head_dim].

        Returns:
            The block's keys and values [B, max_tokens, heads, head_dim], and how many tokens of them to attend to.
        """
        stop = self.length + k.shape[1]
        if stop > self.max_tokens:
            raise ValueError(f"KVCache: the cache holds at most {self.max_tokens} tokens, got {stop}")
        self.k[layer, :, self.length : stop] = k
        self.v[layer, :, self.length : stop] = v
        return self.k[layer], self.v[layer], stop

    def advance(self, tokens: int) -> None:
        """Count the tokens of a step that all blocks have written."""
        if not 0 <= tokens <= self.max_tokens - self.length:
            raise ValueError(f"KVCache: tokens must be from 0 to {self.max_tokens - self.length}, got {tokens}")
        self.length += tokens

    def reset(self) -> None:
        """Forget every step; the memory stays."""
        self.length = 0
