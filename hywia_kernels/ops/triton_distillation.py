"""Launches the Triton kernels of the distillation ops: a program a token."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels_triton_distillation as kernels
from .calls import DistillationCall, TopDistillationCall
from .devices import on
from .triton_tiles import power_of_two

# Words that a program takes at a time, and its warps: all that a multiprocessor runs of one program, so that few rows
# are under way, and the second round finds a row of 49,152 words in the L2 cache.
_BLOCK, _WARPS = 4096, 32
_TOP = 1024  # of the likeliest words


def distillation_gradient(call: DistillationCall, loss: Tensor, gradient: Tensor | None) -> None:
    tokens, words = call.student.shape
    if tokens == 0:
        return
    with on(call.student.device):
        kernels.distillation[(tokens,)](
            call.student,
            call.teacher,
            call.weight,
            call.weight if call.labels is None else call.labels,
            loss,
            call.student if gradient is None else gradient,
            words,
            call.student.stride(0),
            call.teacher.stride(0),
            0 if gradient is None else gradient.stride(0),
            call.hard,
            call.student_scale,
            call.student_cap or 0.0,
            call.teacher_scale,
            call.teacher_cap or 0.0,
            HARD=call.labels is not None,
            GRADIENT=gradient is not None,
            STUDENT_CAPPED=call.student_cap is not None,
            TEACHER_CAPPED=call.teacher_cap is not None,
            BLOCK=power_of_two(words, _BLOCK),
            num_warps=_WARPS,
        )


def top_distillation_gradient(call: TopDistillationCall, loss: Tensor, gradient: Tensor | None) -> None:
    (tokens, words), count = call.student.shape, call.indices.shape[1]
    if tokens == 0:
        return
    with on(call.student.device):
        kernels.top_distillation[(tokens,)](
            call.student,
            call.indices,
            call.log_probabilities,
            call.rest,
            torch.empty((tokens, count), dtype=call.student.dtype, device=call.student.device),
            call.weight,
            call.weight if call.labels is None else call.labels,
            loss,
            call.student if gradient is None else gradient,
            words,
            count,
            call.student.stride(0),
            0 if gradient is None else gradient.stride(0),
            call.hard,
            call.student_scale,
            call.student_cap or 0.0,
            HARD=call.labels is not None,
            GRADIENT=gradient is not None,
            IN_PLACE=gradient is not None and gradient.data_ptr() == call.student.data_ptr(),
            CAPPED=call.student_cap is not None,
            BLOCK_K=power_of_two(count, _TOP),
            BLOCK=power_of_two(words, _BLOCK),
            num_warps=_WARPS,
        )
