"""Argument checks of the distillation ops, as `checks` does for the others: before dispatch, without reading values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .calls import DistillationCall, TopDistillationCall
from .checks import dtype_name, expect_dtype, expect_floats, expect_stored, expect_tensor

__all__ = ["full", "top"]


def _rows(name: str, value: object) -> Tensor:
    """A matrix of logits: any distance between its rows, but no row twice."""
    tensor = expect_tensor(name, value)
    if tensor.dim() != 2:
        raise UsageError(
            f"{name}: expected a matrix [tokens, words], got {tensor.dim()} dimensions; flatten the tokens"
        )
    expect_dtype(name, tensor)
    tokens, words = tensor.shape
    if words < 1:
        raise UsageError(f"{name}: expected at least one word, got {list(tensor.shape)}")
    if (words > 1 and tensor.stride(1) != 1) or (tokens > 1 and tensor.stride(0) < words):
        raise UsageError(
            f"{name}: expected rows of contiguous words, got strides {tensor.stride()}; pass .contiguous()"
        )
    return tensor


def _like(name: str, value: object, student: Tensor, dtypes: tuple[torch.dtype, ...], shape: list[int]) -> Tensor:
    """A contiguous operand of the student's rows."""
    tensor = expect_tensor(name, value)
    if tensor.dtype not in dtypes or list(tensor.shape) != shape or tensor.device != student.device:
        wanted = " or ".join(dtype_name(d) for d in dtypes)
        raise UsageError(
            f"{name}: expected {wanted} {shape} on {student.device}, got {dtype_name(tensor.dtype)} "
            f"{list(tensor.shape)} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise UsageError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}; pass .contiguous()")
    return tensor


def _number(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise UsageError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def _scale(name: str, value: object) -> float:
    scale = _number(name, value)
    if scale <= 0:
        raise UsageError(f"{name}: expected a positive number, got {value!r}")
    return scale


def _cap(name: str, value: object) -> float | None:
    return None if value is None else _scale(name, value)


def _of_student(call: Any, gradient: object, out: Tensor | None) -> tuple[Any, Tensor | None]:
    """What both ops have in common; the call as the backends take it, and where the gradient goes."""
    student, tokens = call.student, call.student.shape[0]
    expect_floats("weight", call.weight, [tokens], student.device)
    hard = _number("hard", call.hard)
    if not 0 <= hard <= 1:
        raise UsageError(f"hard: expected a share from 0 to 1, got {call.hard!r}")
    labels = None
    if hard > 0:
        if call.labels is None:
            raise UsageError(f"labels: expected int64 [{tokens}] for hard={call.hard!r}, got None; only 0 does without")
        labels = _like("labels", call.labels, student, (torch.int64,), [tokens])
    if not isinstance(gradient, bool) or (out is not None and not gradient):
        raise UsageError(f"gradient: expected True, or False without out, got {gradient!r}")
    into = student if gradient else None
    if out is not None:
        into = _rows("out", out)
        if out.shape != student.shape or out.device != student.device:
            raise UsageError(
                f"out: expected {list(student.shape)} on {student.device}, got {list(out.shape)} on {out.device}"
            )
    call = call._replace(
        labels=labels,
        hard=hard,
        student_scale=_scale("student_scale", call.student_scale),
        student_cap=_cap("student_cap", call.student_cap),
    )
    return call, into


def full(call: DistillationCall, gradient: bool, out: Tensor | None) -> tuple[DistillationCall, Tensor | None]:
    """Checks a call; returns it as the backends take it, and where the gradient goes.

    Raises:
        UsageError: an argument outside the contract of `ops.distillation_gradient`.
    """
    student, teacher = _rows("student_logits", call.student), _rows("teacher_logits", call.teacher)
    if teacher.shape != student.shape or teacher.device != student.device:
        raise UsageError(
            f"teacher_logits: expected the student's {list(student.shape)} on {student.device}, "
            f"got {list(teacher.shape)} on {teacher.device}"
        )
    call, into = _of_student(call, gradient, out)
    call = call._replace(
        teacher_scale=_scale("teacher_scale", call.teacher_scale), teacher_cap=_cap("teacher_cap", call.teacher_cap)
    )
    expect_stored(student_logits=student, teacher_logits=teacher, weight=call.weight, labels=call.labels, out=into)
    return call, into


def top(call: TopDistillationCall, gradient: bool, out: Tensor | None) -> tuple[TopDistillationCall, Tensor | None]:
    """Checks a call; returns it as the backends take it, and where the gradient goes.

    Raises:
        UsageError: an argument outside the contract of `ops.top_distillation_gradient`.
    """
    student = _rows("student_logits", call.student)
    tokens, words = student.shape
    indices = expect_tensor("indices", call.indices)
    count = indices.shape[1] if indices.dim() == 2 else 1
    _like("indices", indices, student, (torch.int32,), [tokens, count])
    if not 1 <= count <= words:
        raise UsageError(f"indices: expected from 1 to {words} words a token, got {count}")
    _like("log_probabilities", call.log_probabilities, student, (torch.float32, torch.float16), [tokens, count])
    expect_floats("rest", call.rest, [tokens], student.device)
    call, into = _of_student(call, gradient, out)
    expect_stored(
        student_logits=student,
        indices=indices,
        log_probabilities=call.log_probabilities,
        rest=call.rest,
        weight=call.weight,
        labels=call.labels,
        out=into,
    )
    return call, into
