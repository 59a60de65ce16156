"""vq_lookup: the released formula, torch.compile of it, and faiss where it is installed (on a CPU)."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flexvar_ext

CASES = [(680, 8912, 32), (5440, 8912, 32), (680, 16384, 8)]
CUDA_CASES = [(43520, 8192, 32)]


def nearest_within_float32(latents: Tensor, codebook: Tensor):
    """A check that the chosen codes are as near as the reference's, within float32 rounding."""
    x, codes = F.normalize(latents, dim=1), F.normalize(codebook, dim=1)

    def check(name: str, result: Tensor, expected: Tensor) -> None:
        farther = (x * codes[expected]).sum(1) - (x * codes[result]).sum(1)
        assert farther.max() <= 1e-6, f"{name} chose codes that are farther by up to {farther.max():.2e}"

    return check


def faiss_search(latents: Tensor, codebook: Tensor):
    """An index that is built once; only the latents' normalisation and the search are timed."""
    import faiss

    faiss.cvar.distance_compute_blas_threshold = 0  # queries from which on distances come from matrix products: all
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(F.normalize(codebook, dim=1).numpy())
    return lambda: torch.from_numpy(index.search(F.normalize(latents, dim=1).numpy(), 1)[1][:, 0])


@pytest.mark.parametrize(("queries", "codes", "dim"), CASES + CUDA_CASES)
def test_vq_lookup(compare, device, queries, codes, dim):
    if device.type == "cpu" and (queries, codes, dim) in CUDA_CASES:
        pytest.skip("a GPU's case: seconds of the reference formula on a CPU")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(queries, dim, generator=generator).to(device)
    codebook = torch.randn(codes, dim, generator=generator).to(device)
    compiled = torch.compile(flexvar_ext.reference.vq_lookup)
    peers = {"compiled": lambda: compiled(latents, codebook)}
    if device.type == "cpu" and importlib.util.find_spec("faiss"):
        peers["faiss IndexFlatL2, BLAS"] = faiss_search(latents, codebook)
    elif device.type == "cpu":
        print("bench_vq_lookup: no faiss row, for faiss-cpu is not installed (pip install faiss-cpu)")
    with torch.inference_mode():
        compare(
            {
                "native": lambda: flexvar_ext.vq_lookup(latents, codebook),
                "reference": lambda: flexvar_ext.reference.vq_lookup(latents, codebook),
                **peers,
            },
            check=nearest_within_float32(latents, codebook),
            flops=2 * queries * codes * dim,
            targets={"reference": 15 if dim == 8 else 5, "compiled": 3, "faiss IndexFlatL2, BLAS": 1.5},
        )
