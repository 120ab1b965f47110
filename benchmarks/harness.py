"""The frame that the runners of single ops share: arguments, correctness gate, timing, table, CSV and JSON.

A runner hands over its cases and a function that turns one case into a `Job`. Nothing is timed before its result has
passed the job's gate, on the inputs that are then timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from hywia_kernels import ops
from hywia_kernels.errors import BackendError
from hywia_kernels.ops import registry

from .rows import Row
from .session import Session, argv_of, at_least, common_arguments, make_parser, parse
from .timing import Timer

EAGER, COMPILE = "eager", "torch.compile"


class Case(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def bytes(self) -> int: ...

    # A case that contains a matrix product has `flops: int` as well.


AnyCase = TypeVar("AnyCase", bound=Case)


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case."""

    name: str
    call: Callable[[], object]  # what a user runs
    work: Callable[[], object] | None = None  # on a GPU: its device work alone, where `call` waits for it
    # Where its result is not the job's, or not as exact: its own gate.
    error: Callable[[Callable[[], object]], float] | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Job:
    """One case on one device."""

    candidates: Sequence[Candidate]
    error: Callable[[Callable[[], object]], float]  # runs a candidate and holds its result against the reference
    tolerance: float
    baseline: str | None = None  # the candidate that `share_of_baseline` holds the others against


# flops and tflop_s are of the case's products alone, empty where it has none; share_of_baseline is the baseline's time
# over this one's.
COLUMNS = {
    "op": str,
    "case": str,
    "implementation": str,
    **dict.fromkeys(("work_us", "work_us_p20", "work_us_p80", "call_us", "call_us_p20", "call_us_p80"), float),
    "runs": int,
    "bytes": int,
    "gb_s": float,
    "share_of_copy": float,
    "speedup_over_compile": float,
    "error": float,
    "flops": int,
    "tflop_s": float,
    "baseline": str,
    "share_of_baseline": float,
    "share_of_matmul": float,
}


def backend_candidates(
    op: str, names: Sequence[str], operands: tuple[Tensor | None, ...], make: Callable[[str], Candidate]
) -> Iterator[Candidate]:
    """A candidate per backend that takes these operands; says which do not, and why."""
    for name in names:
        try:
            ops.choose(op, name, *operands)
        except BackendError as refusal:
            print(f"  skipped: {refusal}")
        else:
            yield make(name)


def compiled(function: Callable) -> Callable:
    """`function` compiled for the sizes at hand.

    Every case starts from an empty cache: no recompilation limit is reached, so nothing falls back to eager unseen,
    and a call checks the guards of one entry only.
    """
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def poison(*shapes: Tensor, dtype: torch.dtype) -> None:
    """Leave NaN in freed memory of these sizes, so that an element nobody writes is likely to show."""
    held = [torch.full_like(tensor, float("nan"), dtype=dtype) for tensor in shapes]
    held.clear()


