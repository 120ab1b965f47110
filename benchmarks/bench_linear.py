"""`ops.linear_importance` against the weight-gradient product it contains: `python -m benchmarks.bench_linear --help`.

The baseline, `mm alone`, is that product as cuBLAS (on a CPU, torch's BLAS) makes it for all samples at once, written
to memory and not scored: what plain backward spends on the matrix. `eager` and torch.compile make one gradient per
sample in the operands' dtype, as a user would, and score them in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from hywia_kernels import ops
from hywia_kernels.ops.reference import linear_importance_fp64

from . import cases
from .bench_taylor import CHUNK
from .cases import LinearCase
from .harness import COMPILE, EAGER, Candidate, Job, backend_candidates, compiled, main, poison

MM = "mm alone"
TORCH_SAMPLES = 10  # more gradients at once than this are tens of gigabytes, and one by one they take seconds
ORDERS = ("first", "second", "mixed")  # rows of "all"
# Allowed error of a unit's fine sums, relative to the same in float64, and of its coarse sums, relative to its
# first-order fine sum.
TOLERANCE = 2e-5
# Allowed error of eager torch, which rounds every weight gradient to the operands' dtype, and of the baseline, which
# rounds its product.
ROUNDED = {dtype: max(TOLERANCE, torch.finfo(dtype).eps) for dtype in (torch.float32, torch.bfloat16, torch.float16)}

Operands = tuple[Tensor, Tensor, Tensor]


def operands(case: LinearCase, device: torch.device) -> Operands:
    """Random output gradient, input and weight."""
    shapes = ((case.tokens, case.rows), (case.tokens, case.columns), (case.rows, case.columns))
    grad_output, inputs, weight = (torch.randn(shape, dtype=case.dtype, device=device) for shape in shapes)
    return grad_output, inputs, weight


def _part(tensors: Operands, axis: int, start: int, length: int) -> Operands:
    """What some consecutive rows (axis 0) or columns (axis 1) of the weight are scored from."""
    grad_output, inputs, weight = tensors
    if axis == 0:
        grad_output = grad_output.narrow(1, start, length)
    else:
        inputs = inputs.narrow(1, start, length)
    return grad_output, inputs, weight.narrow(axis, start, length)


def reference(case: LinearCase, tensors: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 `(fine, coarse, first-order fine)`, a few units at a time so that the largest matrices fit."""
    size, across = tensors[2].shape[case.axis], tensors[2].shape[1 - case.axis]
    step = max(1, CHUNK // (across * case.group_size)) * case.group_size
    offsets = list(range(0, case.tokens + 1, case.length))
    fine, coarse = [], []
    for start in range(0, size, step):
        part = _part(tensors, case.axis, start, min(step, size - start))
        sums = linear_importance_fp64(*part, offsets, case.axis, "all", case.group_size, case.per_sample, 1.0)
        fine.append(sums[0])
        coarse.append(sums[1])
    every, signed = torch.cat(fine, 1), torch.cat(coarse, 1)
    return (every if case.order == "all" else every[ORDERS.index(case.order)]), signed, every[0]


def mapped_of(case: LinearCase, tensors: Operands) -> Tensor:
    """What the weight makes of the operand whose columns are not the units; see `ops.linear_importance`."""
    grad_output, inputs, weight = tensors
    return inputs @ weight.t() if case.axis == 0 else grad_output @ weight


def from_mapped(case: LinearCase, tensors: Operands, mapped: Tensor) -> Tensor:
    """Float64 signed sums from what is mapped, as rounded as that is."""
    side = tensors[case.axis]
    pieces = zip(side.split(case.length), mapped.split(case.length), strict=True)
    return (
        torch.stack([(a.double() * b.double()).sum(0) for a, b in pieces])
        .view(case.samples, -1, case.group_size)
        .sum(2)
    )


def largest_error(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor]) -> float:
    """Of any unit's sum, in the sense of `TOLERANCE`; NaN when anything is NaN."""
    fine, coarse, scale = expected
    errors = ((result[0] - fine).abs() / fine).max(), ((result[1] - coarse).abs() / scale).max()
    return float(torch.stack(errors).max())


