"""Launches the Triton kernels: on the GPU, or on the CPU under `TRITON_INTERPRET=1`."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .calls import BatchCall, DistillationCall, LinearCall, TaylorCall, TopDistillationCall
from .devices import on

try:
    import triton

    from . import kernels_triton as kernels
    from . import triton_batch, triton_distillation, triton_linear
    from .triton_tiles import LONGEST_CHAIN, TILE, power_of_two

    _import_error: str | None = None
except ImportError as error:
    _import_error = f"triton cannot be imported ({error}); pip install 'hywia_kernels[triton]'"

OPS = (
    "taylor_importance",
    "linear_importance",
    "compact",
    "attention_fusion",
    "taylor_importance_batch",
    "distillation_gradient",
    "top_distillation_gradient",
)

# Eight programs on each of 132 multiprocessors. It is a constant so that the cut of the work, and with it the bits of
# the result, depends on the shape alone.
_PROGRAMS = 1056
_TEMPERATURES = (1e-37, 1e37)  # Triton hands a float over as float32; beyond these the blend is 0, 1 or 1/2 already


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    if _import_error is not None:
        return _import_error
    if not _interpreted() and not torch.cuda.is_available():
        return "no CUDA device is visible; set TRITON_INTERPRET=1 before the start to run its kernels on the CPU (slow)"
    return None


def unsupported(op: str, *tensors: Tensor | None) -> str | None:
    wanted = "cpu" if _interpreted() else "cuda"
    elsewhere = next((t.device for t in tensors if t is not None and t.device.type != wanted), None)
    if elsewhere is None:
        return None
    mode = "under TRITON_INTERPRET=1" if _interpreted() else "without TRITON_INTERPRET=1"
    return f"{mode} it takes tensors on {wanted}, got {elsewhere}"


def _cut(lines: int, reduce: int, group_size: int, reduce_contiguous: bool) -> tuple[int, int, int, int]:
    """Returns `(BLOCK_U, BLOCK_R, blocks, pieces)`, which depend on the shape alone.

    The contiguous dimension gets the long side of the tile, in whole 128-byte lines. The reduction is cut into pieces
    when there are too few programs to fill a GPU, or when a chain of additions would run too long; half of _PROGRAMS
    is enough, since one piece saves the second kernel.
    """
    fold = group_size > 1
    span = group_size if fold else lines
    if reduce_contiguous:
        block_r = power_of_two(reduce, 512)
        block_u = power_of_two(span, max(1, min(TILE // block_r, 64)))
    else:
        block_u = power_of_two(span, 128)
        block_r = power_of_two(reduce, max(1, min(TILE // block_u, 64)))
    blocks = (lines // group_size) * triton.cdiv(group_size, block_u) if fold else triton.cdiv(lines, block_u)
    steps = triton.cdiv(reduce, block_r)
    pieces = max(_PROGRAMS // blocks, triton.cdiv(steps, LONGEST_CHAIN))
    return block_u, block_r, blocks, max(1, min(pieces, steps, 65535))


def taylor_importance(call: TaylorCall, fine: Tensor, signed: Tensor, accumulate: bool) -> None:
    weight, grad, fisher, axis, order, group_size = call
    lines, reduce = weight.shape[axis], weight.shape[1 - axis]
    units = fine.numel()
    if lines == 0 or reduce == 0:
        if not accumulate:
            fine.zero_()
            signed.zero_()
        return
    block_u, block_r, blocks, pieces = _cut(lines, reduce, group_size, weight.stride(1 - axis) == 1)
    length = triton.cdiv(triton.cdiv(reduce, pieces), block_r) * block_r
    pieces = triton.cdiv(reduce, length)
    blocks_per_group = triton.cdiv(group_size, block_u)
    slots = pieces * (blocks_per_group if group_size > 1 else 1)
    into = torch.empty((2, slots, units), dtype=torch.float32, device=weight.device) if slots > 1 else None
    strides = [
        s for x in (weight, grad, fisher) for s in ((x.stride(axis), x.stride(1 - axis)) if x is not None else (0, 0))
    ]
    with on(weight.device):
        kernels.taylor_partial[(blocks, pieces)](
            weight,
            weight if grad is None else grad,
            weight if fisher is None else fisher,
            fine if into is None else into[0],
            signed if into is None else into[1],
            lines,
            reduce,
            group_size,
            blocks_per_group,
            length,
            *strides,
            ORDER=order,
            FOLD=group_size > 1,
            ACCUMULATE=accumulate and into is None,
            BLOCK_U=block_u,
            BLOCK_R=block_r,
            num_warps=4,
        )
        if into is not None:
            block = power_of_two(units, 32)
            kernels.finish[(triton.cdiv(units, block),)](
                into,
                fine,
                signed,
                slots,
                units,
                ACCUMULATE=accumulate,
                BLOCK_P=power_of_two(slots, 64),
                BLOCK=block,
                num_warps=4,
            )


def linear_importance(call: LinearCall, fine: Tensor, coarse: Tensor, accumulate: bool) -> None:
    with on(call.weight.device):
        triton_linear.linear_importance(call, fine, coarse, accumulate)


def compact(weight: Tensor, keep: Tensor, axis: int, out: Tensor) -> None:
    if out.numel() == 0:
        return
    vector = weight.dim() == 1  # one row whose columns are kept
    rows, columns = (1, out.shape[0]) if vector else out.shape
    row_stride, column_stride = (0, weight.stride(0)) if vector else weight.stride()
    block_columns = power_of_two(columns, 512)
    block_rows = power_of_two(rows, max(1, TILE // block_columns))
    grid = (triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns),)
    with on(weight.device):
        kernels.gather[grid](
            weight,
            keep,
            out,
            rows,
            columns,
            row_stride,
            column_stride,
            AXIS=1 if vector else axis,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=4,
        )


def attention_fusion(fine: Tensor, coarse: Tensor, temperature: float, score: Tensor, weight: Tensor) -> None:
    count = fine.numel()
    if count == 0:
        return
    with on(fine.device):
        kernels.attention[(1,)](
            fine,
            coarse,
            score,
            weight,
            count,
            min(max(temperature, _TEMPERATURES[0]), _TEMPERATURES[1]),
            torch.finfo(torch.float32).tiny,
            BLOCK=power_of_two(count, 1024),
            SPREAD=1e-6,
            num_warps=4,
        )


def taylor_importance_batch(call: BatchCall, fine: list[Tensor], signed: list[Tensor], accumulate: bool) -> None:
    triton_batch.taylor_importance_batch(call, fine, signed, accumulate)


def distillation_gradient(call: DistillationCall, loss: Tensor, gradient: Tensor | None) -> None:
    triton_distillation.distillation_gradient(call, loss, gradient)


def top_distillation_gradient(call: TopDistillationCall, loss: Tensor, gradient: Tensor | None) -> None:
    triton_distillation.top_distillation_gradient(call, loss, gradient)
