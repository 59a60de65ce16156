"""The 3x3 convolutions of the VQ-16 decoder at 256 px, against torch's own in the layout that it likes best."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from flexvar.tokenizer.upsampling import fold_nearest
from torch import Tensor

import flexvar_ext
from benchmarks.measure import PRODUCT_DTYPES
from flexvar_ext import reference

# (channels, out channels, side, resize)
LAYERS = [
    (512, 512, 16, "none"), (512, 512, 16, "up"), (512, 256, 32, "none"), (256, 256, 64, "none"), (256, 256, 64, "up"),
    (256, 128, 128, "none"), (128, 128, 128, "up"), (128, 128, 256, "none"), (128, 3, 256, "none"),
]  # fmt: skip
DTYPES = [(dtype, 1) for dtype in PRODUCT_DTYPES]  # and images
if torch.cuda.is_available():
    DTYPES.append((torch.bfloat16, 64))


@pytest.mark.parametrize(("channels", "out_channels", "side", "resize"), LAYERS)
@pytest.mark.parametrize(("dtype", "batch"), DTYPES, ids=[f"{str(d).removeprefix('torch.')}-{b}" for d, b in DTYPES])
def test_conv3x3(compare, device, channels, out_channels, side, resize, dtype, batch):
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    x = randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight, bias = randn(out_channels, channels, 3, 3) / (9 * channels) ** 0.5, randn(out_channels)
    folded = fold_nearest(weight).contiguous(memory_format=torch.channels_last)
    turned, planes = weight.contiguous(memory_format=torch.channels_last), x.contiguous()

    @torch.inference_mode()
    def native() -> Tensor:
        return flexvar_ext.conv3x3(x, weight, bias, resize=resize)

    @torch.inference_mode()
    def plain() -> Tensor:
        return reference.conv3x3(x, turned, bias, resize=resize)

    @torch.inference_mode()
    def from_contiguous() -> Tensor:
        return F.conv2d(planes, weight, bias, padding=1)

    @torch.inference_mode()
    def transposed() -> Tensor:
        return F.conv_transpose2d(x, folded, bias, stride=2, padding=1)

    @torch.inference_mode()
    def kernel() -> Tensor:
        result: Tensor = torch.ops.flexvar.conv3x3(x, weight, bias, resize, None, None)
        return result

    def check(name: str, result: Tensor, expected: Tensor) -> None:
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")

    implementations = {"native": native, "reference": plain}
    if resize == "none":
        implementations["contiguous"] = from_contiguous
    if resize == "up":
        implementations["transposed"] = transposed
    is_native = flexvar_ext.conv3x3_is_native(x, resize=resize, out_channels=out_channels)
    if device.type == "cuda" and dtype == torch.bfloat16 and not is_native:
        implementations["kernel"] = kernel  # this library's, to see whether torch's is rightly preferred
    compare(
        implementations,
        check=check,
        flops=2 * batch * channels * out_channels * side**2 * (16 if resize == "up" else 9),
        gemm=str(dtype).removeprefix("torch."),
        seconds=0.5,
    )
