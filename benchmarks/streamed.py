"""The streamed scoring as `bench_large` runs it, and the limits that it is held against."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hywia_kernels as hk

from . import checkpoints, models
from .memory import free

_TIMEOUT = 1800.0  # seconds that processes wait for each other


def _scale(module: str) -> Any:
    try:
        return importlib.import_module(f"hywia_kernels.scale.{module}")
    except ModuleNotFoundError as error:
        raise SystemExit("this part needs the streamed scoring (hywia_kernels.scale), which is not there") from error


def joined(device: torch.device) -> Any:
    """The processes that torchrun started, as a context."""
    return _scale("ranks").joined(device, _TIMEOUT)


def device_of_process(device: torch.device) -> torch.device:
    """The device of this process among those that torchrun started."""
    return _scale("place").device_of_rank(device.type)


def placed(source: Path, place: str, device: torch.device) -> Any:
    """The model of a directory, its layers' weights in the host's memory or in their files."""
    if place == "files":
        return hk.open_stored(source)
    return hk.load(source, device="cpu")[0]


def scored(model: Any, tokens: Tensor, device: torch.device, place: str, group: Any = None) -> Any:
    """Statistics of the second order."""
    options = {} if group is None else {"ranks": group}
    calibrate: Any = getattr(hk, "calibrate_streamed", None) or _scale("job").calibrate_streamed
    return calibrate(model, tokens, device=device, weights=place, **options)


def compute_seconds(shape: str, dtype: str, device: torch.device, tokens: Tensor, layers: int = 2) -> tuple[float, int]:
    """`(seconds, layers)` of a scoring that waits for no weights: of the shape's first layers, on the device."""
    model = models.build(shape, layers, dtype, device)
    scored(model, tokens, device, "device")
    began = time.monotonic()
    scored(model, tokens, device, "device")
    seconds = time.monotonic() - began
    del model
    free(device)
    return seconds, layers


def transfer_seconds(model: Any, source: Path, place: str, device: torch.device) -> float:
    """Seconds for as many bytes as two sweeps over the layers move: by the link from pinned memory, or, of files, what
    reading them takes from the disk, if that is longer."""
    moved = 2 * sum(p.numel() * p.element_size() for p in model.model.layers.parameters())
    seconds = moved / _link_rate(device)
    if place == "files":
        checkpoints.forget(source)
        began = time.monotonic()
        count = checkpoints.read(source)
        seconds = max(seconds, (time.monotonic() - began) * moved / count)
    return seconds


def _link_rate(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes a second from the host's memory to the device."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=device)
    there.copy_(host)
    best = 0.0
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.monotonic()
        there.copy_(host)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, size / (time.monotonic() - began))
    return best
