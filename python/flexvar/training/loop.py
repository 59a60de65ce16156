"""The training loop that tokenizer, transformer and classifier share."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from flexvar._files import errors_named, write_atomically
from flexvar.training.checkpoint import has_checkpoint, load_checkpoint, remove_leftovers, save_checkpoint
from flexvar.training.config import TrainingConfig
from flexvar.training.precision import multiplies_bfloat16

Losses = dict[str, Tensor]
StepFunction = Callable[[int, np.random.Generator], Losses]

LOG_NAME = "log.jsonl"


def seed_generators(seed: int, device: torch.device) -> None:
    """torch's generators of the CPU and of ``device``; ``torch.manual_seed`` would seed every other GPU as well."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def callers_generators_kept(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside, on the CPU and on ``device``, leaves torch's generators as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def initialized_from(seed: int) -> Iterator[None]:
    """Weights that are made inside, on the CPU, depend on ``seed`` alone."""
    cpu = torch.device("cpu")
    with callers_generators_kept(cpu):
        seed_generators(seed, cpu)
        yield


def train(
    module: nn.Module,
    compute_losses: StepFunction,
    config: TrainingConfig,
    folder: str | Path,
    *,
    description: str,
    values: dict[str, Any],
    device: torch.device,
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Trains ``module`` in place and leaves it with the moving average of its weights, in eval mode.

    Args:
        compute_losses: called with the step and a generator of its own for everything random that is not torch's;
            returns scalars, of which ``"loss"`` is minimised and the others are logged.
        folder: gets ``log.jsonl`` (one line a step) and the checkpoint.
        values: JSON values that describe the run; a checkpoint with other values is refused.
        resume: continue the checkpoint in ``folder``, with the very steps that an uninterrupted run would have taken.

    Raises:
        OSError: the log or the checkpoint cannot be written, as on a full disk; the checkpoint before is whole.
        ValueError: ``resume`` without a checkpoint, of a damaged one or one of another run; not ``resume`` although
            there is a checkpoint; a loss that is no longer finite.
    """
    folder = Path(folder)
    if has_checkpoint(folder) and not resume:
        raise ValueError(f"train: folder {str(folder)!r} already holds a run; resume it or choose another folder")
    if config.bfloat16 and not multiplies_bfloat16(device):
        warnings.warn(
            "train: torch multiplies bfloat16 in a loop of scalars on this CPU; bfloat16=False trains far faster",
            stacklevel=3,
        )
    values = {**values, "training": config.to_dict()}
    module.to(device).train()
    optimizer = _optimizer(module, config)
    average = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    first = _restore(folder, module, optimizer, average, values) if resume else 0
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, first)
    _truncate_log(folder / LOG_NAME, first)

    with ExitStack() as stack:
        # Everything that torch draws is seeded step by step below.
        stack.enter_context(callers_generators_kept(device))
        bar = stack.enter_context(
            tqdm(total=config.steps, initial=first, desc=description, unit="step", disable=not progress)
        )
        for step in range(first, config.steps):
            start = time.perf_counter()
            rng = np.random.default_rng((config.seed, step))
            seed_generators(int(rng.integers(1 << 62)), device)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
                losses = compute_losses(step, rng)
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), config.gradient_clip)
            entry = {name: float(loss.detach()) for name, loss in losses.items()} | {"gradient_norm": float(norm)}
            if not all(map(math.isfinite, entry.values())):
                raise ValueError(f"train: losses must stay finite, got {entry} at step {step}; lower the learning rate")
            optimizer.step()
            _update_average(average, module, config.ema_decay, step)
            entry |= {"learning_rate": config.learning_rate_at(step), "seconds": time.perf_counter() - start}
            _append(folder / LOG_NAME, json.dumps({"step": step, **entry}) + "\n")
            bar.set_postfix({name: f"{value:.3f}" for name, value in entry.items() if name in losses}, refresh=False)
            bar.update()
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                _save(folder, step + 1, module, optimizer, average, values)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(average[name])
    module.eval()


def _optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in module.parameters():
        (decayed if parameter.ndim >= 2 and id(parameter) not in embeddings else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def _update_average(average: dict[str, Tensor], module: nn.Module, decay: float, step: int) -> None:
    decay = min(decay, (1 + step) / (10 + step))  # short memory at first, or the initial weights would stay in it
    for name, parameter in module.named_parameters():
        average[name].lerp_(parameter.detach(), 1 - decay)


def _save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    values: dict[str, Any],
) -> None:
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    save_checkpoint(folder, step, tensors, values)


@torch.no_grad()
def _restore(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    values: dict[str, Any],
) -> int:
    step, tensors, saved_values = load_checkpoint(folder)
    for name in sorted(values.keys() | saved_values.keys()):
        if name not in saved_values:
            raise ValueError(
                f"train: to resume, the checkpoint must say its {name}, got one of another kind of run or an earlier "
                "version; choose another folder"
            )
        # Through JSON, as the saved ones went: tuples are lists there.
        wanted, saved = json.loads(json.dumps(values.get(name))), saved_values.get(name)
        if wanted != saved:
            raise ValueError(f"train: to resume, {name} must be that of the checkpoint, {saved}, got {wanted}")
    parts: dict[str, dict[str, Tensor]] = {"module": {}, "average": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    module.load_state_dict(parts["module"])
    for name, tensor in parts["average"].items():
        average[name].copy_(tensor)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        index, _, rest = name.partition(".")
        state.setdefault(int(index), {})[rest] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    # The fused optimizer goes through parameter and moments in the order of their memory, whatever their strides are,
    # and a checkpoint's tensors are contiguous: those of channels-last weights would meet other elements.
    for parameter, moments in optimizer.state.items():
        for name, tensor in moments.items():
            if tensor.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(tensor)
    return step


def _truncate_log(path: Path, steps: int) -> None:
    """Drops the lines of steps that a killed run took after its last checkpoint: they are taken again.

    Where there is no log it makes one, and so reports a folder that cannot be written before the first step.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:steps] if path.exists() else []
    write_atomically(path, "".join(lines).encode())


def _append(path: Path, line: str) -> None:
    # Opened for each line: what a full disk leaves in the buffer fails again at close(), and is named there, too.
    with errors_named(path), path.open("a", encoding="utf-8") as log:
        log.write(line)
