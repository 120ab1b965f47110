"""The Triton kernels of `linear_importance`; `triton_linear.py` beside this launches them.

One program makes the weight gradient of one tile, [BLOCK_U lines of units, BLOCK_R of what is summed], sample after
sample, in tensor-core accumulators. It keeps the sum over samples and the sum of squares in registers, multiplies by
the tile of the weight and leaves one number per line (and per sample): no gradient reaches memory. `finish` adds what
the tiles left, in a fixed order. The units are always the rows of the tile, whichever side of the weight they lie on:
a row of an accumulator lies in four lanes of a warp, so summing it takes two shuffles.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(tile, u_blocks, r_blocks, GROUP: tl.constexpr):
    """Tile number to `(u, r)`: GROUP blocks of units side by side, so that what runs at one time shares operands."""
    band = tile // (GROUP * r_blocks)
    within = tile - band * GROUP * r_blocks
    height = tl.minimum(u_blocks - band * GROUP, GROUP)
    return band * GROUP + within % height, within // height


@triton.jit
def _number(u, r, u_blocks, r_blocks, GROUP: tl.constexpr):
    """The inverse of `_place`."""
    band = u // GROUP
    height = tl.minimum(u_blocks - band * GROUP, GROUP)
    return band * GROUP * r_blocks + r * height + u - band * GROUP


@triton.jit
def _tokens(
    operand,
    start,
    end,
    first,
    size,
    token_stride,
    line_stride,
    DESCRIPTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`[BLOCK_K, BLOCK]` of one operand, zero outside the tokens `start … end` and the lines below `size`."""
    if DESCRIPTOR:
        block = operand.load([start, first])
    else:
        token = start + tl.arange(0, BLOCK_K)
        line = first + tl.arange(0, BLOCK)
        mask = (line < size)[None, :]
        if not WHOLE:
            mask = mask & (token < end)[:, None]
        offsets = token.to(tl.int64)[:, None] * token_stride + line.to(tl.int64)[None, :] * line_stride
        block = tl.load(operand + offsets, mask=mask, other=0.0)
    return block


