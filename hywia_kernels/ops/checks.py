"""Argument checks of the ops: run once, before dispatch, in eager mode and under torch.compile alike.

Only shapes, dtypes, devices and strides are looked at here; what needs the values (`keep` in range and increasing) is
checked by `library`, which runs outside the traced graph.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import UsageError
from ..settings import ORDERS
from .calls import BatchCall, LinearCall, TaylorCall

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LINEAR_ORDERS = (*ORDERS, "all")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def traced(*values: object) -> bool:
    """Whether torch's dispatcher must see the call, because it is compiled or recorded, or its tensors are fake or
    functional; a backend, which reads memory, could not take it as it is."""
    if torch.compiler.is_compiling() or _modes() or _transform() is not None:
        return True
    return any(type(v) is not Tensor and _is_stand_in(type(v)) for v in values)


_modes: Any = torch._C._len_torch_dispatch_stack
_transform: Any = torch._C._functorch.peek_interpreter_stack


def _is_stand_in(kind: type) -> bool:
    """FakeTensor and FunctionalTensor, which the ops' fake implementations serve."""
    return kind.__module__.startswith("torch._subclasses.")


def expect_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise UsageError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    kind = type(value)
    if kind is Tensor or kind is Parameter or torch.compiler.is_compiling() or _is_stand_in(kind):
        return value
    # Such a tensor may keep its values anywhere, and its own address may be zero.
    raise UsageError(
        f"{name}: expected a plain torch.Tensor, got {kind.__name__} of {kind.__module__}; pass the values themselves "
        "(a DTensor's .to_local() or .full_tensor(), a quantised one's .dequantize())"
    )


def expect_stored(**operands: Tensor | None) -> None:
    """Checks that operands, which have passed all other checks, have memory that a backend may read."""
    if traced(*operands.values()):
        return
    for name, tensor in operands.items():
        if tensor is not None and tensor.data_ptr() == 0 and tensor.numel():
            raise UsageError(
                f"{name}: expected a tensor with values, got one without memory on {tensor.device}; load it (meta "
                "tensors have none, nor have weights that are sharded or offloaded)"
            )


def expect_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        expected = ", ".join(dtype_name(d) for d in DTYPES)
        raise UsageError(f"{name}: expected dtype {expected}, got {dtype_name(tensor.dtype)}; convert it with .to(...)")


def _axis(axis: object) -> None:
    if not isinstance(axis, int) or isinstance(axis, bool) or axis not in (0, 1):
        raise UsageError(f"axis: expected 0 (units are rows) or 1 (units are columns), got {axis!r}")


def _like(name: str, tensor: Tensor, weight: Tensor) -> None:
    expect_dtype(name, tensor)
    if tensor.shape != weight.shape:
        raise UsageError(f"{name}: expected the weight's shape {list(weight.shape)}, got {list(tensor.shape)}")
    if tensor.device != weight.device:
        raise UsageError(f"{name}: expected the weight's device {weight.device}, got {tensor.device}; move it first")


