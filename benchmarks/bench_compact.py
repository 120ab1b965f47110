"""`ops.compact` against index_select and torch.compile: `python -m benchmarks.bench_compact --help`.

`call` is the public op with its indices on the CPU, as a cut hands them over: it checks their values there and sends
them to the device. On a GPU `work` is the backend's part of that alone, the packing, with the indices on the device;
eager and compiled torch get them there too, and check nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from hywia_kernels import ops
from hywia_kernels.ops import registry

from . import cases
from .cases import CompactCase
from .harness import COMPILE, EAGER, Candidate, Job, backend_candidates, compiled, main, poison


def torch_compact(weight: Tensor, keep: Tensor, axis: int) -> Tensor:
    return weight.index_select(axis, keep)


def operands(case: CompactCase, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random weight, and random increasing indices on the CPU."""
    weight = torch.randn((case.rows, case.columns), dtype=case.dtype, device=device)
    return weight, torch.randperm(weight.shape[case.axis])[: case.kept].sort().values


def reference(weight: Tensor, keep: Tensor, axis: int) -> Tensor:
    """By a mask, not by the indexing that is timed."""
    mask = torch.zeros(weight.shape[axis], dtype=torch.bool, device=weight.device)
    mask[keep.to(weight.device)] = True
    return weight[mask] if axis == 0 else weight[:, mask]


def prepare(case: CompactCase, device: torch.device, backends: Sequence[str]) -> Job:
    weight, keep = operands(case, device)
    expected = reference(weight, keep, case.axis)
    there = keep.to(device)
    jit = compiled(torch_compact)

    def backend(name: str) -> Candidate:
        out = torch.full_like(expected, float("nan"))
        pack = registry.implementation("compact", name, weight)

        def call():
            return ops.compact(weight, keep, case.axis, backend=name)

        def work():
            pack(weight, there, case.axis, out)
            return out

        return Candidate(name, call, work)

    def error(run) -> float:
        poison(expected, dtype=case.dtype)
        return 0.0 if torch.equal(run(), expected) else float("inf")

    candidates = (
        Candidate(EAGER, lambda: torch_compact(weight, there, case.axis)),
        Candidate(COMPILE, lambda: jit(weight, there, case.axis)),
        *backend_candidates("compact", backends, (weight,), backend),
    )
    return Job(candidates, error, 0.0)


CASES = {"cuda": (cases.COMPACT_CUDA, cases.COMPACT_CUDA_QUICK), "cpu": (cases.COMPACT_CPU, cases.COMPACT_CPU_QUICK)}


if __name__ == "__main__":
    sys.exit(main("compact", __doc__, "benchmarks.bench_compact", CASES, prepare))
