"""`ops.taylor_importance_batch` against torch.compile and a call per matrix; see `--help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from hywia_kernels import ops

from . import cases
from .bench_taylor import TOLERANCE, operands, reference, torch_taylor
from .cases import TaylorBatchCase
from .harness import COMPILE, EAGER, Candidate, Job, backend_candidates, compiled, main, poison

Operands = list[tuple[Tensor, Tensor, Tensor | None]]


def torch_batch(tensors: Operands, axes: list[int], group_sizes: list[int], into: list[int]) -> list[Tensor]:
    """Fine and signed sums of each result in turn, in plain torch with float32 arithmetic."""
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for made, axis, group_size, result in zip(tensors, axes, group_sizes, into, strict=True):
        fine, signed = torch_taylor(*made, axis, group_size)
        if result in results:
            fine, signed = results[result][0] + fine, results[result][1] + signed
        results[result] = (fine, signed)
    return [x for result in range(len(results)) for x in results[result]]


def separate(tensors: Operands, case: TaylorBatchCase) -> list[Tensor]:
    """A call per matrix, those of a result into one `out`."""
    results: dict[int, ops.TaylorImportance] = {}
    for made, call, result in zip(tensors, case.calls, case.into, strict=True):
        results[result] = ops.taylor_importance(
            *made, axis=call.axis, order=case.order, group_size=call.group_size, out=results.get(result)
        )
    return [x for result in range(len(results)) for x in results[result]]


def prepare(case: TaylorBatchCase, device: torch.device, backends: Sequence[str]) -> Job:
    calls, into = case.calls, case.into
    tensors = [operands(call, device) for call in calls]
    expected: dict[int, tuple[Tensor, Tensor]] = {}
    for call, made, result in zip(calls, tensors, into, strict=True):
        fine, signed = reference(call, made)
        before = expected.get(result)
        expected[result] = (fine, signed) if before is None else (before[0] + fine, before[1] + signed)
    axes, sizes = [call.axis for call in calls], [call.group_size for call in calls]
    weights, grads, fishers = ([made[i] for made in tensors] for i in range(3))
    jit = compiled(torch_batch)

    def backend(name: str) -> Candidate:
        def call():
            results = ops.taylor_importance_batch(
                weights, grads, fishers, axes=axes, order=case.order, group_sizes=sizes, into=into, backend=name
            )
            return [x for result in results for x in result]

        return Candidate(name, call)

    def error(run) -> float:
        poison(*(x for pair in expected.values() for x in pair), dtype=torch.float32)
        got = run()
        worst = 0.0
        for result, (fine, signed) in expected.items():
            difference = torch.stack([got[2 * result] - fine, got[2 * result + 1] - signed]).abs() / fine
            worst = max(worst, float(difference.max())) if not difference.isnan().any() else float("nan")
        return worst

    flat = tuple(x for made in tensors for x in made)
    candidates = (
        Candidate(EAGER, lambda: torch_batch(tensors, axes, sizes, into)),
        Candidate(COMPILE, lambda: jit(tensors, axes, sizes, into)),
        Candidate("separate calls", lambda: separate(tensors, case)),
        *backend_candidates("taylor_importance_batch", backends, flat, backend),
    )
    return Job(candidates, error, TOLERANCE)


CASES = {
    "cuda": (cases.TAYLOR_BATCH_CUDA, cases.TAYLOR_BATCH_CUDA[:1]),
    "cpu": (cases.TAYLOR_BATCH_CPU, cases.TAYLOR_BATCH_CPU),
}


if __name__ == "__main__":
    sys.exit(main("taylor_importance_batch", __doc__, "benchmarks.bench_taylor_batch", CASES, prepare))
