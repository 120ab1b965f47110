"""C++ kernels for tensors on the CPU: hands pointers, sizes and strides to the extension `hywia_kernels._native`."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .calls import BatchCall, DistillationCall, LinearCall, TaylorCall, TopDistillationCall
from .precision import full_float32

OPS = (
    "taylor_importance",
    "linear_importance",
    "compact",
    "attention_fusion",
    "taylor_importance_batch",
    "distillation_gradient",
    "top_distillation_gradient",
)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ORDER_CODES = {"first": 0, "second": 1, "mixed": 2}

# linear_importance: a block of per-sample gradients, [samples, rows, columns], is formed and reduced before the next.
BLOCK_BYTES = 8 << 20  # of gradients, few enough that they are read from the last-level cache and not from memory
CHUNK = 64  # samples whose gradients are formed at once; with more samples, running sums are kept per block
WIDEST = 1024  # columns of a block; narrow blocks make slow products


@cache
def extension(name: str) -> Any:
    """A compiled module of the package, or the ImportError that says why there is none."""
    try:
        return importlib.import_module(f"hywia_kernels.{name}")
    except ImportError as error:
        return error


def _extension() -> Any:
    return extension("_native")


def unavailable() -> str | None:
    error = _extension()
    if isinstance(error, ModuleNotFoundError):
        return "the C++ extension was not built (HYWIA_BUILD=none or no compiler); reinstall with HYWIA_BUILD=cpu"
    if isinstance(error, ImportError):
        return f"the C++ extension does not load ({error}); reinstall with HYWIA_BUILD=cpu"
    return None


def unsupported(op: str, *tensors: Tensor | None) -> str | None:
    elsewhere = next((t.device for t in tensors if t is not None and t.device.type != "cpu"), None)
    return None if elsewhere is None else f"it takes tensors on the CPU, got {elsewhere}"


def operand(tensor: Tensor | None, axis: int) -> tuple[int, int, int, int]:
    """(address, unit stride, reduce stride, dtype code) of a matrix whose units lie along `axis`."""
    if tensor is None:
        return (0, 0, 0, 0)
    return (tensor.data_ptr(), tensor.stride(axis), tensor.stride(1 - axis), DTYPE_CODES[tensor.dtype])


def compact_sizes(weight: Tensor, axis: int, out: Tensor) -> dict[str, int]:
    """Sizes and strides of a compaction; a vector is one row whose columns are kept."""
    vector = weight.dim() == 1
    return {
        "rows": 1 if vector else out.shape[0],
        "columns": out.shape[-1],
        "row_stride": 0 if vector else weight.stride(0),
        "column_stride": weight.stride(-1),
        "axis": 1 if vector else axis,
        "element_size": weight.element_size(),
    }


def taylor_importance(call: TaylorCall, fine: Tensor, signed: Tensor, accumulate: bool) -> None:
    _taylor([(call, fine, signed, accumulate)], call.order)


def _taylor(matrices: Sequence[tuple[TaylorCall, Tensor, Tensor, bool]], order: str) -> None:
    _extension().taylor_importance(
        matrices=[
            (
                *(operand(x, call.axis) for x in call.operands),
                call.weight.shape[call.axis],
                call.weight.shape[1 - call.axis],
                call.group_size,
                fine.data_ptr(),
                signed.data_ptr(),
                accumulate,
            )
            for call, fine, signed, accumulate in matrices
        ],
        order=ORDER_CODES[order],
        threads=torch.get_num_threads(),
    )


def _pieces(size: int, most: int) -> list[tuple[int, int]]:
    """`[0, size)` in equal pieces of at most `most`, each rounded up to whole cache lines of float32."""
    if size == 0:
        return []
    step = -(-size // -(-size // max(16, most)))
    step = -(-step // 16) * 16
    return [(at, min(size, at + step)) for at in range(0, size, step)]


def _products(dy: Tensor, x: Tensor, offsets: list[int], scale: float, out: Tensor) -> None:
    """Computes `out[s] = scale · dy_sᵀ · x_s`. The scale is BLAS's alpha, which takes no time of its own."""
    lengths = {b - a for a, b in itertools.pairwise(offsets)}
    if len(lengths) == 1 and len(offsets) > 2:
        left, right = (t[offsets[0] : offsets[-1]].view(len(offsets) - 1, -1, t.shape[1]) for t in (dy, x))
        torch.baddbmm(out, left.transpose(1, 2), right, beta=0, alpha=scale, out=out)
        return
    for s, (a, b) in enumerate(itertools.pairwise(offsets)):
        torch.addmm(out[s], dy[a:b].t(), x[a:b], beta=0, alpha=scale, out=out[s])


