"""What the GPU at hand can do, as far as it decides between this library's kernels and torch's."""

from __future__ import annotations

import functools

import torch

from flexvar_ext import _host


@torch.compiler.assume_constant_result
@functools.cache
def has_warpgroup_products(device: torch.device) -> bool:
    """Whether the kernels multiply by warpgroups there: a Hopper GPU, and code built for sm_90a, which alone has
    wgmma."""
    built = "90a" in _host.build_info()["cuda_architectures"]
    return built and torch.cuda.get_device_capability(device) == (9, 0)
