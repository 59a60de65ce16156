"""A training step of the transformer: teacher forcing over all scales, loss, gradients of every weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from flexvar import FlexVARTransformer, ScaleSchedule, TransformerConfig

from benchmarks.measure import PRODUCT_DTYPES

SCHEDULE = ScaleSchedule.preset(steps=10)
# Depth, images: on a CPU a step of d16 would take a minute in all rounds.
DEPTH, BATCH = (16, 32) if torch.cuda.is_available() else (8, 1)


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=["float32", "bfloat16 autocast"][: len(PRODUCT_DTYPES)])
def test_training_step(compare, device, dtype):
    torch.manual_seed(0)
    config = TransformerConfig(depth=DEPTH, width=64 * DEPTH, heads=DEPTH, class_dropout=0.0, drop_path=0.0)
    with torch.device(device):
        models = {backend: FlexVARTransformer(config, backend=backend) for backend in ("native", "reference")}
        labels = torch.arange(BATCH)
        inputs = torch.randn(BATCH, SCHEDULE.num_tokens - 1, config.codebook_dim)
        targets = torch.randint(config.codebook_size, (BATCH * SCHEDULE.num_tokens,))
    models["reference"].load_state_dict(models["native"].state_dict())
    calls = {"native": models["native"], "reference": models["reference"]}
    calls["compiled"] = torch.compile(models["reference"])

    def step(name):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = calls[name](labels, inputs, SCHEDULE)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets)
        parameters = list(models["native" if name == "native" else "reference"].parameters())
        return torch.autograd.grad(loss, parameters)

    def check(name, result, expected):
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        for gradient, other in zip(result, expected, strict=True):
            assert (gradient - other).norm() <= tolerance * other.norm() + 1e-6, name

    compare(
        {name: lambda name=name: step(name) for name in calls},
        check=check,
        images=BATCH,
    )
