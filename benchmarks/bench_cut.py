"""Cutting a whole model: time, and memory beside the model: `python -m benchmarks.bench_cut --help`.

Random scores, because which units go does not change what moves; the plan is made before the clock starts. `seconds`
is the wall clock of `hywia_kernels.prune` with the device idle before and after it, checks of the plan included;
`extra` is the most memory that was allocated beside what the uncut model holds, in units of its largest matrix.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import hywia_kernels as hk
from hywia_kernels.weights import weight_bytes

from . import models
from .rows import Appender
from .timing import Environment, Timer


@dataclass(frozen=True)
class CutRow:
    """One row of cut.csv."""

    date: str
    device: str
    torch: str
    cuda: str
    commit: str
    command: str
    model: str
    dtype: str
    ratio: float
    seconds: float
    gpu_seconds: float | None  # between events before and after, on the stream that cuts
    bytes_before: int
    bytes_after: int
    extra_bytes: int | None  # peak beside the model, GPU only
    largest_matrix: int
    copy_gb_s: float


def cut(model, ratio: float, device: torch.device) -> dict[str, float | int | None]:
    """Prune `model` in place by random scores; what it took."""
    plan = hk.plan(hk.score(model, criterion="random"), ratio=ratio)
    largest = max(p.nbytes for p in model.parameters())
    before = weight_bytes(model)
    cuda = device.type == "cuda"
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        events[0].record()
    began = time.perf_counter()
    hk.prune(model, plan)
    if cuda:
        events[1].record()
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "gpu_seconds": events[0].elapsed_time(events[1]) / 1e3 if cuda else None,
        "bytes_before": before,
        "bytes_after": weight_bytes(model),
        "extra_bytes": torch.cuda.max_memory_allocated(device) - held if cuda else None,
        "largest_matrix": largest,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_cut", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=models.NAMES, default="7b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", choices=tuple(models.DTYPES), default="bfloat16")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--csv", type=Path, help="append rows here")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    appender = Appender(given.csv, CutRow) if given.csv else None
    torch.manual_seed(0)
    timer = Timer(device, 5)
    own = sys.argv[1:] if arguments is None else list(arguments)
    found = Environment.record(timer, "benchmarks.bench_cut", own, 0)
    cut(
        models.build("tiny", None, given.dtype, device), 0.1, device
    ) if device.type == "cuda" else None  # loads kernels
    for ratio in given.ratios:
        took = cut(models.build(given.shape, given.layers, given.dtype, device), ratio, device)
        row = CutRow(
            found.date, found.device, found.torch, found.cuda, found.commit, found.command,
            given.shape, given.dtype, ratio, copy_gb_s=found.copy_gb_s, **took,
        )  # fmt: skip
        if appender is not None:
            appender.append([row])
        gpu = f", {row.gpu_seconds:.4f} s between events" if row.gpu_seconds is not None else ""
        extra = f", {row.extra_bytes / row.largest_matrix:.2f} largest matrices extra" if row.extra_bytes else ""
        print(f"{given.shape} {given.dtype} -{ratio:.0%}: {row.seconds:.4f} s{gpu}{extra}")
        torch.cuda.empty_cache() if device.type == "cuda" else None
    return 0


if __name__ == "__main__":
    sys.exit(main())
