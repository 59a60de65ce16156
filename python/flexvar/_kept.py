"""What is made of parameters and kept, since it would be made anew at every call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Kept(Generic[T]):
    """Values made of parameters, one a key, each for as long as its parameters keep their values.

    A change is noticed by another storage (``.to``, ``.cuda``) or a raised version counter (optimizers,
    ``load_state_dict``, ``copy_``); only writes through ``.data`` escape. What is kept stays where it is while other
    keys are used, too: CUDA graphs hold its address.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[list[tuple[int, int]], T]] = {}

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        """Copies start empty."""
        return Kept, ()

    def get(self, key: Hashable, parameters: Sequence[Tensor], make: Callable[[], T]) -> T:
        """``make()``, remembered unless gradients are being recorded or a graph is traced."""
        # Tensors made in inference mode count no versions, and a compiled graph must not hold what it was traced with.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(p.is_inference() for p in parameters):
            return make()
        state = [(parameter.data_ptr(), parameter._version) for parameter in parameters]
        entry = self._entries.get(key)
        if entry is None or entry[0] != state:
            with torch.inference_mode(False), torch.no_grad():  # a tensor that may be copied and saved
                entry = (state, make())
            # One assignment, which other threads see whole or not at all; without what was made of other values.
            self._entries = {**{k: e for k, e in self._entries.items() if e[0] == state}, key: entry}
        return entry[1]


class Casts:
    """A layer's parameters as a product under autocast takes them, cast once a dtype.

    Autocast itself would cast them anew at every step. On the CPU the native ops read float32 and need no copy.
    """

    def __init__(self, backend: str) -> None:
        self._reads_float32 = backend == "native"
        self._kept: dict[str, Kept[Tensor]] = {}

    def of(self, name: str, parameter: Tensor) -> Tensor:
        """``parameter``, one of the layer's that is called ``name`` here, in autocast's dtype if autocast is on."""
        if self._reads_float32 and parameter.is_cpu:
            return parameter
        device = "cuda" if parameter.is_cuda else parameter.device.type  # a device's string is slow to make
        if (
            not torch.is_autocast_enabled(device)
            or torch.is_grad_enabled() or torch.compiler.is_compiling() or parameter.is_inference()
            or parameter.dtype == torch.float64  # which autocast, too, leaves as it is
        ):  # fmt: skip
            return parameter
        dtype = torch.get_autocast_dtype(device)
        kept = self._kept.setdefault(name, Kept())
        return kept.get(dtype, [parameter], lambda: parameter.detach().to(dtype))
