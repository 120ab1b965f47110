"""The Triton kernels; `triton.py` beside this launches them.

All offsets are 64-bit. Nothing is accumulated with atomics: programs leave partial sums and `finish` adds them in a
fixed order, so the same input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(pointer, units, positions, unit_stride, reduce_stride, mask):
    offsets = units.to(tl.int64)[:, None] * unit_stride + positions.to(tl.int64)[None, :] * reduce_stride
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def taylor_partial(
    weight,
    grad,
    fisher,
    fine_out,
    signed_out,
    lines,
    reduce,
    group_size,
    blocks_per_group,
    length,
    weight_unit_stride,
    weight_reduce_stride,
    grad_unit_stride,
    grad_reduce_stride,
    fisher_unit_stride,
    fisher_reduce_stride,
    ORDER: tl.constexpr,
    FOLD: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sums of one block of lines (rows, or columns) over one piece of the reduction.

    The matrix is viewed [lines, reduce]. Without FOLD every line is a unit and a program writes BLOCK_U sums; with it
    a program covers up to BLOCK_U of the `group_size` lines of one unit and writes a single sum. Output is
    `[pieces, units]`, or the result itself when there is one piece.
    """
    block, piece = tl.program_id(0), tl.program_id(1)
    inside = tl.arange(0, BLOCK_U)
    if FOLD:
        unit = block // blocks_per_group
        part = block % blocks_per_group
        line = part * BLOCK_U + inside
        valid = line < group_size
        line = unit.to(tl.int64) * group_size + line
    else:
        line = block.to(tl.int64) * BLOCK_U + inside
        valid = line < lines
    begin = piece.to(tl.int64) * length
    end = tl.minimum(begin + length, reduce)
    fine = tl.zeros((BLOCK_U, BLOCK_R), dtype=tl.float32)
    signed = tl.zeros((BLOCK_U, BLOCK_R), dtype=tl.float32)
    for start in range(0, length, BLOCK_R):
        position = begin + start + tl.arange(0, BLOCK_R)
        mask = valid[:, None] & (position < end)[None, :]
        w = _load(weight, line, position, weight_unit_stride, weight_reduce_stride, mask)
        if ORDER == "first":
            t = _load(grad, line, position, grad_unit_stride, grad_reduce_stride, mask) * w
        else:
            f = _load(fisher, line, position, fisher_unit_stride, fisher_reduce_stride, mask)
            t = 0.5 * f * w * w
            if ORDER == "mixed":
                t = _load(grad, line, position, grad_unit_stride, grad_reduce_stride, mask) * w - t
        fine += tl.abs(t)
        signed += t
    fine_sum, signed_sum = tl.sum(fine, axis=1), tl.sum(signed, axis=1)
    if FOLD:
        units = lines // group_size
        slot = (part * tl.num_programs(1) + piece).to(tl.int64) * units + unit
        fine_total, signed_total = tl.sum(fine_sum, axis=0), tl.sum(signed_sum, axis=0)
        if ACCUMULATE:
            fine_total += tl.load(fine_out + slot)
            signed_total += tl.load(signed_out + slot)
        tl.store(fine_out + slot, fine_total)
        tl.store(signed_out + slot, signed_total)
    else:
        slots = piece.to(tl.int64) * lines + line
        if ACCUMULATE:
            fine_sum += tl.load(fine_out + slots, mask=valid, other=0.0)
            signed_sum += tl.load(signed_out + slots, mask=valid, other=0.0)
        tl.store(fine_out + slots, fine_sum, mask=valid)
        tl.store(signed_out + slots, signed_sum, mask=valid)


@triton.jit
def finish(
    partial, fine_out, signed_out, pieces, units, ACCUMULATE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr
):
    """Add partial sums `[2, pieces, units]` over their pieces, in a fixed order."""
    unit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    fine = tl.zeros((BLOCK_P, BLOCK), dtype=tl.float32)
    signed = tl.zeros((BLOCK_P, BLOCK), dtype=tl.float32)
    for start in range(0, pieces, BLOCK_P):
        piece = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (piece < pieces)[:, None] & (unit < units)[None, :]
        offsets = piece[:, None] * units + unit[None, :]
        fine += tl.load(partial + offsets, mask=mask, other=0.0)
        signed += tl.load(partial + pieces.to(tl.int64) * units + offsets, mask=mask, other=0.0)
    fine_sum, signed_sum = tl.sum(fine, axis=0), tl.sum(signed, axis=0)
    valid = unit < units
    if ACCUMULATE:
        fine_sum += tl.load(fine_out + unit, mask=valid, other=0.0)
        signed_sum += tl.load(signed_out + unit, mask=valid, other=0.0)
    tl.store(fine_out + unit, fine_sum, mask=valid)
    tl.store(signed_out + unit, signed_sum, mask=valid)


@triton.jit
def gather(
    weight,
    keep,
    out,
    rows,
    columns,
    row_stride,
    column_stride,
    AXIS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One tile of the packed result `[rows, columns]`; `keep` names source rows (AXIS 0) or columns (AXIS 1)."""
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    if AXIS == 0:
        source_row = tl.load(keep + row, mask=row < rows, other=0)
        source_column = column
    else:
        source_row = row
        source_column = tl.load(keep + column, mask=column < columns, other=0)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(weight + source_row[:, None] * row_stride + source_column[None, :] * column_stride, mask=mask)
    tl.store(out + row[:, None] * columns + column[None, :], value, mask=mask)


@triton.jit
def _log_floored(pointer, index, count, floor):
    x = tl.load(pointer + index, mask=index < count, other=1.0).to(tl.float64)
    return tl.log(tl.where(x < floor, floor, x))  # a comparison with NaN is false, so NaN passes


@triton.jit
def _moments(pointer, count, tiny, BLOCK: tl.constexpr):
    """`(floor, mean, standard deviation)` of the floored logarithms, in float64 and a fixed order."""
    top = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.load(pointer + index, mask=index < count, other=0.0).to(tl.float64))
    floor = tl.maximum(tl.max(top, axis=0) * 1e-12, tiny)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.where(index < count, _log_floored(pointer, index, count, floor), 0.0)
    mean = tl.sum(total, axis=0) / count
    square = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        difference = tl.where(index < count, _log_floored(pointer, index, count, floor) - mean, 0.0)
        square += difference * difference
    return floor, mean, tl.sqrt(tl.sum(square, axis=0) / count)


@triton.jit
def attention(fine, coarse, score_out, weight_out, count, temperature, tiny, BLOCK: tl.constexpr, SPREAD: tl.constexpr):
    """Standardise both estimates and blend them, in one program: the vectors are short."""
    fine_floor, fine_mean, fine_std = _moments(fine, count, tiny, BLOCK)
    coarse_floor, coarse_mean, coarse_std = _moments(coarse, count, tiny, BLOCK)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        zf = (_log_floored(fine, index, count, fine_floor) - fine_mean) / fine_std
        zc = (_log_floored(coarse, index, count, coarse_floor) - coarse_mean) / coarse_std
        zf = tl.where(fine_std <= SPREAD, 0.0, zf)
        zc = tl.where(coarse_std <= SPREAD, 0.0, zc)
        weight = 1.0 / (1.0 + tl.exp(-0.5 * (zf + zc) * (zf - zc) / temperature))
        tl.store(score_out + index, (weight * zf + (1.0 - weight) * zc).to(tl.float32), mask=index < count)
        tl.store(weight_out + index, weight.to(tl.float32), mask=index < count)
