"""The current device and its stream, without the time that torch's own ways take, and what is kept on devices."""

from __future__ import annotations

import contextlib
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import BackendError

__all__ = ["offsets_on", "on", "stream"]

_HERE = contextlib.nullcontext()
_CAPTURED: list[Tensor] = []  # what graphs read when they are replayed, and so must not be freed


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which a CUDA device is the current one. Where it already is, and on the CPU, it does nothing;
    torch's own context takes some twenty microseconds to find that out."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def stream(device: torch.device) -> int:
    """The current stream's handle, as Triton asks for it: the public way makes an object for ten microseconds."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def offsets_on(device: torch.device, offsets: tuple[int, ...]) -> Tensor:
    """Samples' limits as int32 on a device. They are copied once, so that later calls neither wait nor copy, and a
    captured call reads memory that stays.

    Raises:
        BackendError: a graph is being captured, and these limits are not there yet.
    """
    held = _held_offsets(device, offsets)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _CAPTURED.append(held)
    return held


@lru_cache(maxsize=64)
def _held_offsets(device: torch.device, offsets: tuple[int, ...]) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise BackendError(
            "samples: expected limits that an earlier call has copied to the device, got new ones while a graph is "
            "captured; run the call once before it is captured"
        )
    return torch.tensor(offsets, dtype=torch.int32).to(device)  # waits, so every stream may read it
