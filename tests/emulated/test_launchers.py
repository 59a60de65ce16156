"""What holds for the CUDA launchers of all ops: they are there, and refuse what their kernels cannot do."""

from pathlib import Path

import pytest
import torch

import flexvar_ext  # noqa: F401 registers the ops

CPU_ONLY = {"linear", "kept_empty", "vq_lookup_checked", "vq_lookup_multiscale_checked"}


def schemas(library: str) -> dict[str, str]:
    found = (str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith(f"{library}::"))
    return {schema.split("(")[0].split("::")[1]: schema.split("::", 1)[1] for schema in found}


def test_every_op_has_its_launcher(emulated):
    ops = schemas("flexvar")
    assert ops == schemas("flexvar_emulated")
    launched = {op for op in ops if torch._C._dispatch_has_kernel_for_dispatch_key(f"flexvar_emulated::{op}", "CPU")}
    assert launched == set(ops) - CPU_ONLY


def test_every_launcher_is_tested(emulated):
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert [op for op in schemas("flexvar") if op not in CPU_ONLY and f'"{op}"' not in tests] == []


HALF = torch.ones(1, 8, 4, 4, dtype=torch.half)
WEIGHT = torch.ones(8, 8, 3, 3, dtype=torch.half)
WIDE = torch.ones(1, 1, 20000)
REFUSED = [
    (
        "conv3x3",
        (HALF.float(), WEIGHT.float(), None, "none", None, None),
        "x must have dtype float16 or bfloat16 on CUDA",
    ),
    (
        "conv3x3",
        (HALF, WEIGHT, torch.ones(8).double(), "none", None, None),
        "bias must have the dtype of x, or float32",
    ),
    ("layer_norm_modulate", (WIDE, WIDE, WIDE, 1e-6, torch.float32), "x must have at most 4096 channels, got 20000"),
    (
        "append_qkv",
        (torch.ones(1, 1, 3, 1, 160), torch.ones(1, 1, 1, 160), torch.ones(1, 1, 1, 160), 0, None),
        "head dim must be 32, 64, 96 or 128, got 160",
    ),
    (
        "linear_few_rows",
        (HALF[..., 0], torch.ones(8, 4, dtype=torch.half), None, "none", True),
        "weight must have a multiple of 32 columns up to 6400, got 4",
    ),
    ("vq_lookup", (torch.ones(2, 3), torch.ones(5, 4), True), "codebook must be [V >= 1, C >= 1]"),
    ("resample2d", (torch.ones(1, 1, 2, 2, dtype=torch.int64), 2, 2, "area", False), "dtype"),
]


@pytest.mark.parametrize(("op", "arguments", "message"), REFUSED)
def test_refused(launch_once, op, arguments, message):
    with pytest.raises(RuntimeError) as error:
        launch_once(op, *arguments)
    assert message in str(error.value)


def test_cuda_is_asked_once_for_each_kernel_and_device(emulated):
    """Devices differ: here in what decides between kernels, and in the shared memory that a kernel has leave for."""
    x, weight = torch.ones(1, 32, 4, 4, dtype=torch.half), torch.ones(40, 32, 3, 3, dtype=torch.half)
    conv3x3 = torch.ops.flexvar_emulated.conv3x3
    asked = []
    for warpgroups in (True, False, True):
        with emulated.Device(emulated.Options(warpgroups=warpgroups)):
            for _ in range(2):
                before = emulated.questions()
                conv3x3(x.clone(), weight.clone(), None, "none", None, None)
                asked.append(emulated.questions() - before)
    # The multiprocessors and the kernel that tells; with warpgroups the same kernel's leave.
    assert asked == [3, 0, 2, 0, 3, 0]
