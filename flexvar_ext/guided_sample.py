"""Drawing tokens from mixed logits: exact top-k and top-p, the same draw in any batch and on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexvar_ext._checks import check_integer, check_tensor, int64_per_image


def guided_sample(
    logits: Tensor,
    *,
    top_k: int = 0,
    top_p: float = 0.0,
    seed: int | Sequence[int] | Tensor,
    image_ids: Sequence[int] | Tensor,
    step: int,
) -> Tensor:
    """Draws one token a row from the softmax over the row's top-k, top-p tokens.

    Tokens are ordered by logit, descending, and by index where logits are equal. top-k keeps the first k; then top-p
    keeps a token when the mass of the tokens before it, relative to what top-k kept, is less than p. (So the token that
    crosses p is kept, and the first always is.) Nothing is sorted.

    A token's mass is an integer, floor(2**30 * exp(logit - row maximum)) to a relative 4e-6: sums do not depend on
    their order, and a token below 2**-30 of the most likely one's probability is never drawn. One Philox4x32-10 number
    (key: seed; counter: position in the step, step, image id) is inverted through the cumulative masses in index order.
    Equal logits therefore give equal tokens whatever the batch, the thread count, the device or the backend.

    NaN counts as -inf; tokens at +inf share all the mass.

    Args:
        logits: [B, l, V], float32, float16 or bfloat16, any strides; guidance is already mixed in.
        top_k: how many tokens to keep; 0 keeps all, 1 is argmax.
        top_p: in [0, 1]; 0 and 1 keep all.
        seed: in [0, 2**64): one for all images, or one for each (sequence, or int64 [B] on the logits' device, taken as
            64 bits).
        image_ids: what tells the images of one seed apart, in [0, 2**64): sequence, or int64 [B] as for ``seed``.
        step: the scale's number in the schedule, in [0, 2**32).

    Returns: int64 [B, l], -1 in a row without mass (all -inf or NaN). Not differentiable.
    Raises: TypeError for a wrong type or dtype, ValueError for a wrong shape, device or range.
    Source: Philox: Salmon et al., SC 2011. Nucleus (top-p) sampling: Holtzman et al., arXiv 1904.09751.
    """
    op = "guided_sample"
    check_tensor(op, "logits", logits, "[B, l, V]")
    batch, _, vocabulary = logits.shape
    if vocabulary < 1:
        raise ValueError(f"{op}: logits must have shape [B, l, V] with V >= 1, got {tuple(logits.shape)}")
    check_integer(op, "top_k", top_k, 0, 2**63)
    if isinstance(top_p, bool) or not isinstance(top_p, (int, float)):
        raise TypeError(f"{op}: top_p must be a number, got {top_p!r}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"{op}: top_p must be in [0, 1], got {top_p}")
    check_integer(op, "step", step, 0, 2**32)
    seeds = int64_per_image(op, "seed", seed, batch, logits.device)
    images = int64_per_image(op, "image_ids", image_ids, batch, logits.device)
    tokens: Tensor = torch.ops.flexvar.guided_sample(logits.detach(), top_k, float(top_p), seeds, images, step)
    return tokens


@torch.library.register_fake("flexvar::guided_sample")
def _(logits: Tensor, top_k: int, top_p: float, seeds: Tensor, image_ids: Tensor, step: int) -> Tensor:
    return logits.new_empty(logits.shape[:2], dtype=torch.int64)
