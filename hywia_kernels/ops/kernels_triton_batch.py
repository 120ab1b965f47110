"""The Triton kernel of `taylor_importance_batch`; `triton_batch.py` beside this fills its tables and launches it.

All offsets are 64-bit. The only atomic counts programs: the last one to finish a block of units adds what all of them
left, in a fixed order, so the same input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_as(address, code, offsets, mask, COMMON: tl.constexpr):
    """A tile of an operand as float32. `code` as in `native.DTYPE_CODES`; COMMON is the code of all matrices, or -1."""
    value = tl.zeros(offsets.shape, dtype=tl.float32)
    if COMMON == 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0)
    elif COMMON == 1:
        value = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    elif COMMON == 2:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    elif code == 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0)
    elif code == 1:
        value = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _terms(
    weight,
    grad,
    fisher,
    weight_code,
    grad_code,
    fisher_code,
    weight_at,
    grad_at,
    fisher_at,
    mask,
    ORDER: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    FISHER: tl.constexpr,
):
    w = _load_as(weight, weight_code, weight_at, mask, WEIGHT)
    if ORDER == "first":
        t = _load_as(grad, grad_code, grad_at, mask, GRAD) * w
    else:
        t = 0.5 * _load_as(fisher, fisher_code, fisher_at, mask, FISHER) * w * w
        if ORDER == "mixed":
            t = _load_as(grad, grad_code, grad_at, mask, GRAD) * w - t
    return t


@triton.jit
def taylor_batch(
    tables,
    members_at,
    blocks_at,
    partial,
    counters,
    ORDER: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    FISHER: tl.constexpr,
    WIDE: tl.constexpr,
    FLAT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    RESULT_FIELDS: tl.constexpr,
    MEMBER_FIELDS: tl.constexpr,
):
    """One of SPLIT shares of what counts towards BLOCK_U units of a result, over all its matrices.

    `tables` (int64) holds the results, from `members_at` the matrices, from `blocks_at` each block's result. The
    `group_size * reduce` elements of a unit are walked in the order in which they lie. Partial sums are
    `[blocks, SPLIT, 2, BLOCK_U]`. WEIGHT, GRAD and FISHER: see `_load_as`. WIDE: units of 2^31 elements or more.
    FLAT: every matrix is as `triton_batch._flat` says, and of the common dtypes.
    """
    block, piece = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    result = tables + tl.load(tables + blocks_at + block) * RESULT_FIELDS
    fine_out = tl.load(result).to(tl.pointer_type(tl.float32))
    signed_out = tl.load(result + 1).to(tl.pointer_type(tl.float32))
    units = tl.load(result + 2)
    member = tables + members_at + tl.load(result + 3) * MEMBER_FIELDS
    unit = (block - tl.load(result + 5)) * BLOCK_U + tl.arange(0, BLOCK_U)
    valid = unit < units
    fine_sum = tl.zeros((BLOCK_U,), dtype=tl.float32)
    signed_sum = tl.zeros((BLOCK_U,), dtype=tl.float32)
    for _ in range(tl.load(result + 4)):
        reduce = tl.load(member + 9)
        group_size = tl.load(member + 10)
        positions_first = tl.load(member + 11)
        fast = tl.where(positions_first != 0, reduce, group_size)  # length of what lies together
        total = reduce * group_size
        span = tl.cdiv(tl.cdiv(total, SPLIT), BLOCK_R) * BLOCK_R
        begin = piece * span
        end = tl.minimum(begin + span, total)
        weight, grad, fisher = tl.load(member), tl.load(member + 1), tl.load(member + 2)
        weight_line, weight_position = tl.load(member + 3), tl.load(member + 4)
        grad_line, grad_position = tl.load(member + 5), tl.load(member + 6)
        fisher_line, fisher_position = tl.load(member + 7), tl.load(member + 8)
        weight_code, grad_code, fisher_code = tl.load(member + 12), tl.load(member + 13), tl.load(member + 14)
        fine = tl.zeros((BLOCK_U, BLOCK_R), dtype=tl.float32)
        signed = tl.zeros((BLOCK_U, BLOCK_R), dtype=tl.float32)
        if FLAT:
            # Said once more in words that the compiler sees: 16-byte loads. Rows are one run of elements per unit,
            # columns lie side by side.
            weight, grad, fisher = tl.multiple_of(weight, 16), tl.multiple_of(grad, 16), tl.multiple_of(fisher, 16)
            end = tl.multiple_of(end, 16)
            # A hint holds for the value wherever it is used, masks among them. What is a multiple for some of the
            # matrices only is rounded down to one instead, which the compiler sees as well.
            run = tl.multiple_of(total, 16)
            step, across, some = weight_position // 16 * 16, group_size // 16 * 16, units // 16 * 16
            if positions_first != 0:
                for start in range(begin, end, BLOCK_R):
                    element = start + tl.arange(0, BLOCK_R)
                    mask = (unit < units)[:, None] & (element < end)[None, :]
                    at = (unit * run)[:, None] + element[None, :]
                    t = _terms(weight, grad, fisher, 0, 0, 0, at, at, at, mask, ORDER, WEIGHT, GRAD, FISHER)
                    fine += tl.abs(t)
                    signed += t
            elif group_size != 1:
                # A tile's elements lie in one row: BLOCK_R divides the group.
                for start in range(begin, end, BLOCK_R):
                    slow = start // across
                    base = tl.multiple_of(start - slow * across + slow * step, 16)
                    mask = (unit < units)[:, None] & (start + tl.arange(0, BLOCK_R) < end)[None, :]
                    at = (unit * across)[:, None] + (base + tl.arange(0, BLOCK_R))[None, :]
                    t = _terms(weight, grad, fisher, 0, 0, 0, at, at, at, mask, ORDER, WEIGHT, GRAD, FISHER)
                    fine += tl.abs(t)
                    signed += t
            else:
                for start in range(begin, end, BLOCK_R):
                    element = start + tl.arange(0, BLOCK_R)
                    mask = (unit < some)[:, None] & (element < end)[None, :]
                    at = unit[:, None] + (element * step)[None, :]
                    t = _terms(weight, grad, fisher, 0, 0, 0, at, at, at, mask, ORDER, WEIGHT, GRAD, FISHER)
                    fine += tl.abs(t)
                    signed += t
        else:
            for start in range(begin, end, BLOCK_R):
                element = start + tl.arange(0, BLOCK_R)
                # A 64-bit division costs more than the loads.
                slow = element // fast if WIDE else (element.to(tl.int32) // fast.to(tl.int32)).to(tl.int64)
                position = tl.where(positions_first != 0, element - slow * fast, slow)
                inside = tl.where(positions_first != 0, slow, element - slow * fast)
                mask = valid[:, None] & (element < end)[None, :]
                line = unit * group_size
                t = _terms(
                    weight,
                    grad,
                    fisher,
                    weight_code,
                    grad_code,
                    fisher_code,
                    (line * weight_line)[:, None] + (inside * weight_line + position * weight_position)[None, :],
                    (line * grad_line)[:, None] + (inside * grad_line + position * grad_position)[None, :],
                    (line * fisher_line)[:, None] + (inside * fisher_line + position * fisher_position)[None, :],
                    mask,
                    ORDER,
                    WEIGHT,
                    GRAD,
                    FISHER,
                )
                fine += tl.abs(t)
                signed += t
        fine_sum += tl.sum(fine, axis=1)
        signed_sum += tl.sum(signed, axis=1)
        member += MEMBER_FIELDS

    last = True
    if SPLIT > 1:
        lane = tl.arange(0, BLOCK_U)
        shares = partial + block.to(tl.int64) * SPLIT * 2 * BLOCK_U
        mine = shares + piece * 2 * BLOCK_U
        tl.store(mine + lane, fine_sum)
        tl.store(mine + BLOCK_U + lane, signed_sum)
        tl.debug_barrier()  # all threads have written before one of them says so
        last = tl.atomic_add(counters + block, 1, sem="acq_rel") == SPLIT - 1
        if last:
            tl.debug_barrier()
            fine_shares = tl.zeros((BLOCK_P, BLOCK_U), dtype=tl.float32)
            signed_shares = tl.zeros((BLOCK_P, BLOCK_U), dtype=tl.float32)
            for first in range(0, SPLIT, BLOCK_P):
                share = first + tl.arange(0, BLOCK_P)
                where = shares + share[:, None] * 2 * BLOCK_U + lane[None, :]
                some = (share < SPLIT)[:, None]
                fine_shares += tl.load(where, mask=some, other=0.0, cache_modifier=".cg")
                signed_shares += tl.load(where + BLOCK_U, mask=some, other=0.0, cache_modifier=".cg")
            fine_sum = tl.sum(fine_shares, axis=0)
            signed_sum = tl.sum(signed_shares, axis=0)
    if last:
        if ACCUMULATE:
            fine_sum += tl.load(fine_out + unit, mask=valid, other=0.0)
            signed_sum += tl.load(signed_out + unit, mask=valid, other=0.0)
        tl.store(fine_out + unit, fine_sum, mask=valid)
        tl.store(signed_out + unit, signed_sum, mask=valid)
