"""Launches the Triton kernel of `taylor_importance_batch`: one launch, with tables of pointers and strides."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import kernels_triton_batch as kernels
from .calls import BatchCall, TaylorCall
from .devices import on
from .native import DTYPE_CODES
from .triton_tiles import LONGEST_CHAIN, TILE, power_of_two

_PROGRAMS = 2112  # sixteen on each of 132 multiprocessors; a constant, so that the bits depend on the call alone
_RESULT_FIELDS, _MEMBER_FIELDS = 6, 15


def _strides(tensor: Tensor | None, axis: int) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(axis), tensor.stride(1 - axis))


def _member(matrix: TaylorCall) -> list[int]:
    """A row of the table of matrices, as the kernel reads it."""
    operands, weight, axis = matrix.operands, matrix.weight, matrix.axis
    return [
        *(0 if x is None else x.data_ptr() for x in operands),
        *(stride for x in operands for stride in _strides(x, axis)),
        weight.shape[1 - axis],
        matrix.group_size,
        int(weight.stride(1 - axis) == 1),
        *(0 if x is None else DTYPE_CODES[x.dtype] for x in operands),
    ]


def _tile(members: list[list[int]], units: int) -> tuple[int, int]:
    """Returns `(BLOCK_U, BLOCK_R)`, the tile that is long along the matrices' contiguous dimension; where theirs
    differ, a tile in between."""
    across = [m for m in members if not m[11] and m[10] == 1]  # neighbouring units are contiguous
    block_r = 512 if not across else 16 if len(across) == len(members) else 64
    block_r = power_of_two(max(m[9] * m[10] for m in members), block_r)
    return power_of_two(units, max(1, min(TILE // block_r, 128))), block_r


def _flat(m: list[int], units: int, block_r: int) -> bool:
    """Whether in every operand a unit is one contiguous run of elements, or a tile's units are adjacent columns."""
    operands = [i for i in range(3) if m[i]]
    strides = {(m[3 + 2 * i], m[4 + 2 * i]) for i in operands}
    if any(m[i] % 16 for i in operands) or len(strides) > 1 or m[9] * m[10] % 16:
        return False
    if m[11]:
        return strides == {(m[9], 1)}
    return m[3] == 1 and m[4] % 16 == 0 and (units % 16 == 0 if m[10] == 1 else m[10] % block_r == 0 and block_r >= 16)


def _common(members: list[list[int]], field: int) -> int:
    codes = {m[field] for m in members}
    return codes.pop() if len(codes) == 1 else -1


def taylor_importance_batch(call: BatchCall, fine: list[Tensor], signed: list[Tensor], accumulate: bool) -> None:
    device = call.weights[0].device
    of_result, matrices = call.members, call.matrices
    members = [_member(matrices[i]) for listed in of_result for i in listed]
    block_u, block_r = _tile(members, max(f.numel() for f in fine))
    results: list[list[int]] = []
    blocks: list[int] = []
    first = 0
    for result, listed in enumerate(of_result):
        units = fine[result].numel()
        results.append([fine[result].data_ptr(), signed[result].data_ptr(), units, first, len(listed), len(blocks)])
        blocks += [result] * triton.cdiv(units, block_u)
        first += len(listed)
    if not blocks:
        return
    steps = max(triton.cdiv(m[9] * m[10], block_r) for m in members)
    split = max(1, min(steps, max(_PROGRAMS // len(blocks), triton.cdiv(steps, LONGEST_CHAIN))))
    codes = {name: _common(members, field) for name, field in (("WEIGHT", 12), ("GRAD", 13), ("FISHER", 14))}
    flat = all(code >= 0 for code in codes.values()) and all(
        _flat(m, fine[result].numel(), block_r) for m, result in zip(members, sorted(call.into), strict=True)
    )
    fields = [field for row in (*results, *members) for field in row] + blocks
    tables = torch.tensor(fields, dtype=torch.int64)
    if device.type == "cuda":
        tables = tables.pin_memory().to(device, non_blocking=True)
    counters = torch.zeros(len(blocks) if split > 1 else 1, dtype=torch.int32, device=device)
    shares = len(blocks) * split * 2 * block_u if split > 1 else 1
    with on(device):
        kernels.taylor_batch[(len(blocks) * split,)](
            tables,
            len(results) * _RESULT_FIELDS,
            len(results) * _RESULT_FIELDS + len(members) * _MEMBER_FIELDS,
            torch.empty(shares, dtype=torch.float32, device=device),
            counters,
            ORDER=call.order,
            **codes,
            FLAT=flat,
            WIDE=any(m[9] * m[10] + TILE >= 1 << 31 for m in members),
            ACCUMULATE=accumulate,
            SPLIT=split,
            BLOCK_U=block_u,
            BLOCK_R=block_r,
            BLOCK_P=power_of_two(split, 16),
            RESULT_FIELDS=_RESULT_FIELDS,
            MEMBER_FIELDS=_MEMBER_FIELDS,
            num_warps=4,
        )
