"""`taylor_importance_both`: row and column sums of one matrix from a single read of its operands.

On the GPU one Triton kernel sums every tile along both sides. Everywhere else `taylor_importance` takes the matrix in
bands of rows that stay in the cache between its two calls, one along each axis. It is composed of ops, not one itself:
it has no entry in the registry.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import checks, registry
from .calls import TaylorCall
from .devices import on

__all__ = ["taylor_importance_both"]

# Bytes of all operands of a band, which is read from memory along the rows, then from the last-level cache along the
# columns.
_BAND_BYTES = {"cpu": 4 << 20, "cuda": 16 << 20}
# One tile of the Triton kernel, and the number of columns that a program walks. They are constants so that the shape
# alone decides the bits of the result.
BLOCK_ROWS = 32
BLOCK_COLUMNS = 128
LENGTH = 1024
WARPS = 4

Sums = tuple[Tensor, Tensor]


def taylor_importance_both(
    weight: Tensor,
    grad: Tensor | None,
    fisher: Tensor | None = None,
    *,
    order: str = "first",
    backend: str | None = None,
) -> tuple[Sums, Sums]:
    """`taylor_importance` along both axes of a matrix whose rows count in one group and whose columns in another.

    Args:
        weight, grad, fisher, order: as in `taylor_importance`.
        backend: as in `taylor_importance`. None takes Triton on a GPU, where the one kernel lives.

    Returns:
        `((fine, signed) of the rows, (fine, signed) of the columns)`, float32 `[rows]` and `[columns]`.

    Raises:
        UsageError: as `taylor_importance`. BackendError: a named backend that is off or cannot do this.
    """
    checks.taylor_importance(TaylorCall(weight, grad, fisher, 0, order, 1), None)
    grad = None if order == "second" else grad
    fisher = None if order == "first" else fisher
    if checks.traced(weight, grad, fisher):
        op = torch.ops.hywia.taylor_importance
        return op(weight, grad, fisher, 0, order, 1, backend), op(weight, grad, fisher, 1, order, 1, backend)
    if _kernel_takes(backend, weight, grad, fisher):
        return _in_one_kernel(weight, grad, fisher, order)
    return _in_bands(weight, grad, fisher, order, backend)


def _kernel_takes(backend: str | None, *tensors: Tensor | None) -> bool:
    given = [t for t in tensors if t is not None]
    if 0 in given[0].shape:
        return False
    if backend is None and not os.environ.get(registry.ENVIRONMENT) and given[0].device.type == "cuda":
        return registry.refusal("triton", "taylor_importance", given) is None
    return registry.choose("taylor_importance", backend, *tensors) == "triton"


def _in_one_kernel(weight: Tensor, grad: Tensor | None, fisher: Tensor | None, order: str) -> tuple[Sums, Sums]:
    from .kernels_triton_both import taylor_both  # imports triton, which may be absent

    rows, columns = weight.shape
    blocks, pieces = -(-rows // BLOCK_ROWS), -(-columns // LENGTH)
    row_sums = torch.empty((2, pieces, rows), dtype=torch.float32, device=weight.device)
    column_sums = torch.empty((2, blocks, columns), dtype=torch.float32, device=weight.device)
    operands = [weight, weight if grad is None else grad, weight if fisher is None else fisher]
    with on(weight.device):
        taylor_both[(blocks, pieces)](
            *operands,
            row_sums,
            column_sums,
            rows,
            columns,
            LENGTH,
            *(stride for x in operands for stride in x.stride()),
            ORDER=order,
            BLOCK_R=BLOCK_ROWS,
            BLOCK_C=BLOCK_COLUMNS,
            num_warps=WARPS,
        )
        of_rows, of_columns = row_sums.sum(1), column_sums.sum(1)
    return (of_rows[0], of_rows[1]), (of_columns[0], of_columns[1])


def _in_bands(
    weight: Tensor, grad: Tensor | None, fisher: Tensor | None, order: str, backend: str | None
) -> tuple[Sums, Sums]:
    rows, columns = weight.shape
    run = registry.implementation("taylor_importance", backend, weight, grad, fisher)
    of_rows, of_columns = torch.zeros((2, 2, max(rows, columns)), dtype=torch.float32, device=weight.device)
    row_fine, row_signed = of_rows[:, :rows].contiguous()
    column_fine, column_signed = of_columns[:, :columns].contiguous()
    bytes_a_row = columns * sum(x.element_size() for x in (weight, grad, fisher) if x is not None)
    band = max(1, _BAND_BYTES.get(weight.device.type, rows * bytes_a_row) // max(1, bytes_a_row))
    for at in range(0, rows, band):
        part = slice(at, at + band)
        operands = weight[part], None if grad is None else grad[part], None if fisher is None else fisher[part]
        run(TaylorCall(*operands, 0, order, 1), row_fine[part], row_signed[part], False)
        run(TaylorCall(*operands, 1, order, 1), column_fine, column_signed, True)
    return (row_fine, row_signed), (column_fine, column_signed)
