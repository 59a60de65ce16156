"""What ``import flexvar`` gives, and what it does not do."""

from __future__ import annotations

import subprocess
import sys

import flexvar
import pytest


def test_everything_public_is_there() -> None:
    for name in flexvar.__all__:
        assert getattr(flexvar, name).__name__ == name
        assert name in dir(flexvar)
    with pytest.raises(AttributeError, match="module 'flexvar' has no attribute 'nothing'"):
        flexvar.nothing  # noqa: B018


def test_importing_has_no_side_effects() -> None:
    code = "import sys, flexvar, flexvar.schedule; print({'torch', 'numpy', 'flexvar_ext', 'PIL'} & set(sys.modules))"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert printed == "set()\n"


STATE = """
import os, pkgutil, random, threading, warnings
import numpy as np
import torch

def state():
    \"\"\"What a process shares: the contents of torch's modules and classes, generators, defaults.\"\"\"
    modules = [torch.nn, torch.nn.functional, torch.nn.init, torch.nn.Module, torch.nn.Linear, torch.nn.Conv2d,
               torch.nn.GroupNorm, torch.nn.Embedding, torch.Tensor, torch.autograd.Function]
    return {
        "contents": [{name: id(value) for name, value in vars(module).items()} for module in modules],
        "generators": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), threading.active_count()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "errors": np.geterr(),
        "print": repr(torch._tensor_str.PRINT_OPTS),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }

import PIL.Image, torch._dynamo  # noqa: what others load, and change as they do, is not ours
before = state()
import flexvar, flexvar_ext
for package in (flexvar, flexvar_ext):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.startswith(("flexvar.web", "flexvar.__main__", "flexvar_ext.lib")):
            __import__(found.name)
pipe = flexvar.FlexVARPipeline.from_pretrained("demo")
pipe([0, 1], seed=3, steps=3)
list(pipe.stream([2], seed=3, steps=3))
after = state()
print([name for name in before if before[name] != after[name]])
"""


def test_importing_everything_and_drawing_changes_nothing_that_others_share() -> None:
    printed = subprocess.run([sys.executable, "-c", STATE], capture_output=True, text=True, check=True, timeout=120)
    assert printed.stdout == "[]\n"
