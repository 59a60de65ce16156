"""The linear layer, with what follows it in a transformer."""

from __future__ import annotations

import torch
from torch import Tensor

from flexvar_ext import reference
from flexvar_ext._checks import WITH_FLOAT64, alike, check_choice, check_same_device, is_differentiated, not_dense
from flexvar_ext._device import has_warpgroup_products
from flexvar_ext._registration import register_autocast

ACTIVATIONS = ("none", "gelu_tanh")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    constant_weight: bool = False,
) -> Tensor:
    """``residual + gate * activation(x @ weight.T + bias)``: ``torch.nn.functional.linear`` and the ops behind it.

    On the CPU, sums are accumulated in float32 in an order that K alone gives, and rounded once, after the residual: a
    row of the result does not depend on the other rows, on their number or on the number of threads, bit for bit. The
    weight is read where it lies; no copy of it is made or kept. On a tile unit (AMX), a float32 number is the sum of
    three bfloat16 numbers: the error is about that of float32 arithmetic. Parts below 2^-126 are zero there, so
    factors and products below about 2e-31 keep fewer digits.

    Elsewhere this is the composition of torch's own ops in :func:`flexvar_ext.reference.linear`: on CUDA, whose
    matrix products are at the hardware's limit already; in float64; and wherever a gradient is needed, a forward-mode
    one too. On CUDA in 16 bits GELU alone behind the product is part of it, where no gradient is needed: it is computed
    from the sums before they are rounded. On Hopper few rows (50 where K is 1024, 32 where it is 4096) are multiplied
    by a kernel of this library, whose time is the weight's way from memory: where ``constant_weight`` allows it, that
    begins while the kernels before it still run. A row of its result depends on the row and the weight alone, to the
    bit.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64; K >= 1.
        weight: [N, K] as ``torch.nn.Linear`` holds it, of x's dtype (under autocast, of autocast's), or float32, which
            is rounded to that dtype, if the product needs it so, in pieces that stay in the cache.
        bias: [N], any of these dtypes, or None.
        activation: ``none``, or ``gelu_tanh``, ``torch.nn.functional.gelu`` with ``approximate="tanh"``.
        gate: [B, 1, N] for x [B, l, K], any of these dtypes, or None: each image's factor for its tokens.
        residual: [..., N], any of these dtypes, or None.
        constant_weight: that no op of this library that may still be running writes weight or bias, as is true of a
            model's parameters.

    Returns: [..., N], contiguous, of the residual's dtype, else of x's (under autocast, of autocast's).

    Raises: TypeError and ValueError naming the argument, the rule and the value got.
    """
    is_float64 = False
    if not _fit(x, weight, bias, activation, gate, residual):
        is_float64 = torch.float64 in _check(x, weight, bias, activation, gate, residual)
    dtype = reference.result_dtype(x)
    needs_gradient = is_differentiated(x, weight, bias, gate, residual)
    if (
        x.is_cuda and dtype in (torch.float16, torch.bfloat16) and gate is None and residual is None
        and not needs_gradient and not torch.compiler.is_compiling()
    ):  # fmt: skip
        if _are_few_rows(x, weight):
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            few: Tensor = torch.ops.flexvar.linear_few_rows(x, weight, bias, activation, constant_weight)
            return few
        if activation == "gelu_tanh" and bias is not None:
            return _linear_gelu(x.to(dtype), weight.to(dtype), bias.to(dtype))
    if x.is_cuda or is_float64 or needs_gradient:
        return reference.linear(x, weight, bias, activation=activation, gate=gate, residual=residual)
    result: Tensor = torch.ops.flexvar.linear(x, weight, bias, activation, gate, residual)
    return result


# Numbers of x beyond which their way to every multiprocessor takes longer than the weight's from memory: measured with
# d16 and d24 on an H200. Each block holds its part of a weight of so much depth, at most.
_FEW, _FEW_OF_DEEP, _DEEP, _DEEPEST = 50 * 1024, 32 * 4096, 2048, 6400