@triton.jit
def _weights(
    weight,
    line,
    position,
    lines,
    reduce,
    line_stride,
    reduce_stride,
    DESCRIPTOR: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`[BLOCK_U, BLOCK_R]` of the weight from `[line, position]` on; a descriptor is FLIPped when units are columns.

    What a descriptor brings stays in shared memory until it is used, and takes no registers meanwhile.
    """
    if DESCRIPTOR:
        w = tl.trans(weight.load([position, line])) if FLIP else weight.load([line, position])
    else:
        u = (line + tl.arange(0, BLOCK_U)).to(tl.int64)
        r = (position + tl.arange(0, BLOCK_R)).to(tl.int64)
        offsets = u[:, None] * line_stride + r[None, :] * reduce_stride
        w = tl.load(weight + offsets, mask=(u < lines)[:, None] & (r < reduce)[None, :], other=0.0)
    return w


# Sizes that no address depends on: one compilation serves all.
_COUNTS = ("tokens", "steps", "u_blocks", "r_blocks", "first_tile", "last_tile")


@triton.jit(do_not_specialize=_COUNTS)
def linear_total(
    a,
    b,
    weight,
    partial,
    lines,
    reduce,
    tokens,
    steps,
    u_blocks,
    r_blocks,
    first_tile,
    last_tile,
    scale,
    inverse_samples,
    a_token_stride,
    a_line_stride,
    b_token_stride,
    b_line_stride,
    weight_line_stride,
    weight_reduce_stride,
    WHOLE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WEIGHT_DESCRIPTOR: tl.constexpr,
    FLIP: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Order "first" without samples: tiles `first_tile … last_tile`, every `num_programs`-th of them, two rows each.

    `partial` is [tiles, 2, BLOCK_U]: magnitudes, then signed sums. One loop runs over the tokens (in `steps`) of all
    the tiles of a program, so that the operands of the next tile are on their way while the last one is summed.
    """
    inside = tl.arange(0, BLOCK_U)
    tile = first_tile + tl.program_id(0)
    tiles = tl.cdiv(last_tile - tile, tl.num_programs(0))
    u, r = _place(tile, u_blocks, r_blocks, GROUP)
    step = 0
    accumulator = tl.zeros((BLOCK_U, BLOCK_R), dtype=tl.float32)
    for _ in tl.range(0, tiles * steps, num_stages=STAGES):
        start, line, position = step * BLOCK_K, u * BLOCK_U, r * BLOCK_R
        x = _tokens(a, start, tokens, line, lines, a_token_stride, a_line_stride, DESCRIPTOR, WHOLE, BLOCK_U, BLOCK_K)
        y = _tokens(
            b, start, tokens, position, reduce, b_token_stride, b_line_stride, DESCRIPTOR, WHOLE, BLOCK_R, BLOCK_K
        )
        accumulator = tl.dot(tl.trans(x), y, accumulator, input_precision=PRECISION)
        step += 1
        if step == steps:
            w = _weights(
                weight,
                line,
                position,
                lines,
                reduce,
                weight_line_stride,
                weight_reduce_stride,
                WEIGHT_DESCRIPTOR,
                FLIP,
                BLOCK_U,
                BLOCK_R,
            )
            t = accumulator * (w.to(tl.float32) * (scale * inverse_samples))
            out = partial + (tile - first_tile).to(tl.int64) * 2 * BLOCK_U + inside
            tl.store(out, tl.sum(tl.abs(t), axis=1))
            tl.store(out + BLOCK_U, tl.sum(t, axis=1))
            accumulator = tl.zeros((BLOCK_U, BLOCK_R), dtype=tl.float32)
        # What the next loads need is kept apart from the branch, whose sums come much later.
        tile = tl.where(step == steps, tile + tl.num_programs(0), tile)
        u, r = _place(tile, u_blocks, r_blocks, GROUP)
        step = tl.where(step == steps, 0, step)


@triton.jit(do_not_specialize=(*_COUNTS, "samples", "length"))
def linear_samples(
    a,
    b,
    weight,
    partial,
    offsets,
    lines,
    reduce,
    tokens,
    samples,
    length,
    steps,
    u_blocks,
    r_blocks,
    first_tile,
    last_tile,
    scale,
    inverse_samples,
    a_token_stride,
    a_line_stride,
    b_token_stride,
    b_line_stride,
    weight_line_stride,
    weight_reduce_stride,
    TOTAL: tl.constexpr,
    SQUARE: tl.constexpr,
    FINE: tl.constexpr,
    COARSE: tl.constexpr,
    RAGGED: tl.constexpr,
    WHOLE: tl.constexpr,
    ONE_STEP: tl.constexpr,
    SEGMENT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WEIGHT_DESCRIPTOR: tl.constexpr,
    FLIP: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile a program, `first_tile …`, sample after sample; `partial` is [tiles, rows, BLOCK_U].

    `a` is [tokens, lines] and `b` [tokens, reduce]: pointers, or (DESCRIPTOR) tensor descriptors of whole blocks.
    Samples are `length` tokens each (the last may be shorter), or (RAGGED) lie between `offsets`; WHOLE says that each
    is a multiple of BLOCK_K, ONE_STEP that each takes one step. The loop runs over all samples, so that the loads of
    the next one are on their way while the last one is summed.

    Rows of the result are the orders of FINE ("first", "second", "mixed"; "all" is these three), then the signed sums:
    one per sample (COARSE "samples"), or that of the mean ("mean"). TOTAL and SQUARE say which running sums that
    takes. After SEGMENT steps (0: never) the tensor cores' accumulator, which truncates, is added to another.
    """
    FINE_ROWS: tl.constexpr = 3 if FINE == "all" else 1
    rows = FINE_ROWS + (samples if COARSE == "samples" else 1)
    tile = first_tile + tl.program_id(0)
    u, r = _place(tile, u_blocks, r_blocks, GROUP)
    line, position = u * BLOCK_U, r * BLOCK_R
    out = partial + tl.program_id(0).to(tl.int64) * rows * BLOCK_U + tl.arange(0, BLOCK_U)
    accumulator = tl.zeros((BLOCK_U, BLOCK_R), dtype=tl.float32)
    w = _weights(
        weight,
        line,
        position,
        lines,
        reduce,
        weight_line_stride,
        weight_reduce_stride,
        WEIGHT_DESCRIPTOR,
        FLIP,
        BLOCK_U,
        BLOCK_R,
    )
    if SEGMENT:
        gradient = tl.zeros((BLOCK_U, BLOCK_R), dtype=tl.float32)
    if TOTAL:
        total = tl.zeros((BLOCK_U, BLOCK_R), dtype=tl.float32)
    if SQUARE:
        square = tl.zeros((BLOCK_U, BLOCK_R), dtype=tl.float32)
    sample, start, segment = 0, 0, 0
    end = length
    if RAGGED:
        end = tl.load(offsets + 1)
    for _ in tl.range(0, steps, num_stages=STAGES):
        x = _tokens(a, start, end, line, lines, a_token_stride, a_line_stride, DESCRIPTOR, WHOLE, BLOCK_U, BLOCK_K)
        y = _tokens(b, start, end, position, reduce, b_token_stride, b_line_stride, DESCRIPTOR, WHOLE, BLOCK_R, BLOCK_K)
        if ONE_STEP:
            accumulator = tl.dot(tl.trans(x), y, input_precision=PRECISION)
        else:
            accumulator = tl.dot(tl.trans(x), y, accumulator, input_precision=PRECISION)
        last = start + BLOCK_K >= end
        if SEGMENT:
            segment += 1
            full = last | (segment == SEGMENT)
            segment = tl.where(full, 0, segment)
            if full:
                gradient += accumulator
                accumulator = tl.zeros((BLOCK_U, BLOCK_R), dtype=tl.float32)
        if ONE_STEP or last:
            if SEGMENT:
                g = gradient
                gradient = tl.zeros((BLOCK_U, BLOCK_R), dtype=tl.float32)
            else:
                g = accumulator
                if not ONE_STEP:
                    accumulator = tl.zeros((BLOCK_U, BLOCK_R), dtype=tl.float32)
            if TOTAL:
                total += g
            if SQUARE:
                square += g * g
            if COARSE == "samples":
                tl.store(out + (FINE_ROWS + sample) * BLOCK_U, tl.sum(g * w.to(tl.float32), axis=1) * scale)
        # What the next loads need is kept apart from the branches, whose sums come much later.
        sample = tl.where(last, sample + 1, sample)
        start = tl.where(last, end, start + BLOCK_K)
        if RAGGED:
            end = tl.load(offsets + tl.minimum(sample + 1, samples))
        else:
            end = tl.where(last, tl.minimum(end + length, tokens), end)
    scaled = w.to(tl.float32) * scale
    if TOTAL:
        first = total * (scaled * inverse_samples)
    if SQUARE:
        second = 0.5 * (square * inverse_samples) * scaled * scaled
    if FINE == "first" or FINE == "all":
        tl.store(out, tl.sum(tl.abs(first), axis=1))
    if FINE == "second":
        tl.store(out, tl.sum(second, axis=1))
    if FINE == "mixed":
        tl.store(out, tl.sum(tl.abs(first - second), axis=1))
    if FINE == "all":
        tl.store(out + BLOCK_U, tl.sum(second, axis=1))
        tl.store(out + 2 * BLOCK_U, tl.sum(tl.abs(first - second), axis=1))
    if COARSE == "mean":
        tl.store(out + FINE_ROWS * BLOCK_U, tl.sum(first, axis=1))


@triton.jit(
    do_not_specialize=(
        "fine_rows",
        "rows",
        "lines",
        "group_size",
        "first_unit",
        "unit_blocks",
        "units",
        "u_blocks",
        "r_blocks",
        "first_tile",
        "last_tile",
    )
)
def linear_finish(
    partial,
    fine,
    coarse,
    fine_rows,
    rows,
    lines,
    group_size,
    first_unit,
    unit_blocks,
    units,
    u_blocks,
    r_blocks,
    first_tile,
    last_tile,
    FOLD: tl.constexpr,
    ADD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add `partial[tile, row, BLOCK_U]` over the tiles `first_tile … last_tile` of each unit, in a fixed order.

    A program takes one row and BLOCK units, or (FOLD) one unit of `group_size` lines. Tiles outside the range count as
    zero. Rows below `fine_rows` go to `fine`, the others to `coarse`, [row, units] each.
    """
    row = tl.program_id(0) // unit_blocks
    unit = first_unit + tl.program_id(0) % unit_blocks
    inside = tl.arange(0, BLOCK)
    length = BLOCK
    begin = unit * BLOCK
    end = lines
    if FOLD:
        length = group_size
        begin = unit * group_size
        end = begin + group_size
    sums = tl.zeros((BLOCK_R, BLOCK), dtype=tl.float32)
    for part in range(0, length, BLOCK):
        line = begin + part + inside
        for step in range(0, r_blocks, BLOCK_R):
            r = step + tl.arange(0, BLOCK_R)
            tile = _number((line // BLOCK_U)[None, :], r[:, None], u_blocks, r_blocks, GROUP)
            mask = (line < end)[None, :] & (r < r_blocks)[:, None] & (tile >= first_tile) & (tile < last_tile)
            offsets = ((tile - first_tile).to(tl.int64) * rows + row) * BLOCK_U + (line % BLOCK_U)[None, :]
            sums += tl.load(partial + offsets, mask=mask, other=0.0)
    value = tl.sum(sums, axis=0)
    out = fine + row.to(tl.int64) * units
    if row >= fine_rows:
        out = coarse + (row - fine_rows).to(tl.int64) * units
    if FOLD:
        folded = tl.sum(value, axis=0)
        if ADD:
            folded += tl.load(out + unit)
        tl.store(out + unit, folded)
    else:
        mask = begin + inside < units
        if ADD:
            value += tl.load(out + begin + inside, mask=mask, other=0.0)
        tl.store(out + begin + inside, value, mask=mask)
