"""The keys and values of the steps generated so far."""

from __future__ import annotations

import torch
from torch import Tensor

from flexvar_ext.append_qkv import kept_empty


class KVCache:
    """Keys and values of every block, allocated once for a whole schedule and written in place.

    A step writes its tokens behind those of the steps before and only then counts them (:meth:`advance`): a step that
    fails half way leaves nothing behind and can be run again. With the native ``backend`` large ones on a CPU lie in
    memory of earlier caches and results.

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
        backend: str = "native",
    ) -> None:
        empty = kept_empty if backend == "native" else torch.empty
        shape = (depth, batch, max_tokens, heads, head_dim)
        self.k = empty(shape, dtype=dtype, device=device)
        self.v = empty(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_tokens(self) -> int:
        """Tokens that fit."""
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values together."""
        return self.k.nbytes + self.v.nbytes

    def room(self, layer: int, tokens: int) -> tuple[Tensor, Tensor, int]:
        """Where a step of ``tokens`` tokens puts the keys and values of one block.

        Returns:
            The block's keys and values, [B, max_tokens, heads, head_dim] each, and the first token to write.

        Raises:
            ValueError: they do not fit.
        """
        if self.length + tokens > self.max_tokens:
            raise ValueError(f"KVCache: the cache holds at most {self.max_tokens} tokens, got {self.length + tokens}")
        return self.k[layer], self.v[layer], self.length

    def advance(self, tokens: int) -> None:
        """Count the tokens of a step that all blocks have written. Raises ValueError for more than fit."""
        if not 0 <= tokens <= self.max_tokens - self.length:
            raise ValueError(f"KVCache: tokens must be from 0 to {self.max_tokens - self.length}, got {tokens}")
        self.length += tokens

    def reset(self) -> None:
        """Forget every step; the memory stays."""
        self.length = 0