def _arguments(description: str, op: str, module: str, argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(module, description)
    common_arguments(parser)
    parser.add_argument(
        "--backends", nargs="*", choices=ops.BACKENDS, help=f"of ops.{op}; default: all for the device but reference"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--quick", action="store_true", help="fewer cases and runs")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes seconds a case")
    parser.add_argument("--runs", type=at_least(2), help="readings per figure; default: 50, with --quick 15")
    arguments = parse(parser, argv)
    if arguments.runs is None:
        arguments.runs = 15 if arguments.quick else 50
    if arguments.backends is None:
        preferred = registry.PREFERENCE[arguments.device.type][op]
        arguments.backends = [name for name in preferred if name != "reference"]
    return arguments


def _measure(op: str, case: Case, job: Job, timer: Timer, session: Session) -> None:
    """Add a row per candidate that passes the gate, and print it."""
    readings = {}
    cuda = timer.device.type == "cuda"
    for candidate in job.candidates:
        work = (candidate.work if cuda else None) or candidate.call
        try:
            tolerance = job.tolerance if candidate.tolerance is None else candidate.tolerance
            errors = [(candidate.error or job.error)(run) for run in {candidate.call, work}]
            error = max(errors)
            if not all(e <= tolerance for e in errors):  # NaN fails too
                session.fail(f"{case.name}, {candidate.name}: WRONG, errors {errors}, allowed {tolerance:.0e}")
                continue
            device = timer.work(work)
            call = timer.call(candidate.call) if cuda else device
            readings[candidate.name] = (error, device, call)
        except Exception as problem:  # one broken candidate must not cost the run its other figures
            session.fail(f"{case.name}, {candidate.name}: {type(problem).__name__}: {problem}")
    jit = readings.get(COMPILE)
    baseline = readings.get(job.baseline) if job.baseline else None
    flops = getattr(case, "flops", None)
    ceilings = session.environment
    assert ceilings.copy_gb_s is not None
    assert ceilings.matmul_tflop_s is not None
    for name, (error, device, call) in readings.items():
        gb_s = case.bytes / device.median / 1e3
        tflop_s = flops / device.median / 1e6 if flops else None
        row = session.add(
            op=op,
            case=case.name,
            implementation=name,
            **device.columns("work_us"),
            **call.columns("call_us"),
            runs=device.runs,
            bytes=case.bytes,
            gb_s=gb_s,
            share_of_copy=gb_s / ceilings.copy_gb_s,
            speedup_over_compile=jit[1].median / device.median if jit else None,
            error=error,
            flops=flops,
            tflop_s=tflop_s,
            baseline=job.baseline if baseline else None,
            share_of_baseline=baseline[1].median / device.median if baseline else None,
            share_of_matmul=tflop_s / ceilings.matmul_tflop_s if tflop_s else None,
        )
        print(_line(row), flush=True)


_ROW = "{:<42} {:<14} {:>9} {:>19} {:>9} {:>8} {:>6} {:>6} {:>8} {:>7} {:>6} {:>9} {:>8}"
_HEADER = _ROW.format(
    *("case", "by", "work µs", "20 %..80 %", "call µs", "GB/s", "copy", "read"),
    *("TFLOP/s", "matmul", "base", "×compile", "error"),
)


def _line(row: Row) -> str:
    return _ROW.format(
        row.case,
        row.implementation,
        f"{row.work_us:.1f}",
        f"{row.work_us_p20:.1f}..{row.work_us_p80:.1f}",
        f"{row.call_us:.1f}",
        f"{row.gb_s:.0f}",
        f"{row.share_of_copy:.0%}",
        f"{row.gb_s / row.read_gb_s:.0%}",
        f"{row.tflop_s:.2f}" if row.tflop_s else "",
        f"{row.share_of_matmul:.0%}" if row.share_of_matmul else "",
        f"{row.share_of_baseline:.0%}" if row.share_of_baseline else "",
        f"{row.speedup_over_compile:.2f}" if row.speedup_over_compile else "",
        f"{row.error:.0e}",
    )


def main(
    op: str,
    description: str,
    module: str,
    cases: Mapping[str, tuple[Sequence[AnyCase], Sequence[AnyCase]]],
    prepare: Callable[[AnyCase, torch.device, Sequence[str]], Job],
    argv: Sequence[str] | None = None,
) -> int:
    """Run one benchmark; returns the exit code: 0, or 1 when a candidate was wrong or failed.

    Args:
        cases: by kind of device all cases, and those of `--quick`.
    """
    argv = argv_of(argv)
    arguments = _arguments(description, op, module, argv)
    device = arguments.device
    timer = Timer(device, arguments.runs)
    session = Session(arguments, module, argv, COLUMNS, timer)
    print(f"\n{_HEADER}", flush=True)
    began = time.monotonic()
    for case in cases[device.type][arguments.quick]:
        if arguments.only not in case.name:
            continue
        with torch.no_grad():
            job = prepare(case, device, arguments.backends)
            if arguments.no_compile:
                job = replace(job, candidates=[c for c in job.candidates if c.name != COMPILE])
            _measure(op, case, job, timer, session)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"\n{len(session.rows)} figures in {time.monotonic() - began:.0f} s")
    return session.finish() or int(not session.rows)
