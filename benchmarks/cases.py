"""What the benchmarks run, as data: shapes, dtypes, the fewest bytes each call has to move, and its products' FLOPs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Matrix:
    """A weight whose rows (`axis=0`) or columns (`axis=1`) are units."""

    rows: int
    columns: int
    axis: int

    def units_of(self, group_size: int) -> int:
        return (self.rows, self.columns)[self.axis] // group_size

    def named(self, dtypes: str, group_size: int = 1) -> str:
        size = f"/{group_size}" if group_size > 1 else ""
        return f"{self.rows}x{self.columns} {dtypes} {('rows', 'cols')[self.axis]}{size}"


@dataclass(frozen=True)
class TaylorCase(Matrix):
    """One call of `ops.taylor_importance`. `order` is "first" (weight, grad) or "mixed" (weight, grad, fisher)."""

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
        return f"{self.named(self.dtypes, self.group_size)} {self.order}"

    @property
    def units(self) -> int:
        return self.units_of(self.group_size)

    @property
    def bytes(self) -> int:
        """Each operand read once, two float32 vectors written."""
        gradients = 1 if self.order == "first" else 2
        operands = self.rows * self.columns * (self.dtype.itemsize + gradients * self.statistics_dtype.itemsize)
        return operands + 2 * self.units * 4


@dataclass(frozen=True)
class TaylorBatchCase:
    """One call of `ops.taylor_importance_batch`: the coupled matrices of some decoder layers, the layers all alike."""

    model: str
    matrices: tuple[tuple[int, int, int, int, int], ...]  # rows, columns, axis, group size, result; of one layer
    order: str
    layers: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        layers = f"{self.layers} layers" if self.layers > 1 else "layer"
        return f"{self.model} {layers} {SHORT[self.dtype]} {self.order}"

    @property
    def calls(self) -> list[TaylorCase]:
        """The same as separate calls."""
        one = [
            TaylorCase(rows, columns, axis, self.order, self.dtype, group_size=group_size)
            for rows, columns, axis, group_size, _ in self.matrices
        ]
        return one * self.layers

    @property
    def into(self) -> list[int]:
        results = 1 + max(result for *_, result in self.matrices)
        return [layer * results + result for layer in range(self.layers) for *_, result in self.matrices]

    @property
    def bytes(self) -> int:
        """Each operand read once, two float32 vectors written per result."""
        calls = self.calls
        operands = sum(call.bytes - 2 * call.units * 4 for call in calls)
        return operands + sum(
            2 * 4 * units for units in dict(zip(self.into, (c.units for c in calls), strict=True)).values()
        )


@dataclass(frozen=True)
class CompactCase(Matrix):
    """One call of `ops.compact`: a random `share` of the rows (`axis=0`) or columns (`axis=1`) survives.

    Columns are kept in pieces smaller than a DRAM sector, so that a column cut has to fetch nearly the whole matrix:
    its share of the copy bandwidth, over the bytes that survive, cannot reach 1.
    """

    dtype: torch.dtype = torch.bfloat16
    share: float = 0.75

    @property
    def name(self) -> str:
        return f"{self.named(SHORT[self.dtype])} keep {self.share:.0%}"

    @property
    def kept(self) -> int:
        return round(self.units_of(1) * self.share)

    @property
    def bytes(self) -> int:
        """The kept part read and written once, and the int64 indices read once."""
        shape = [self.rows, self.columns]
        shape[self.axis] = self.kept
        return 2 * math.prod(shape) * self.dtype.itemsize + 8 * self.kept


@dataclass(frozen=True)
class LinearCase(Matrix):
    """One call of `ops.linear_importance`: `samples` samples of `length` tokens through a `rows`×`columns` layer.

    `order` and `per_sample` are the op's: ("first", False), ("first", True), ("second", True) or ("all", True).
    `mapped` is handed over, as calibration does where it has it.
    """

    order: str
    per_sample: bool = True
    dtype: torch.dtype = torch.bfloat16
    samples: int = 10
    length: int = 128
    group_size: int = 1
    mapped: bool = False

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def name(self) -> str:
        order = self.order + ("" if self.per_sample else " mean") + (" mapped" if self.mapped else "")
        return f"{self.named(SHORT[self.dtype], self.group_size)} {self.samples}x{self.length} {order}"

    @property
    def bytes(self) -> int:
        """Output gradients, inputs, what is mapped and weight read once, the float32 results written. No weight
        gradient."""
        activations = self.rows + self.columns + (self.units_of(1) if self.mapped else 0)
        operands = self.dtype.itemsize * (self.tokens * activations + self.rows * self.columns)
        fine, coarse = (3 if self.order == "all" else 1), (self.samples if self.per_sample else 1)
        return operands + 4 * self.units_of(self.group_size) * (fine + coarse)

    @property
    def flops(self) -> int:
        """FLOPs of the weight-gradient product alone, a multiplication and an addition per token and weight; telling
        the samples apart does not add to it. The few operations per weight and sample of scoring are not counted."""
        return 2 * self.tokens * self.rows * self.columns


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

_LLAMA_7B = (  # heads of q, k, v rows and o columns; channels of gate, up rows and down columns
    *((4096, 4096, 0, 128, 0),) * 3,
    (4096, 4096, 1, 128, 0),
    *((11008, 4096, 0, 1, 1),) * 2,
    (4096, 11008, 1, 1, 1),
)
_SMOLLM2 = (  # 3 KV groups of 3 query heads of 64
    (576, 576, 0, 192, 0),
    *((192, 576, 0, 64, 0),) * 2,
    (576, 576, 1, 192, 0),
    *((1536, 576, 0, 1, 1),) * 2,
    (576, 1536, 1, 1, 1),
)
TAYLOR_BATCH_CUDA = (
    *(TaylorBatchCase("LLaMA-7B", _LLAMA_7B, order) for order in ORDERS),
    *(TaylorBatchCase("SmolLM2-135M", _SMOLLM2, order, layers=3) for order in ORDERS),
)
TAYLOR_BATCH_CPU = (TaylorBatchCase("SmolLM2-135M", _SMOLLM2, "first"),)

COMPACT_CUDA = tuple(CompactCase(*shape, axis) for shape in ((11008, 4096), (28672, 8192)) for axis in AXES)
COMPACT_CUDA_QUICK = tuple(CompactCase(11008, 4096, axis) for axis in AXES)
COMPACT_CPU = tuple(
    CompactCase(*shape, axis, dtype)
    for shape in (*_SMALL, (4096, 4096))
    for dtype in (torch.float32, torch.bfloat16)
    for axis in AXES
)
COMPACT_CPU_QUICK = tuple(CompactCase(*_SMALL[0], axis, torch.float32) for axis in AXES)

_MODES = (("first", False), ("first", True), ("all", True))


def _linear(shapes: tuple[tuple[int, int, int], ...], **options) -> tuple[LinearCase, ...]:
    return tuple(LinearCase(*shape, *mode, **options) for shape in shapes for mode in _MODES)


# (rows, columns, axis). Rows are the units of q, k, v, gate and up; columns those of o and down.
_LINEAR_7B = tuple((*shape, axis) for shape in ((4096, 4096), (11008, 4096), (4096, 11008)) for axis in AXES)
_LINEAR_70B = ((8192, 8192, 0), (8192, 8192, 1), (1024, 8192, 0), (28672, 8192, 0), (8192, 28672, 1))
_LINEAR_SMALL = ((1536, 576, 0), (576, 1536, 1))  # SmolLM2-135M: gate and up, down

_SAMPLES = ((4096, 4096, 0), (11008, 4096, 0), (4096, 11008, 1), (28672, 8192, 0))  # at more than ten samples
_NATURAL = ((4096, 4096, 0), (4096, 4096, 1), (11008, 4096, 0), (4096, 11008, 1), *_LINEAR_70B)

LINEAR_CUDA = (
    *_linear(_LINEAR_7B),
    *_linear(_LINEAR_70B),
    *(LinearCase(*shape, order, mapped=True) for shape in _NATURAL for order in ("first", "all")),
    *(LinearCase(*shape, "second") for shape in _NATURAL),
    *(
        LinearCase(*shape, order, samples=samples, mapped=order == "all")
        for samples in (128, 512)
        for shape in (_SAMPLES if samples == 128 else _SAMPLES[:3])
        for order in ("second", "all")
    ),
    LinearCase(4096, 4096, 0, "all", dtype=torch.float16),
    LinearCase(4096, 4096, 0, "all", dtype=torch.float32),
)
LINEAR_CUDA_QUICK = (
    *(LinearCase(*shape, order, mapped=order == "all") for shape in _SAMPLES[:3] for order in ("second", "all")),
    *(LinearCase(11008, 4096, 0, o, samples=n, mapped=o == "all") for n in (128, 512) for o in ("second", "all")),
    LinearCase(11008, 4096, 0, "first", mapped=True),
)
LINEAR_CPU = (
    *_linear(_LINEAR_SMALL, dtype=torch.float32),
    LinearCase(576, 576, 1, "all", dtype=torch.float32),  # o
    LinearCase(192, 576, 0, "all", dtype=torch.float32, group_size=64),  # k, v
    *_linear(_LINEAR_SMALL),
)
LINEAR_CPU_QUICK = _linear(_LINEAR_SMALL[:1], dtype=torch.float32, samples=2, length=64)
