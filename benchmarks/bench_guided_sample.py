"""guided_sample against the specification and against topk + sort + multinomial."""

import pytest
import torch
from torch import Tensor

import flexvar_ext
from benchmarks.released_formula import sorted_multinomial


@pytest.mark.parametrize(
    ("top_k", "top_p", "dtype"),
    [
        (900, 0.95, torch.float32),
        (900, 0.95, torch.bfloat16),
        (0, 0.95, torch.float32),
        (0, 0.0, torch.float32),
        (1, 0.0, torch.float32),
    ],
)
def test_guided_sample(compare, device, top_k, top_p, dtype):
    batch, length, vocabulary = (64, 256, 8912) if device.type == "cuda" else (1, 256, 8912)
    generator = torch.Generator(device).manual_seed(0)
    logits = 3 * torch.randn(batch, length, vocabulary, generator=generator, device=device)
    logits = logits.to(dtype)
    seeds = torch.arange(batch, device=device)
    arguments = {"top_k": top_k, "top_p": top_p, "seed": seeds, "image_ids": seeds, "step": 3}

    def check(name: str, result: Tensor, expected: Tensor) -> None:
        if name == "native":
            assert torch.equal(result, expected)
        else:  # torch.multinomial draws other numbers, from the same support
            chosen = logits.gather(-1, result[..., None])
            assert (logits > chosen).sum(-1).max() < (top_k or vocabulary)

    with torch.inference_mode():
        compare(
            {
                "native": lambda: flexvar_ext.guided_sample(logits, **arguments),
                "reference": lambda: flexvar_ext.reference.guided_sample(logits, **arguments),
                "sort": lambda: sorted_multinomial(logits, top_k, top_p),
            },
            check=check,
            bytes_moved=logits.nbytes,
            targets={"sort": 20 if device.type == "cuda" else 10} if top_k and top_p else None,
        )
