"""vq_lookup_multiscale: the latents of 256 px images at the ten default scales."""

import pytest
import torch
import torch.nn.functional as F

import flexvar_ext

SCALES = [(side, side) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]


@pytest.mark.parametrize("batch", [1, 8, 64] if torch.cuda.is_available() else [1, 8])
def test_vq_lookup_multiscale(compare, device, batch):
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(batch, 32, 16, 16, generator=generator).to(device)
    codebook = torch.randn(8912, 32, generator=generator).to(device)
    codes = F.normalize(codebook, dim=1)
    resampled = [flexvar_ext.reference.resample2d(latent, scale, mode="area").flatten(2).mT for scale in SCALES]
    x = F.normalize(torch.cat(resampled, dim=1), dim=2)

    def check(name: str, result: torch.Tensor, expected: torch.Tensor) -> None:
        farther = (x * codes[expected]).sum(2) - (x * codes[result]).sum(2)
        assert farther.max() <= 1e-6, f"{name} chose codes that are farther by up to {farther.max():.2e}"

    peers = {}
    if batch == 1 or device.type == "cuda":
        compiled = torch.compile(flexvar_ext.reference.vq_lookup_multiscale)
        peers["compiled"] = lambda: compiled(latent, codebook, SCALES)
    with torch.inference_mode():
        compare(
            {
                "native": lambda: flexvar_ext.vq_lookup_multiscale(latent, codebook, SCALES),
                "reference": lambda: flexvar_ext.reference.vq_lookup_multiscale(latent, codebook, SCALES),
                **peers,
            },
            check=check,
            flops=2 * x.shape[0] * x.shape[1] * 8912 * 32,
            targets={"reference": 10, "compiled": 3},
        )
