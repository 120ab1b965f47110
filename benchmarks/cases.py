"""What the benchmarks run, as data: shapes, dtypes, and the fewest bytes each call has to move."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class TaylorCase:
    """One call of `ops.taylor_importance`. `order` is "first" (weight, grad) or "mixed" (weight, grad, fisher)."""

    rows: int
    columns: int
    axis: int
    order: str
    dtype: torch.dtype = torch.bfloat16
    statistics: torch.dtype | None = None  # of grad and fisher; None: the weight's
    group_size: int = 1

    @property
    def statistics_dtype(self) -> torch.dtype:
        return self.statistics or self.dtype

    @property
    def dtypes(self) -> str:
        return SHORT[self.dtype] + (f"+{SHORT[self.statistics]}" if self.statistics else "")

    @property
    def name(self) -> str:
        units = ("rows", "cols")[self.axis] + (f"/{self.group_size}" if self.group_size > 1 else "")
        return f"{self.rows}x{self.columns} {self.dtypes} {units} {self.order}"

    @property
    def units(self) -> int:
        return (self.rows, self.columns)[self.axis] // self.group_size

    @property
    def bytes(self) -> int:
        """Each operand read once, two float32 vectors written."""
        gradients = 1 if self.order == "first" else 2
        operands = self.rows * self.columns * (self.dtype.itemsize + gradients * self.statistics_dtype.itemsize)
        return operands + 2 * self.units * 4


@dataclass(frozen=True)
class CompactCase:
    """One call of `ops.compact`: a random `share` of the rows (`axis=0`) or columns (`axis=1`) survives.

    Columns are kept in pieces smaller than a DRAM sector, so that a column cut has to fetch nearly the whole matrix:
    its share of the copy bandwidth, over the bytes that survive, cannot reach 1.
    """

    rows: int
    columns: int
    axis: int
    dtype: torch.dtype = torch.bfloat16
    share: float = 0.75

    @property
    def dtypes(self) -> str:
        return SHORT[self.dtype]

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns} {self.dtypes} {('rows', 'cols')[self.axis]} keep {self.share:.0%}"

    @property
    def kept(self) -> int:
        return round((self.rows, self.columns)[self.axis] * self.share)

    @property
    def bytes(self) -> int:
        """The kept part read and written once, and the int64 indices read once."""
        shape = [self.rows, self.columns]
        shape[self.axis] = self.kept
        return 2 * math.prod(shape) * self.dtype.itemsize + 8 * self.kept


AXES = (0, 1)
ORDERS = ("first", "mixed")


def _taylor(shapes: tuple[tuple[int, int], ...], **options) -> tuple[TaylorCase, ...]:
    return tuple(TaylorCase(*shape, axis, order, **options) for shape in shapes for order in ORDERS for axis in AXES)


_SQUARE = ((4096, 4096),)
_MLP = ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192), (8192, 28672))  # LLaMA 7B and 70B
_SMALL = ((1536, 576),)  # SmolLM2-135M

TAYLOR_CUDA = (
    *_taylor(_MLP),
    *_taylor(_SQUARE, group_size=128),  # heads
    *_taylor(_SQUARE, statistics=torch.float32),  # what calibration passes
    *_taylor(_SQUARE, dtype=torch.float32),
    *_taylor(_SQUARE, dtype=torch.float16),
)
TAYLOR_CUDA_QUICK = _taylor(_SQUARE)
TAYLOR_CPU = (
    *_taylor(_SMALL, dtype=torch.float32),
    *_taylor(_SQUARE, dtype=torch.float32),
    *_taylor(_SQUARE),
    *_taylor(_SQUARE, dtype=torch.float16),
    *_taylor(_SQUARE, statistics=torch.float32),
)
TAYLOR_CPU_QUICK = (*_taylor(_SMALL, dtype=torch.float32), *_taylor(_SMALL))

COMPACT_CUDA = tuple(CompactCase(*shape, axis) for shape in ((11008, 4096), (28672, 8192)) for axis in AXES)
COMPACT_CUDA_QUICK = tuple(CompactCase(11008, 4096, axis) for axis in AXES)
COMPACT_CPU = tuple(
    CompactCase(*shape, axis, dtype)
    for shape in (*_SMALL, (4096, 4096))
    for dtype in (torch.float32, torch.bfloat16)
    for axis in AXES
)
COMPACT_CPU_QUICK = tuple(CompactCase(*_SMALL[0], axis, torch.float32) for axis in AXES)