def expect_floats(name: str, value: object, shape: list[int], device: torch.device) -> None:
    tensor = expect_tensor(name, value)
    if tensor.dtype != torch.float32 or list(tensor.shape) != shape or tensor.device != device:
        raise UsageError(
            f"{name}: expected float32 {shape} on {device}, "
            f"got {dtype_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        kind = "vector" if len(shape) == 1 else "matrix"
        raise UsageError(f"{name}: expected a contiguous {kind}, got strides {tensor.stride()}; pass .contiguous()")


def _pair(out: object, names: tuple[str, str], shapes: tuple[list[int], list[int]], device: torch.device) -> None:
    if not isinstance(out, tuple) or len(out) != 2:
        raise UsageError(f"out: expected a pair ({names[0]}, {names[1]}) of tensors, got {type(out).__name__}")
    for name, tensor, shape in zip(names, out, shapes, strict=True):
        expect_floats(f"out ({name})", tensor, shape, device)
    expect_stored(**{f"out ({name})": tensor for name, tensor in zip(names, out, strict=True)})


def _group_size(group_size: object, size: int, axis: int) -> None:
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1 or size % group_size:
        raise UsageError(
            f"group_size: expected a positive divisor of the weight's size {size} along axis {axis}, got {group_size!r}"
        )


def taylor_importance(call: TaylorCall, out: tuple[Tensor, Tensor] | None) -> TaylorCall:
    """Checks the call, and returns it without the operands that its order does not read.

    Raises:
        UsageError: an argument outside the contract of `ops.taylor_importance`.
    """
    weight, grad, fisher, axis, order, group_size = call
    _axis(axis)
    if order not in ORDERS:
        raise UsageError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    expect_tensor("weight", weight)
    if weight.dim() != 2:
        raise UsageError(f"weight: expected a matrix [rows, columns], got {weight.dim()} dimensions; view it as 2-D")
    expect_dtype("weight", weight)
    if order != "second":
        if grad is None:
            raise UsageError(f"grad: expected a tensor for order={order!r}, got None; only 'second' does without it")
        _like("grad", expect_tensor("grad", grad), weight)
    if order != "first":
        if fisher is None:
            raise UsageError(f"fisher: expected a tensor for order={order!r}, got None; only 'first' does without it")
        _like("fisher", expect_tensor("fisher", fisher), weight)
    size = weight.shape[axis]
    _group_size(group_size, size, axis)
    if out is not None:
        units = [size // group_size]
        _pair(out, ("fine", "signed"), (units, units), weight.device)
    grad, fisher = None if order == "second" else grad, None if order == "first" else fisher
    expect_stored(weight=weight, grad=grad, fisher=fisher)
    return TaylorCall(weight, grad, fisher, axis, order, group_size)


def _offsets(samples: object, tokens: int) -> list[int]:
    """The samples' offsets among the tokens: `samples + 1` increasing numbers from 0 to `tokens`."""
    if isinstance(samples, int) and not isinstance(samples, bool):
        if samples < 1 or tokens % samples or tokens == 0:
            raise UsageError(f"samples: expected a positive divisor of the {tokens} tokens, or offsets, got {samples}")
        return list(range(0, tokens + 1, tokens // samples))
    if isinstance(samples, Tensor):
        if samples.dtype != torch.int64 or samples.dim() != 1 or samples.device.type != "cpu":
            raise UsageError(
                f"samples: expected int64 offsets [samples + 1] on the CPU, "
                f"got {dtype_name(samples.dtype)} {list(samples.shape)} on {samples.device}"
            )
        samples = samples.tolist()
    if not isinstance(samples, Sequence) or isinstance(samples, str) or not all(type(o) is int for o in samples):
        raise UsageError(f"samples: expected a number or offsets [samples + 1], got {samples!r}")
    increasing = all(a < b for a, b in itertools.pairwise(samples))
    if len(samples) < 2 or samples[0] != 0 or samples[-1] != tokens or not increasing:
        raise UsageError(f"samples: expected offsets that increase from 0 to the {tokens} tokens, got {list(samples)}")
    return list(samples)


def linear_importance(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    samples: object,
    axis: int,
    order: str,
    group_size: int,
    per_sample: bool,
    scale: float,
    mapped: Tensor | None,
    out: tuple[Tensor, Tensor] | None,
) -> LinearCall:
    """Checks the arguments, and returns the call with the samples' offsets.

    Raises:
        UsageError: an argument outside the contract of `ops.linear_importance`.
    """
    _axis(axis)
    if order not in LINEAR_ORDERS:
        raise UsageError(f"order: expected one of {', '.join(LINEAR_ORDERS)}, got {order!r}")
    named = {"grad_output": grad_output, "input": input, "weight": weight}
    for name, tensor in named.items():
        expect_tensor(name, tensor)
    for name, tensor in named.items():
        if tensor.dim() != 2:
            raise UsageError(f"{name}: expected a matrix, got {tensor.dim()} dimensions; pass .flatten(0, -2)")
        expect_dtype(name, tensor)
        if tensor.dtype != weight.dtype or tensor.device != weight.device:
            raise UsageError(
                f"{name}: expected the weight's {dtype_name(weight.dtype)} on {weight.device}, "
                f"got {dtype_name(tensor.dtype)} on {tensor.device}; convert it with .to(weight)"
            )
    rows, columns = weight.shape
    tokens = grad_output.shape[0]
    if grad_output.shape[1] != rows:
        raise UsageError(
            f"grad_output: expected [tokens, {rows}], one column per output, got {list(grad_output.shape)}"
        )
    if list(input.shape) != [tokens, columns]:
        raise UsageError(f"input: expected {[tokens, columns]}, got {list(input.shape)}")
    offsets = _offsets(samples, tokens)
    _group_size(group_size, weight.shape[axis], axis)
    if not isinstance(per_sample, bool) or not (per_sample or order == "first"):
        raise UsageError(f"per_sample: expected True, or False with order='first', got {per_sample!r} with {order!r}")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not math.isfinite(scale) or scale <= 0:
        raise UsageError(f"scale: expected a positive finite number, got {scale!r}")
    if mapped is not None:
        expect_tensor("mapped", mapped)
        shape = [tokens, weight.shape[axis]]
        if list(mapped.shape) != shape or mapped.dtype != weight.dtype or mapped.device != weight.device:
            raise UsageError(
                f"mapped: expected {dtype_name(weight.dtype)} {shape} on {weight.device}, "
                f"got {dtype_name(mapped.dtype)} {list(mapped.shape)} on {mapped.device}; leave it out"
            )
    call = LinearCall(grad_output, input, weight, offsets, axis, order, group_size, per_sample, float(scale), mapped)
    if out is not None:
        _pair(out, ("fine", "coarse"), call.shapes, weight.device)
    expect_stored(grad_output=grad_output, input=input, weight=weight, mapped=mapped)
    return call


def compact(weight: Tensor, keep: Tensor, axis: int, out: Tensor | None) -> None:
    _axis(axis)
    expect_dtype("weight", expect_tensor("weight", weight))
    if weight.dim() not in (1, 2):
        raise UsageError(f"weight: expected a matrix or a vector, got {weight.dim()} dimensions")
    if weight.dim() == 1 and axis != 0:
        raise UsageError("axis: expected 0 for a vector, got 1")
    expect_tensor("keep", keep)
    if keep.dtype != torch.int64 or keep.dim() != 1:
        raise UsageError(f"keep: expected int64 [kept], got {dtype_name(keep.dtype)} {list(keep.shape)}")
    if keep.device.type != "cpu" and keep.device != weight.device:
        raise UsageError(f"keep: expected the CPU or the weight's device {weight.device}, got {keep.device}")
    if out is not None:
        shape = list(weight.shape)
        shape[axis] = keep.shape[0]
        expect_tensor("out", out)
        if list(out.shape) != shape or out.dtype != weight.dtype or out.device != weight.device:
            raise UsageError(
                f"out: expected {dtype_name(weight.dtype)} {shape} on {weight.device}, "
                f"got {dtype_name(out.dtype)} {list(out.shape)} on {out.device}"
            )
        if not out.is_contiguous():
            raise UsageError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    expect_stored(weight=weight, keep=keep, out=out)


def attention_fusion(fine: Tensor, coarse: Tensor, temperature: float, out: tuple[Tensor, Tensor] | None) -> None:
    expect_tensor("fine", fine)
    if fine.dim() != 1:
        raise UsageError(f"fine: expected a vector [units], got {fine.dim()} dimensions")
    units = [fine.shape[0]]
    expect_floats("fine", fine, units, fine.device)
    expect_floats("coarse", coarse, units, fine.device)
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not temperature > 0 or temperature == float("inf"):
        raise UsageError(f"temperature: expected a positive finite number, got {temperature!r}")
    if out is not None:
        _pair(out, ("score", "weight"), (units, units), fine.device)
    expect_stored(fine=fine, coarse=coarse)


def keep_values(keep: Tensor, size: int) -> None:
    """Checks the part of `compact`'s contract that needs the values of `keep`, which must be within `[0, size)`."""
    if keep.numel() == 0:
        return
    bad_order = bool((keep[1:] <= keep[:-1]).any())
    low, high = int(keep[0]), int(keep[-1])
    if bad_order or low < 0 or high >= size:
        raise UsageError(
            f"keep: expected strictly increasing indices within [0, {size}), got "
            + ("indices out of order" if bad_order else f"a range of [{low}, {high}]")
            + "; sort and deduplicate them"
        )


def _per_matrix(name: str, value: object, count: int) -> list:
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"{name}: expected a list or tuple of one per matrix, got {type(value).__name__}")
    if len(value) != count:
        raise UsageError(f"{name}: expected one per matrix, {count}, got {len(value)}")
    return list(value)


def _into(into: Sequence[int] | None, count: int) -> list[int]:
    if into is None:
        return list(range(count))
    into = _per_matrix("into", into, count)
    for index in into:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
            raise UsageError(f"into: expected indices of results within [0, {count}), got {index!r}")
    unused = set(range(max(into))) - set(into)
    if unused:
        raise UsageError(
            f"into: expected every result up to the largest, {max(into)}, got none for {min(unused)}; number them "
            "without gaps"
        )
    return into


def taylor_importance_batch(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    fishers: Sequence[Tensor] | None,
    axes: int | Sequence[int],
    order: str,
    group_sizes: int | Sequence[int] | None,
    into: Sequence[int] | None,
    out: Sequence[tuple[Tensor, Tensor]] | None,
) -> BatchCall:
    if not isinstance(weights, (list, tuple)) or not weights:
        raise UsageError(
            f"weights: expected a list or tuple of at least one matrix, got {type(weights).__name__}"
            + (" of none" if isinstance(weights, (list, tuple)) else "")
        )
    count = len(weights)
    if order not in ORDERS:
        raise UsageError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    given = {"grads": grads if order != "second" else None, "fishers": fishers if order != "first" else None}
    for name, unread in (("grads", "second"), ("fishers", "first")):
        if given[name] is None and order != unread:
            raise UsageError(
                f"{name}: expected tensors for order={order!r}, got None; only {unread!r} does without them"
            )
    gradients, squares = ([] if v is None else _per_matrix(name, v, count) for name, v in given.items())
    axes = [axes] * count if isinstance(axes, int) else _per_matrix("axes", axes, count)
    group_sizes = 1 if group_sizes is None else group_sizes
    sizes = [group_sizes] * count if isinstance(group_sizes, int) else _per_matrix("group_sizes", group_sizes, count)
    results = _into(into, count)
    units: dict[int, int] = {}
    for i, weight in enumerate(weights):
        grad, fisher = (x[i] if x else None for x in (gradients, squares))
        try:
            taylor_importance(TaylorCall(weight, grad, fisher, axes[i], order, sizes[i]), None)
        except UsageError as error:
            raise UsageError(f"matrix {i}: {error}") from None
        if weight.device != weights[0].device:
            raise UsageError(
                f"weights: expected one device, got {weights[0].device} and, for matrix {i}, {weight.device}; "
                "call once per device"
            )
        mine = weight.shape[axes[i]] // sizes[i]
        if units.setdefault(results[i], mine) != mine:
            raise UsageError(
                f"into: expected matrices of equally many units in result {results[i]}, "
                f"got {units[results[i]]} and, for matrix {i}, {mine}"
            )
    if out is not None:
        if not isinstance(out, (list, tuple)) or len(out) != len(units):
            got = f"{len(out)}" if isinstance(out, (list, tuple)) else type(out).__name__
            raise UsageError(f"out: expected a pair (fine, signed) per result, {len(units)}, got {got}")
        for result, pair in enumerate(out):
            try:
                _pair(pair, ("fine", "signed"), ([units[result]],) * 2, weights[0].device)
            except UsageError as error:
                raise UsageError(f"result {result}: {error}") from None
        # A compiled graph does not know which tensors are the same object, so only eager calls are checked for that.
        if not torch.compiler.is_compiling() and len({id(x) for pair in out for x in pair}) != 2 * len(out):
            raise UsageError(
                "out: expected a tensor of its own for every sum, got one twice; share results with `into`"
            )
    return BatchCall(list(weights), gradients, squares, axes, order, sizes, results)
