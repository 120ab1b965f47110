"""Time and peak memory of a stretch of code, and a clean start for the next one."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def free(device: torch.device) -> None:
    """Give unused memory back, so that one measurement does not live in what another left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def _status(name: str) -> int:
    """Bytes that /proc/self/status tells under a name; 0 where there is none."""
    path = _PROCESS / "status"
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def resident() -> int:
    """Bytes of the process in memory."""
    return _status("VmRSS")


_WATCH = """
import select, sys
peak = 0
while not select.select([sys.stdin], [], [], 0.001)[0]:
    with open(f"/proc/{sys.argv[1]}/status") as status:
        peak = max(peak, next((int(line.split()[1]) for line in status if line.startswith("RssAnon:")), 0))
print(peak * 1024)
"""


class HostPeak:
    """The most that a process had of its own memory while the block ran, in bytes above what it had before. Pages of
    files are the system's to take back, and do not count. Another process looks, since this one may be busy."""

    def __enter__(self) -> HostPeak:
        self.bytes = 0
        self._before = _status("RssAnon")
        command = [sys.executable, "-S", "-c", _WATCH, str(os.getpid())]
        self._watching = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *error: object) -> None:
        told, _ = self._watching.communicate("end")
        self.bytes = int(told or 0) - self._before


class Peak:
    """From its creation on: bytes the device's allocator handed out at most. On a CPU what the process had in memory at
    most, less `base`, so that the libraries do not count; None where the kernel does not tell."""

    def __init__(self, device: torch.device, base: int = 0):
        self.device = device
        self.base = base
        self._reset = device.type == "cuda"
        if self._reset:
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            (_PROCESS / "clear_refs").write_text("5")  # sets VmHWM back to the present size
            self._reset = True
        except OSError:
            pass

    def bytes(self) -> int | None:
        if not self._reset:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status("VmHWM") - self.base


@dataclass
class Spent:
    """What a stretch of code took: seconds, the device's work included, and its `Peak`."""

    seconds: float = 0.0
    peak_bytes: int | None = None

    def __add__(self, other: Spent) -> Spent:
        """Of one stretch after another."""
        peaks = [s.peak_bytes for s in (self, other) if s.peak_bytes is not None]
        return Spent(self.seconds + other.seconds, max(peaks, default=None))


@contextmanager
def spending(device: torch.device) -> Iterator[Spent]:
    """What the block takes; filled in at its end. Such blocks do not lie in one another."""
    spent, peak, began = Spent(), Peak(device), time.monotonic()
    yield spent
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    spent.seconds, spent.peak_bytes = time.monotonic() - began, peak.bytes()
