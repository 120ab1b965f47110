"""The Triton kernel behind `both_axes`: a tile of the matrix is read once and summed along both of its sides."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(pointer, row, column, row_stride, column_stride, mask):
    offsets = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def taylor_both(
    weight,
    grad,
    fisher,
    row_sums,
    column_sums,
    rows,
    columns,
    length,
    weight_row_stride,
    weight_column_stride,
    grad_row_stride,
    grad_column_stride,
    fisher_row_stride,
    fisher_column_stride,
    ORDER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_R rows of one piece of `length` columns.

    Writes the rows' sums over the piece to `row_sums` `[2, pieces, rows]` and the columns' sums over the rows to
    `column_sums` `[2, row blocks, columns]` (fine, signed); whoever launched it adds up the middle dimension.
    """
    block, piece = tl.program_id(0), tl.program_id(1)
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = piece * length
    end = tl.minimum(begin + length, columns)
    fine = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    signed = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    column_slot = block.to(tl.int64) * columns
    second_column = tl.num_programs(0).to(tl.int64) * columns
    for start in range(0, length, BLOCK_C):
        column = begin + start + tl.arange(0, BLOCK_C)
        mask = (row < rows)[:, None] & (column < end)[None, :]
        w = _load(weight, row, column, weight_row_stride, weight_column_stride, mask)
        if ORDER == "first":
            t = _load(grad, row, column, grad_row_stride, grad_column_stride, mask) * w
        else:
            t = 0.5 * _load(fisher, row, column, fisher_row_stride, fisher_column_stride, mask) * w * w
            if ORDER == "mixed":
                t = _load(grad, row, column, grad_row_stride, grad_column_stride, mask) * w - t
        size = tl.abs(t)
        fine += size
        signed += t
        tl.store(column_sums + column_slot + column, tl.sum(size, axis=0), mask=column < end)
        tl.store(column_sums + second_column + column_slot + column, tl.sum(t, axis=0), mask=column < end)
    row_slot = piece.to(tl.int64) * rows
    second_row = tl.num_programs(1).to(tl.int64) * rows
    tl.store(row_sums + row_slot + row, tl.sum(fine, axis=1), mask=row < rows)
    tl.store(row_sums + second_row + row_slot + row, tl.sum(signed, axis=1), mask=row < rows)