@torch.no_grad()
def linear_importance(
    call: LinearCall,
    fine: Tensor,
    coarse: Tensor,
    accumulate: bool,
    also: tuple[int, int, Tensor, Tensor] | None = None,
) -> None:
    """Scores a matrix; `also` gives axis, group size, fine and coarse of other units on the same matrix. The products,
    which are nearly all of the work, are then computed once for both."""
    grad_output, input, weight, offsets, axis, order, group_size, per_sample, scale, _ = call
    run, threads = _extension().sample_importance, torch.get_num_threads()
    results = [(axis, group_size, fine, coarse), *([] if also is None else [also])]
    if not per_sample:  # first order alone: one product over all tokens, as if of one sample
        scale, offsets = scale / (len(offsets) - 1), [0, offsets[-1]]
    samples, squares = len(offsets) - 1, order != "first"
    chunk = min(samples, CHUNK)
    chunks = [offsets[at : at + chunk + 1] for at in range(0, samples, chunk)]
    rows, columns = weight.shape
    across = _pieces(columns, min(WIDEST, BLOCK_BYTES // (4 * chunk * 16)))
    widest = across[0][1] if across else 1
    down = _pieces(rows, BLOCK_BYTES // (4 * chunk * widest))
    sums = [torch.zeros(3 + samples, weight.shape[result[0]], dtype=torch.float64) for result in results]
    tallest = down[0][1] if down else 1
    store = torch.empty(chunk * tallest * widest)
    running = [torch.empty(2, tallest * widest) if len(chunks) > 1 else store.view(1, -1).expand(2, -1) for _ in sums]
    with full_float32("cpu"):
        for left, right in across:
            x = input[:, left:right].to(torch.float32, memory_format=torch.contiguous_format)
            for top, bottom in down:
                dy = grad_output[:, top:bottom].to(torch.float32, memory_format=torch.contiguous_format)
                block = weight[top:bottom, left:right]
                for number, part in enumerate(chunks):
                    shape = (len(part) - 1, bottom - top, right - left)
                    gradients = store[: shape[0] * shape[1] * shape[2]].view(shape)
                    _products(dy, x, part, scale, gradients)
                    for (along, *_), total, (mean, square) in zip(results, sums, running, strict=True):
                        unit = left if along else top
                        run(
                            gradients=gradients.data_ptr(),
                            weight=operand(block, 0),
                            samples=shape[0],
                            rows=shape[1],
                            columns=shape[2],
                            axis=along,
                            squares=squares,
                            share=1.0 / samples,
                            first=number == 0,
                            last=number == len(chunks) - 1,
                            mean=mean.data_ptr(),
                            square=square.data_ptr(),
                            fine=total[0, unit:].data_ptr(),
                            coarse=total[3 + number * chunk, unit:].data_ptr(),
                            pitch=total.shape[1],
                            threads=threads,
                        )
    for (_, size, into, by_sample), total in zip(results, sums, strict=True):
        total = total.view(3 + samples, -1, size).sum(2)
        kept = total[:3] if order == "all" else total[ORDER_CODES[order]]
        for out, exact in ((into, kept), (by_sample, total[3:])):
            out.copy_(exact + out if accumulate else exact)


linear_importance.takes_also = True  # type: ignore[attr-defined]


def compact(weight: Tensor, keep: Tensor, axis: int, out: Tensor) -> None:
    _extension().compact(
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        keep=keep.data_ptr(),
        threads=torch.get_num_threads(),
        **compact_sizes(weight, axis, out),
    )


def attention_fusion(fine: Tensor, coarse: Tensor, temperature: float, score: Tensor, weight: Tensor) -> None:
    _extension().attention_fusion(
        fine=fine.data_ptr(),
        coarse=coarse.data_ptr(),
        units=fine.shape[0],
        temperature=temperature,
        score=score.data_ptr(),
        weight=weight.data_ptr(),
        threads=torch.get_num_threads(),
    )


def taylor_importance_batch(call: BatchCall, fine: list[Tensor], signed: list[Tensor], accumulate: bool) -> None:
    """All matrices in one parallel region: small ones by themselves are too little for the threads."""
    begun: set[int] = set()  # results that a matrix was written to
    matrices = []
    for matrix, result in zip(call.matrices, call.into, strict=True):
        matrices.append((matrix, fine[result], signed[result], accumulate or result in begun))
        begun.add(result)
    _taylor(matrices, call.order)


def _logits(logits: Tensor, scale: float, cap: float | None) -> tuple[int, int, int, float, float]:
    return logits.data_ptr(), logits.stride(0), DTYPE_CODES[logits.dtype], scale, cap or 0.0


def _distillation(
    call: DistillationCall | TopDistillationCall, loss: Tensor, gradient: Tensor | None, **teacher: Any
) -> None:
    nothing = {"teacher": (0, 0, 0, 1.0, 0.0), "indices": 0, "log_probabilities": 0, "log_probabilities_dtype": 0}
    _extension().distillation(
        **{**nothing, "rest": 0, "count": 0, **teacher},
        student=_logits(call.student, call.student_scale, call.student_cap),
        weight=call.weight.data_ptr(),
        labels=0 if call.labels is None else call.labels.data_ptr(),
        hard=call.hard,
        tokens=call.student.shape[0],
        words=call.student.shape[1],
        loss=loss.data_ptr(),
        gradient=0 if gradient is None else gradient.data_ptr(),
        gradient_dtype=DTYPE_CODES[(call.student if gradient is None else gradient).dtype],
        gradient_stride=0 if gradient is None else gradient.stride(0),
        threads=torch.get_num_threads(),
    )


def distillation_gradient(call: DistillationCall, loss: Tensor, gradient: Tensor | None) -> None:
    _distillation(call, loss, gradient, teacher=_logits(call.teacher, call.teacher_scale, call.teacher_cap))


def top_distillation_gradient(call: TopDistillationCall, loss: Tensor, gradient: Tensor | None) -> None:
    _distillation(
        call,
        loss,
        gradient,
        indices=call.indices.data_ptr(),
        log_probabilities=call.log_probabilities.data_ptr(),
        log_probabilities_dtype=DTYPE_CODES[call.log_probabilities.dtype],
        rest=call.rest.data_ptr(),
        count=call.indices.shape[1],
    )
