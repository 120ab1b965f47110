"""`ops.taylor_importance` against eager torch and torch.compile: `python -m benchmarks.bench_taylor --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from hywia_kernels import ops
from hywia_kernels.ops.reference import taylor_importance_fp64

from . import cases
from .cases import TaylorCase
from .harness import COMPILE, EAGER, Candidate, Job, backend_candidates, compiled, main, poison

# Of a unit's fine or signed sum, relative to its fine sum. An average term of the longest sum here, 28672 of them, is
# 3.5e-5 of it.
TOLERANCE = 2e-5
CHUNK = 2**24  # elements taken to float64 at a time


def torch_taylor(weight: Tensor, grad: Tensor, fisher: Tensor | None, axis: int, group_size: int):
    """The same two sums in plain torch, with float32 arithmetic."""
    w = weight.float()
    t = grad.float() * w
    if fisher is not None:
        t = t - 0.5 * fisher.float() * w * w
    fine, signed = t.abs().sum(1 - axis), t.sum(1 - axis)
    if group_size > 1:
        fine, signed = fine.view(-1, group_size).sum(1), signed.view(-1, group_size).sum(1)
    return fine, signed


def operands(case: TaylorCase, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random weight, gradient and, for "mixed", Fisher information."""
    shape = (case.rows, case.columns)
    weight = torch.randn(shape, dtype=case.dtype, device=device)
    grad = torch.randn(shape, dtype=case.statistics_dtype, device=device)
    if case.order == "first":
        return weight, grad, None
    return weight, grad, torch.randn(shape, dtype=case.statistics_dtype, device=device).square_()


def reference(case: TaylorCase, tensors: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """Float64 sums, a few units at a time so that the largest matrices fit."""
    size, across = tensors[0].shape[case.axis], tensors[0].shape[1 - case.axis]
    step = max(1, CHUNK // (across * case.group_size)) * case.group_size
    parts = []
    for start in range(0, size, step):
        weight, grad, fisher = (
            None if t is None else t.narrow(case.axis, start, min(step, size - start)) for t in tensors
        )
        assert weight is not None
        parts.append(taylor_importance_fp64(weight, grad, fisher, case.axis, case.order, case.group_size))
    return torch.cat([fine for fine, _ in parts]), torch.cat([signed for _, signed in parts])


def largest_error(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """Of any unit's fine or signed sum, relative to its fine sum; NaN when anything is NaN."""
    return float(((torch.stack(tuple(result)) - torch.stack(expected)).abs() / expected[0]).max())


def prepare(case: TaylorCase, device: torch.device, backends: Sequence[str]) -> Job:
    tensors = operands(case, device)
    expected = reference(case, tensors)
    jit = compiled(torch_taylor)

    def backend(name: str) -> Candidate:
        def call():
            return ops.taylor_importance(
                *tensors, axis=case.axis, order=case.order, group_size=case.group_size, backend=name
            )

        return Candidate(name, call)

    def error(run) -> float:
        poison(*expected, dtype=torch.float32)
        return largest_error(run(), expected)

    candidates = (
        Candidate(EAGER, lambda: torch_taylor(*tensors, case.axis, case.group_size)),
        Candidate(COMPILE, lambda: jit(*tensors, case.axis, case.group_size)),
        *backend_candidates("taylor_importance", backends, tensors, backend),
    )
    return Job(candidates, error, TOLERANCE)


CASES = {"cuda": (cases.TAYLOR_CUDA, cases.TAYLOR_CUDA_QUICK), "cpu": (cases.TAYLOR_CPU, cases.TAYLOR_CPU_QUICK)}


if __name__ == "__main__":
    sys.exit(main("taylor_importance", __doc__, "benchmarks.bench_taylor", CASES, prepare))