def product_error(product: Tensor, tensors: Operands) -> float:
    """Of any element, relative to the largest one."""
    grad_output, inputs, _ = tensors
    largest = error = torch.zeros((), dtype=torch.float64, device=product.device)
    step = max(1, CHUNK // product.shape[1])
    for start in range(0, len(product), step):
        exact = grad_output[:, start : start + step].double().t() @ inputs.double()
        error = torch.maximum(error, (product[start : start + step] - exact).abs().max())
        largest = torch.maximum(largest, exact.abs().max())
    return float(error / largest)


def _scored(mean: Tensor, fisher: Tensor | None, weight: Tensor, axis: int, order: str, group_size: int) -> Tensor:
    first = mean * weight
    terms = [first]
    if fisher is not None:
        second = 0.5 * fisher * weight * weight
        terms = [second] if order == "second" else [first, second, first - second]
    fine = torch.stack([t.abs().sum(1 - axis).view(-1, group_size).sum(1) for t in terms])
    return fine if order == "all" else fine[0]


def eager(
    grad_output: Tensor, inputs: Tensor, weight: Tensor, samples: int, axis: int, order: str, group_size: int
) -> tuple[Tensor, Tensor]:
    """A product per sample, its sums into float32, then the scores."""
    w = weight.float()
    mean = torch.zeros_like(w)
    fisher = torch.zeros_like(w) if order != "first" else None
    coarse = []
    for dy, x in zip(grad_output.chunk(samples), inputs.chunk(samples), strict=True):
        gradient = (dy.t() @ x).float()
        coarse.append((gradient * w).sum(1 - axis).view(-1, group_size).sum(1))
        mean += gradient
        if fisher is not None:
            fisher.addcmul_(gradient, gradient)
    mean /= samples
    if fisher is not None:
        fisher /= samples
    return _scored(mean, fisher, w, axis, order, group_size), torch.stack(coarse)


def batched(
    grad_output: Tensor, inputs: Tensor, weight: Tensor, samples: int, axis: int, order: str, group_size: int
) -> tuple[Tensor, Tensor]:
    """The same for a compiler: one batched product, then sums that it can fuse."""
    dy, x = (t.view(samples, -1, t.shape[1]) for t in (grad_output, inputs))
    gradients = torch.bmm(dy.transpose(1, 2), x).float()
    w = weight.float()
    coarse = (gradients * w).sum(2 - axis).view(samples, -1, group_size).sum(2)
    fisher = gradients.square().mean(0) if order != "first" else None
    return _scored(gradients.mean(0), fisher, w, axis, order, group_size), coarse


def merged(
    grad_output: Tensor, inputs: Tensor, weight: Tensor, samples: int, axis: int, order: str, group_size: int
) -> tuple[Tensor, Tensor]:
    """Without telling the samples apart: one product, first order."""
    gradient = (grad_output.t() @ inputs).float() / samples
    w = weight.float()
    signed = (gradient * w).sum(1 - axis).view(1, -1, group_size).sum(2)
    return _scored(gradient, None, w, axis, order, group_size), signed


def prepare(case: LinearCase, device: torch.device, backends: Sequence[str]) -> Job:
    tensors = operands(case, device)
    grad_output, inputs, _ = tensors
    expected = reference(case, tensors)
    plain = (*tensors, case.samples, case.axis, case.order, case.group_size)
    jit = compiled(batched if case.per_sample else merged)
    one_by_one = eager if case.per_sample else merged

    mapped = mapped_of(case, tensors) if case.mapped else None
    # What backend "cuda" makes of it; the others do not read it.
    rounded_sums = (expected[0], from_mapped(case, tensors, mapped), expected[2]) if mapped is not None else expected

    def backend(name: str) -> Candidate:
        def call():
            return ops.linear_importance(
                *tensors,
                samples=case.samples,
                axis=case.axis,
                order=case.order,
                group_size=case.group_size,
                per_sample=case.per_sample,
                mapped=mapped,
                backend=name,
            )

        return Candidate(name, call, error=lambda run: error(run, name))

    def error(run, name: str = "") -> float:
        poison(*expected, dtype=torch.float32)
        return largest_error(run(), rounded_sums if name == "cuda" else expected)

    def mm() -> Tensor:
        return torch.mm(grad_output.t(), inputs)

    rounded = ROUNDED[case.dtype]
    torch_ways = (
        Candidate(EAGER, lambda: one_by_one(*plain), tolerance=rounded),
        Candidate(COMPILE, lambda: jit(*plain), tolerance=rounded),
    )
    candidates = (
        Candidate(MM, mm, error=lambda run: product_error(run(), tensors), tolerance=rounded),
        *(torch_ways if case.samples <= TORCH_SAMPLES else ()),
        *backend_candidates("linear_importance", backends, tensors, backend),
    )
    return Job(candidates, error, TOLERANCE, baseline=MM)


CASES = {"cuda": (cases.LINEAR_CUDA, cases.LINEAR_CUDA_QUICK), "cpu": (cases.LINEAR_CPU, cases.LINEAR_CPU_QUICK)}


if __name__ == "__main__":
    sys.exit(main("linear_importance", __doc__, "benchmarks.bench_linear", CASES, prepare))
