"""C++ kernels for tensors on the CPU: hands pointers, sizes and strides to the extension `hywia_kernels._native`."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

OPS = ("taylor_importance", "compact", "attention_fusion", "taylor_importance_batch")

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ORDER_CODES = {"first": 0, "second": 1, "mixed": 2}


@cache
def _extension() -> Any:  # the module, or the ImportError that says why there is none
    try:
        return importlib.import_module("hywia_kernels._native")
    except ImportError as error:
        return error


def unavailable() -> str | None:
    error = _extension()
    if isinstance(error, ModuleNotFoundError):
        return "the C++ extension was not built (HYWIA_BUILD=none or no compiler); reinstall with HYWIA_BUILD=cpu"
    if isinstance(error, ImportError):
        return f"the C++ extension does not load ({error}); reinstall with HYWIA_BUILD=cpu"
    return None


def unsupported(op: str, *tensors: Tensor | None) -> str | None:
    elsewhere = next((t.device for t in tensors if t is not None and t.device.type != "cpu"), None)
    return None if elsewhere is None else f"it takes tensors on the CPU, got {elsewhere}"


def operand(tensor: Tensor | None, axis: int) -> tuple[int, int, int, int]:
    """(address, unit stride, reduce stride, dtype code) of a matrix whose units lie along `axis`."""
    if tensor is None:
        return (0, 0, 0, 0)
    return (tensor.data_ptr(), tensor.stride(axis), tensor.stride(1 - axis), DTYPE_CODES[tensor.dtype])


def compact_sizes(weight: Tensor, axis: int, out: Tensor) -> dict[str, int]:
    """Sizes and strides of a compaction; a vector is one row whose columns are kept."""
    vector = weight.dim() == 1
    return {
        "rows": 1 if vector else out.shape[0],
        "columns": out.shape[-1],
        "row_stride": 0 if vector else weight.stride(0),
        "column_stride": weight.stride(-1),
        "axis": 1 if vector else axis,
        "element_size": weight.element_size(),
    }


def taylor_importance(
    weight: Tensor,
    grad: Tensor | None,
    fisher: Tensor | None,
    axis: int,
    order: str,
    group_size: int,
    fine: Tensor,
    signed: Tensor,
    accumulate: bool,
) -> None:
    _extension().taylor_importance(
        weight=operand(weight, axis),
        grad=operand(grad, axis),
        fisher=operand(fisher, axis),
        units=weight.shape[axis],
        reduce=weight.shape[1 - axis],
        group_size=group_size,
        order=ORDER_CODES[order],
        fine=fine.data_ptr(),
        signed_sum=signed.data_ptr(),
        accumulate=accumulate,
        threads=torch.get_num_threads(),
    )


def compact(weight: Tensor, keep: Tensor, axis: int, out: Tensor) -> None:
    _extension().compact(
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        keep=keep.data_ptr(),
        threads=torch.get_num_threads(),
        **compact_sizes(weight, axis, out),
    )


def attention_fusion(fine: Tensor, coarse: Tensor, temperature: float, score: Tensor, weight: Tensor) -> None:
    _extension().attention_fusion(
        fine=fine.data_ptr(),
        coarse=coarse.data_ptr(),
        units=fine.shape[0],
        temperature=temperature,
        score=score.data_ptr(),
        weight=weight.data_ptr(),
        threads=torch.get_num_threads(),
    )


def taylor_importance_batch(
    weights: list[Tensor],
    grads: list[Tensor],
    fishers: list[Tensor],
    axes: list[int],
    order: str,
    group_sizes: list[int],
    into: list[int],
    fine: list[Tensor],
    signed: list[Tensor],
    accumulate: bool,
) -> None:
    """One matrix after the other: a call costs nothing here."""
    seen: set[int] = set()
    for i, (weight, result) in enumerate(zip(weights, into, strict=True)):
        grad, fisher = (x[i] if x else None for x in (grads, fishers))
        add = accumulate or result in seen
        taylor_importance(weight, grad, fisher, axes[i], order, group_sizes[i], fine[result], signed[result], add)
        seen.add(result)
