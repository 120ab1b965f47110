"""Cutting a whole model: time, and memory beside the model: `python -m benchmarks.bench_cut --help`.

Random scores, because which units go does not change what moves; the plan is made before the clock starts. `seconds`
is the wall clock of `hywia_kernels.prune` with the device idle before and after it, checks of the plan included;
`extra` is the most memory that was allocated beside what the uncut model holds, in units of its largest matrix.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

import hywia_kernels as hk
from hywia_kernels.arch.facts import weight_bytes

from . import models
from .memory import free
from .session import Session, argv_of, common_arguments, make_parser, parse
from .timing import Timer

MODULE = "benchmarks.bench_cut"
# On a GPU only: gpu_seconds, between events before and after on the stream that cuts, and extra_bytes, the peak beside
# the model.
COLUMNS = {
    "model": str,
    "dtype": str,
    "ratio": float,
    "seconds": float,
    "gpu_seconds": float,
    "bytes_before": int,
    "bytes_after": int,
    "extra_bytes": int,
    "largest_matrix": int,
}


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
    parser = make_parser(MODULE, __doc__)
    common_arguments(parser, model=models.NAMES)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    argv = argv_of(arguments)
    given = parse(parser, argv)
    device = given.device
    session = Session(given, MODULE, argv, COLUMNS, Timer(device, 5))
    if device.type == "cuda":  # loads the kernels
        cut(models.build("tiny", None, given.dtype, device), 0.1, device)
    for ratio in given.ratios:
        took = cut(models.build(given.shape, given.layers, given.dtype, device), ratio, device)
        row = session.add(model=given.shape, dtype=given.dtype, ratio=ratio, **took)
        gpu = f", {row.gpu_seconds:.4f} s between events" if row.gpu_seconds is not None else ""
        extra = f", {row.extra_bytes / row.largest_matrix:.2f} largest matrices extra" if row.extra_bytes else ""
        print(f"{given.shape} {given.dtype} -{ratio:.0%}: {row.seconds:.4f} s{gpu}{extra}")
        free(device)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
