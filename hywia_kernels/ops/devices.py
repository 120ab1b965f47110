"""The current device and its stream, without the time that torch's own ways take."""

from __future__ import annotations

import contextlib

import torch

__all__ = ["on", "stream"]

_HERE = contextlib.nullcontext()


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which a CUDA device is the current one. Where it already is, and on the CPU, it does nothing;
    torch's own context takes some twenty microseconds to find that out."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def stream(device: torch.device) -> int:
    """The current stream's handle, as Triton asks for it: the public way makes an object for ten microseconds."""
    return torch._C._cuda_getCurrentRawStream(device.index)
