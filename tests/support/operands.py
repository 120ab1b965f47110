"""Random operands in every layout, and the backends with the device each takes."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hywia_kernels.ops import availability
from hywia_kernels.ops.calls import TaylorCall
from hywia_kernels.ops.checks import DTYPES, ORDERS
from hywia_kernels.ops.registry import implementation

LAYOUTS = ("contiguous", "transposed", "stepped", "padded", "one-row", "one-column", "one-element")
GUARD = 8


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def need(backend: str, op: str) -> str:
    """Skip, with the reason, unless `backend` is on and implements `op`; the device it takes."""
    state = {a.name: a for a in availability()}[backend]
    if not state.on:
        pytest.skip(f"{backend}: {state.reason}")
    if op not in state.ops:
        pytest.skip(f"{backend} does not implement {op}")
    on_gpu = backend == "cuda" or (backend == "triton" and not interpreted())
    return "cuda" if on_gpu else "cpu"


def run_examples(backend: str, strategy, check) -> None:
    """Hypothesis over `check(value)`, the same examples every time, fewer where a call is slow."""
    count = 30 if backend == "triton" else 200  # the interpreter, or a compilation for nearly every example
    settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )(given(strategy)(check))()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lay(values: Tensor, layout: str) -> Tensor:
    """`values` as a view of the given layout; whatever lies around the view in memory is NaN."""
    rows, columns = values.shape
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "stepped":
        around = values.new_full((2 * rows + 1, 3 * columns + 2), float("nan"))
        view = around[1 : 2 * rows + 1 : 2, 2 : 3 * columns + 2 : 3]
    elif layout == "padded":
        around = values.new_full((rows + 2, columns + 5), float("nan"))
        view = around[1 : rows + 1, 3 : columns + 3]
    elif layout == "one-row":
        return values[:1].clone().expand(rows, columns)
    elif layout == "one-column":
        return values[:, :1].clone().expand(rows, columns)
    elif layout == "one-element":
        return values[:1, :1].clone().expand(rows, columns)
    else:
        return values.contiguous()
    return view.copy_(values)


def possible(layout: str, shape: tuple[int, int]) -> bool:
    """A broadcast view needs the entry it repeats."""
    return layout not in ("one-row", "one-column", "one-element") or 0 not in shape


def matrix(shape: tuple[int, int], dtype: torch.dtype, layout: str, seed: int, device: str = "cpu") -> Tensor:
    values = torch.randn(shape, generator=generator(seed)).to(dtype)
    return lay(values.to(device), layout if possible(layout, shape) else "contiguous")


def whole_numbers(shape: tuple[int, int], dtype: torch.dtype, seed: int, device: str = "cpu") -> Tensor:
    """Small integers: every product and sum of them is exact in float32, in any order."""
    return torch.randint(-4, 5, shape, generator=generator(seed)).to(dtype).to(device)


@dataclass(frozen=True)
class Operand:
    dtype: torch.dtype
    layout: str


@dataclass(frozen=True)
class Case:
    """One call of `taylor_importance`; `build` makes its operands."""

    shape: tuple[int, int]
    axis: int
    order: str
    group_size: int
    weight: Operand
    grad: Operand
    fisher: Operand
    seed: int

    def build(self, device: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        made = [
            matrix(self.shape, x.dtype, x.layout, self.seed + i, device)
            for i, x in enumerate((self.weight, self.grad, self.fisher))
        ]
        return (made[0], None if self.order == "second" else made[1], None if self.order == "first" else made[2])

    @property
    def units(self) -> int:
        return self.shape[self.axis] // self.group_size


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0] if n else [1, 2, 5]  # anything divides zero


SIZES = st.one_of(st.sampled_from((0, 1, 2, 3, 7, 16, 31, 32, 33, 61, 64, 67)), st.integers(0, 70))


MIXES = tuple(itertools.product(DTYPES, repeat=3))
NARROW = tuple((w, g, f) for w, g, f in MIXES if g in (w, torch.float32) and f in (g, torch.float32))


@st.composite
def cases(draw, narrow: bool = False) -> Case:
    """Any call; with `narrow`, gradient and Fisher information only in the weight's dtype or float32 (see cuda.py)."""
    shape = (draw(SIZES), draw(SIZES))
    axis = draw(st.sampled_from((0, 1)))
    weight, grad, fisher = draw(st.sampled_from(NARROW if narrow else MIXES))
    layout = st.sampled_from(LAYOUTS)
    return Case(
        shape=shape,
        axis=axis,
        order=draw(st.sampled_from(ORDERS)),
        group_size=draw(st.sampled_from(divisors(shape[axis]))),
        weight=Operand(weight, draw(layout)),
        grad=Operand(grad, draw(layout)),
        fisher=Operand(fisher, draw(layout)),
        seed=draw(st.integers(0, 1 << 20)),
    )


def guarded(length: int, device: str, value: float = float("nan")) -> tuple[Tensor, Tensor]:
    """A float32 vector of `value` inside NaN, and the whole, for `untouched` to look at."""
    whole = torch.full((length + 2 * GUARD,), float("nan"), device=device)
    inner = whole[GUARD : GUARD + length]
    inner.fill_(value)
    return inner, whole


def untouched(whole: Tensor) -> bool:
    """Nothing was written beside a `guarded` vector."""
    return bool(whole[:GUARD].isnan().all()) and bool(whole[-GUARD:].isnan().all())


def raw_taylor(backend, weight, grad, fisher, axis, order, group_size) -> tuple[Tensor, Tensor]:
    """The backend's own function, on outputs full of NaN."""
    run = implementation("taylor_importance", backend, weight, grad, fisher)
    units = weight.shape[axis] // group_size
    (fine, fine_whole), (signed, signed_whole) = (guarded(units, str(weight.device)) for _ in range(2))
    run(TaylorCall(weight, grad, fisher, axis, order, group_size), fine, signed, False)
    assert untouched(fine_whole)
    assert untouched(signed_whole)
    return fine, signed


def raw_fusion(backend, fine, coarse, temperature) -> tuple[Tensor, Tensor]:
    run = implementation("attention_fusion", backend, fine, coarse)
    (score, score_whole), (weight, weight_whole) = (guarded(fine.numel(), str(fine.device)) for _ in range(2))
    run(fine, coarse, temperature, score, weight)
    assert untouched(score_whole)
    assert untouched(weight_whole)
    return score, weight


def bits(tensor: Tensor) -> Tensor:
    """For comparisons in which NaN equals NaN and -0 is not 0."""
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)
