"""The weights that the golden values were computed with."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor, nn


def golden_value(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight recipe of tests/golden/README.md."""
    words = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(math.prod(shape))
    u = ((words >> 11) * 2.0**-53 - 0.5) * math.sqrt(12)
    if name.endswith("scale_mul_1H11"):
        value = math.log(4) + 0.1 * u
    elif name.endswith("embedding.weight"):
        value = u
    elif name.endswith(("class_emb.weight", "pos_start", "pos_1LC")):
        value = 0.5 * u
    elif len(shape) >= 2:
        value = u / math.sqrt(math.prod(shape[1:]))
    elif name.endswith("weight"):
        value = 1 + 0.1 * u
    else:
        value = 0.1 * u
    return torch.from_numpy(value.astype(np.float32)).view(shape)


def fill(module: nn.Module) -> nn.Module:
    """Give a module the golden weights, in evaluation mode."""
    module.load_state_dict({name: golden_value(name, tuple(v.shape)) for name, v in module.state_dict().items()})
    return module.eval()