def _are_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel for few rows takes these, on the GPU that it was measured on."""
    columns, depth = weight.shape
    return (
        x.numel() <= (_FEW if depth <= _DEEP else _FEW_OF_DEEP)
        and depth % 32 == 0 and depth <= _DEEPEST and columns % 8 == 0
        and has_warpgroup_products(x.device)
    )  # fmt: skip


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """All of one dtype, 16 bits wide: cuBLAS applies GELU to the sums, and no pass over memory is spent on it.

    Not in float32: its tanh may be the hardware's, with errors of 2^-11.
    """
    rows = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.T, use_gelu=True)
    return rows.view(*x.shape[:-1], weight.shape[0])


def _fit(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gate: Tensor | None, residual: Tensor | None
) -> bool:
    """Whether these are right and none is float64: a quick look (``alike``), right or not at all."""
    if not isinstance(x, Tensor) or not alike((x,) if residual is None else (x, residual), x.dim()):
        return False
    if not alike((weight,), 2, (reference.result_dtype(x), torch.float32), beside=x) or activation not in ACTIVATIONS:
        return False
    columns, depth = weight.shape
    shape = x.shape
    if depth == 0 or not shape or shape[-1] != depth:
        return False
    if bias is not None and not (alike((bias,), 1, beside=x) and bias.shape[0] == columns):
        return False
    if gate is not None and not (
        alike((gate,), 3, beside=x) and len(shape) == 3 and gate.shape == (shape[0], 1, columns)
    ):
        return False
    return residual is None or residual.shape == (*shape[:-1], columns)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gate: Tensor | None, residual: Tensor | None
) -> set[torch.dtype]:
    """Returns the dtypes of all."""
    op = "linear"
    given = {"x": x, "weight": weight}
    for name, optional in (("bias", bias), ("gate", gate), ("residual", residual)):
        if optional is not None:
            given[name] = optional
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
        if value.dtype not in WITH_FLOAT64:
            raise TypeError(f"{op}: {name} must have dtype float32, float16, bfloat16 or float64, got {value.dtype}")
        if value.layout is not torch.strided:
            raise not_dense(op, name, value)
    check_same_device(op, **given)
    _check_shapes(op, x, weight, bias, gate, residual)
    check_choice(op, "activation", activation, ACTIVATIONS)
    dtype = reference.result_dtype(x)
    if weight.dtype not in (dtype, torch.float32):
        raise TypeError(f"{op}: weight must have dtype {dtype} or float32, got {weight.dtype}")
    return {value.dtype for value in given.values()}


def _check_shapes(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, residual: Tensor | None
) -> None:
    if weight.ndim != 2 or weight.shape[1] == 0:
        raise ValueError(f"{op}: weight must have shape [N, K] with K >= 1, got {tuple(weight.shape)}")
    columns, depth = weight.shape
    if x.ndim == 0 or x.shape[-1] != depth:
        raise ValueError(f"{op}: x must have shape [..., K] with K = {depth}, got {tuple(x.shape)}")
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"{op}: bias must have shape [N] with N = {columns}, got {tuple(bias.shape)}")
    if gate is not None and (x.ndim != 3 or gate.shape != (x.shape[0], 1, columns)):
        raise ValueError(
            f"{op}: gate must have shape [B, 1, N] with N = {columns} for x [B, l, K], "
            f"got {tuple(gate.shape)} for x {tuple(x.shape)}"
        )
    if residual is not None and residual.shape != (*x.shape[:-1], columns):
        expected = (*x.shape[:-1], columns)
        raise ValueError(f"{op}: residual must have the result's shape {tuple(expected)}, got {tuple(residual.shape)}")


@torch.library.register_fake("flexvar::linear")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gate: Tensor | None, residual: Tensor | None
) -> Tensor:
    return (x if residual is None else residual).new_empty(*x.shape[:-1], weight.shape[0])


register_autocast("linear", only=("x",))


@torch.library.register_fake("flexvar::linear_few_rows")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, constant: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
