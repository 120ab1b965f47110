"""Which backends there are, which are on, and which one takes a call.

A backend is a module of this folder, imported on first use, that offers

    OPS                               names of the ops it implements
    unavailable() -> str | None       why it is off on this machine, or None
    unsupported(op, *tensors) -> str | None   why it cannot take these (checked) tensors, or None
    <op>(...)                         the implementation, with the signature of `reference`'s function of that name
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from torch import Tensor

from ..errors import BackendError
from ..settings import BACKENDS

log = logging.getLogger(__name__)

ENVIRONMENT = "HYWIA_BACKEND"

# Automatic choice by device and op, best first.
PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "taylor_importance": ("native", "reference"),
        "linear_importance": ("native", "reference"),
        "compact": ("native", "reference"),
        "attention_fusion": ("native", "reference"),
        "taylor_importance_batch": ("native", "reference"),
        "distillation_gradient": ("native", "reference"),
        "top_distillation_gradient": ("native", "reference"),
    },
    "cuda": {
        "taylor_importance": ("cuda", "triton", "reference"),
        "linear_importance": ("cuda", "triton", "reference"),
        "compact": ("cuda", "triton", "reference"),
        "attention_fusion": ("triton", "reference"),
        "taylor_importance_batch": ("cuda", "triton", "reference"),
        "distillation_gradient": ("triton", "reference"),
        "top_distillation_gradient": ("triton", "reference"),
    },
}
_ELSEWHERE = ("reference",)  # mps, xpu, ...: plain torch runs there


@dataclass(frozen=True)
class Availability:
    """One backend's state on this machine."""

    name: str
    on: bool
    reason: str  # why it is off; empty when on
    ops: tuple[str, ...]


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


@cache
def _unavailable(name: str) -> str | None:
    return _module(name).unavailable()


def availability() -> tuple[Availability, ...]:
    """The state of every backend, for `hywia info`. Probes devices and compilers on the first call."""
    states = []
    for name in BACKENDS:
        reason = _unavailable(name)
        states.append(Availability(name, reason is None, reason or "", tuple(_module(name).OPS)))
    return tuple(states)


def refusal(name: str, op: str, tensors: Sequence[Tensor | None]) -> str | None:
    """Why a backend does not take a call; None when it does. Imports the backend's module."""
    reason = _unavailable(name)
    if reason is not None:
        return reason
    if op not in _module(name).OPS:
        return f"it does not implement {op}"
    return _module(name).unsupported(op, *tensors)


@cache
def _log_once(message: str) -> None:
    log.warning(message)


def require(name: str, source: str = "backend") -> None:
    """Raise BackendError when a backend is unknown or off on this machine."""
    if name not in BACKENDS:
        raise BackendError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    reason = _unavailable(name)
    if reason is not None:
        raise BackendError(f"{source}: {name!r} is off on this machine: {reason}; leave {source} unset")


def choose(op: str, requested: str | None, *tensors: Tensor | None) -> str:
    """Name of the backend that takes `op` on these tensors.

    Raises:
        BackendError: `requested` (or `HYWIA_BACKEND`) is unknown, off, or cannot take the call.
    """
    source = "backend"
    if requested is None and os.environ.get(ENVIRONMENT):
        requested, source = os.environ[ENVIRONMENT], ENVIRONMENT
    if requested is not None:
        require(requested, source)
        reason = refusal(requested, op, tensors)
        if reason is not None:
            raise BackendError(
                f"{source}: {requested!r} cannot run {op} here: {reason}; leave {source} unset for the automatic choice"
            )
        return requested
    device = next(t.device.type for t in tensors if t is not None)
    for name in PREFERENCE.get(device, {}).get(op, _ELSEWHERE):
        reason = refusal(name, op, tensors)
        if reason is None:
            return name
        _log_once(f"{op} on {device}: not using backend {name!r}: {reason}")
    raise BackendError(f"{op}: no backend takes tensors on {device}")  # unreachable: reference takes everything


def implementation(op: str, requested: str | None, *tensors: Tensor | None):
    """The function of the chosen backend that runs `op`."""
    return getattr(_module(choose(op, requested, *tensors)), op)
