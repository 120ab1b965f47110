"""How the benchmarks measure: cold cache, one reading per run, medians, and the device's ceilings from the same run.

Two readings per call:

* `work` - time the device spends. On a GPU, one pair of events around the call, which is enqueued while the device is
  still busy with a delay and a cache flush, so that launch latency does not show. Whether it was enqueued in time is
  checked after every run; a run that came late is thrown away and the delay doubled. A reading includes the gap between
  two events (`empty_us` of the results), which matters below some 20 µs.
* `call` - time the caller waits: host clock from the call to the end of its work, on an idle device, cache cold.
  It adds argument checks, dispatch, launch latency and one synchronisation.

On the CPU both are the host clock around the call, after a pause in which the threads of earlier calls stop spinning:
torch and the extension may bring an OpenMP pool each.

The flush writes a buffer several times the size of the last-level cache and then reads another one: after it the cache
holds neither the operands nor dirty lines whose write-back would be charged to the next kernel.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

GIB = 2**30
SETTLE = 0.005  # seconds
LONGEST_DELAY = 2**28  # cycles, about 0.15 s: a call that takes the host longer waits for the device itself


@dataclass(frozen=True)
class Reading:
    """Median and the 20 % and 80 % quantiles, in the unit of the times (a `Timer`'s are µs)."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, times_us: list[float]) -> Reading:
        deciles = statistics.quantiles(times_us, n=10, method="inclusive")
        return cls(statistics.median(times_us), deciles[1], deciles[7], len(times_us))

    def columns(self, name: str) -> dict[str, float]:
        """A row's columns of these times: `name`, and with `_p20` and `_p80` behind it."""
        return {name: self.median, f"{name}_p20": self.low, f"{name}_p80": self.high}


def last_level_cache(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        int(size.removesuffix("K")) * 1024
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (size := path.read_text().strip()).endswith("K")
    ]
    return min(max(sizes, default=32 * 2**20), 256 * 2**20)


class Timer:
    """Times calls on one device. Holds the flush buffers; `empty_us` is what it reads for no work at all."""

    def __init__(self, device: torch.device, runs: int):
        self.device = device
        self.runs = runs
        size = (4 if device.type == "cuda" else 2) * last_level_cache(device) // 4
        self._written = torch.zeros(size, dtype=torch.float32, device=device)
        self._read = torch.zeros(size, dtype=torch.float32, device=device)
        self.empty_us = self.work(lambda: None).median

    def flush(self) -> None:
        self._written.fill_(1.0)
        self._read.sum()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def work(self, call: Callable[[], object], cold: bool = True, runs: int | None = None) -> Reading:
        """Device time of `call`, which must not wait for the device itself."""
        if self.device.type != "cuda":
            return self.call(call, cold, runs)
        self._warm(call)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times: list[float] = []
        delay = 2**19
        while len(times) < (runs or self.runs):
            torch.cuda._sleep(delay)
            if cold:
                self.flush()
            start.record()
            result = call()
            end.record()
            in_time = not start.query()
            end.synchronize()
            del result
            if in_time:
                times.append(start.elapsed_time(end) * 1e3)
            elif delay < LONGEST_DELAY:
                delay *= 2
            else:
                raise RuntimeError("the call waits for the device, so its device time cannot be told from its latency")
        return Reading.of(times)

    def call(self, call: Callable[[], object], cold: bool = True, runs: int | None = None) -> Reading:
        """Host time from `call` to the end of its work."""
        self._warm(call)
        times = []
        for _ in range(runs or self.runs):
            if cold:
                self.flush()
            self.synchronize()
            if self.device.type == "cpu":
                time.sleep(SETTLE)
            began = time.perf_counter()
            result = call()
            self.synchronize()
            times.append((time.perf_counter() - began) * 1e6)
            del result
        return Reading.of(times)

    def _warm(self, call: Callable[[], object]) -> None:
        for _ in range(3):
            call()
        self.synchronize()

    def copy_bandwidth(self) -> float:
        """GB/s of a large copy, bytes read plus bytes written: the ceiling that GB/s are held against.

        Kernels that only read can come out slightly above it.
        """
        source = self._large()
        target = torch.zeros_like(source)
        reading = self.work(partial(target.copy_, source), cold=False)
        return 2 * source.nbytes / reading.median / 1e3

    def read_bandwidth(self) -> float:
        """GB/s of a large vectorised sum, bytes read: the ceiling of kernels that write next to nothing."""
        source = self._large().view(1024, -1)
        return source.nbytes / self.work(partial(source.sum, 1), cold=False).median / 1e3

    def matmul_rate(self) -> float:
        """TFLOP/s of a large square product: the ceiling that TFLOP/s are held against, in whatever dtype they are.

        8192³ in bfloat16 on a GPU, 2048³ in float32 on a CPU.
        """
        size, dtype = (8192, torch.bfloat16) if self.device.type == "cuda" else (2048, torch.float32)
        a, b, out = (torch.randn((size, size), dtype=dtype, device=self.device) for _ in range(3))
        reading = self.work(lambda: torch.mm(a, b, out=out), cold=False, runs=min(self.runs, 10))
        return 2 * size**3 / reading.median / 1e6

    def _large(self) -> torch.Tensor:
        """Far more than any cache holds, and little enough that two fit."""
        cuda = self.device.type == "cuda"
        size = min(4 * GIB, torch.cuda.mem_get_info(self.device)[0] // 4) if cuda else GIB
        return torch.ones(size // 4, dtype=torch.float32, device=self.device)
