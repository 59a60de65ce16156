"""The constants of the numeric tests, once.

Native low precision must satisfy |out - ref64| <= factor * |torch_same_dtype - ref64| + atol[dtype].
"""

import torch

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
ATOL = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_as_accurate_as_torch(
    native: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor, *, factor: float = FORWARD_FACTOR
) -> None:
    """``exact`` is the float64 reference, ``same_dtype`` torch's own result in the native result's dtype."""
    assert native.dtype == same_dtype.dtype
    assert native.shape == same_dtype.shape == exact.shape
    if native.numel() == 0:
        return
    error = (native.double() - exact).abs().max().item()
    allowed = factor * (same_dtype.double() - exact).abs().max().item() + ATOL[native.dtype]
    assert error <= allowed, f"error {error:.3e} > allowed {allowed:.3e}"
