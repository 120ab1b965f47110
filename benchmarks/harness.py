"""The frame that the runners of single ops share: arguments, correctness gate, timing, table, CSV and JSON.

A runner hands over its cases and a function that turns one case into a `Job`. Nothing is timed before its result has
passed the job's gate, on the inputs that are then timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from hywia_kernels import ops
from hywia_kernels.errors import BackendError
from hywia_kernels.ops import registry

from .rows import Appender
from .timing import Environment, Timer

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


@dataclass(frozen=True)
class Figure:
    """One row of results.csv. New columns go to the end; earlier rows hold nothing there."""

    date: str
    op: str
    case: str
    implementation: str
    work_us: float
    work_us_p20: float
    work_us_p80: float
    call_us: float
    call_us_p20: float
    call_us_p80: float
    runs: int
    bytes: int
    gb_s: float
    copy_gb_s: float
    share_of_copy: float
    speedup_over_compile: float | None
    error: float
    device: str
    threads: int
    python: str
    torch: str
    triton: str
    cuda: str
    commit: str
    seed: int
    command: str
    # Of the case's products alone (empty where it has none), and shares of a time: the baseline's over this one's.
    flops: int | None
    tflop_s: float | None
    baseline: str | None
    share_of_baseline: float | None
    matmul_tflop_s: float
    share_of_matmul: float | None
    read_gb_s: float


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


def _arguments(description: str, op: str, argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument(
        "--backends", nargs="*", choices=ops.BACKENDS, help=f"of ops.{op}; default: all for the device but reference"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--quick", action="store_true", help="fewer cases and runs")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes seconds a case")
    parser.add_argument("--runs", type=int, help="readings per figure")
    parser.add_argument("--seed", type=int, help="of the inputs; default: a fresh one, which is recorded")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append a row per figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and figures")
    arguments = parser.parse_args(argv)
    arguments.device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: no GPU is visible to torch")
    if arguments.runs is None:
        arguments.runs = 15 if arguments.quick else 50
    if arguments.runs < 2:
        parser.error("--runs: expected at least 2")
    if arguments.seed is None:
        arguments.seed = torch.seed() % 2**32
    if arguments.backends is None:
        preferred = registry.PREFERENCE[arguments.device.type][op]
        arguments.backends = [name for name in preferred if name != "reference"]
    return arguments


def _measure(op: str, case: Case, job: Job, timer: Timer, environment: Environment) -> tuple[list[Figure], list[str]]:
    readings, failures = {}, []
    cuda = timer.device.type == "cuda"
    for candidate in job.candidates:
        work = (candidate.work if cuda else None) or candidate.call
        try:
            tolerance = job.tolerance if candidate.tolerance is None else candidate.tolerance
            errors = [(candidate.error or job.error)(run) for run in {candidate.call, work}]
            error = max(errors)
            if not all(e <= tolerance for e in errors):  # NaN fails too
                failures.append(f"{case.name}, {candidate.name}: WRONG, errors {errors}, allowed {tolerance:.0e}")
                continue
            device = timer.work(work)
            call = timer.call(candidate.call) if cuda else device
            readings[candidate.name] = (error, device, call)
        except Exception as problem:  # one broken candidate must not cost the run its other figures
            failures.append(f"{case.name}, {candidate.name}: {type(problem).__name__}: {problem}")
    jit = readings.get(COMPILE)
    baseline = readings.get(job.baseline) if job.baseline else None
    flops = getattr(case, "flops", None)
    figures = []
    for name, (error, device, call) in readings.items():
        gb_s = case.bytes / device.median / 1e3
        tflop_s = flops / device.median / 1e6 if flops else None
        figures.append(
            Figure(
                date=environment.date,
                op=op,
                case=case.name,
                implementation=name,
                work_us=device.median,
                work_us_p20=device.low,
                work_us_p80=device.high,
                call_us=call.median,
                call_us_p20=call.low,
                call_us_p80=call.high,
                runs=device.runs,
                bytes=case.bytes,
                gb_s=gb_s,
                copy_gb_s=environment.copy_gb_s,
                share_of_copy=gb_s / environment.copy_gb_s,
                speedup_over_compile=jit[1].median / device.median if jit else None,
                error=error,
                device=environment.device,
                threads=environment.threads,
                python=environment.python,
                torch=environment.torch,
                triton=environment.triton,
                cuda=environment.cuda,
                commit=environment.commit,
                seed=environment.seed,
                command=environment.command,
                flops=flops,
                tflop_s=tflop_s,
                baseline=job.baseline if baseline else None,
                share_of_baseline=baseline[1].median / device.median if baseline else None,
                matmul_tflop_s=environment.matmul_tflop_s,
                share_of_matmul=tflop_s / environment.matmul_tflop_s if tflop_s else None,
                read_gb_s=environment.read_gb_s,
            )
        )
    return figures, failures


_ROW = "{:<42} {:<14} {:>9} {:>19} {:>9} {:>8} {:>6} {:>6} {:>8} {:>7} {:>6} {:>9} {:>8}"
_HEADER = _ROW.format(
    *("case", "by", "work µs", "20 %..80 %", "call µs", "GB/s", "copy", "read"),
    *("TFLOP/s", "matmul", "base", "×compile", "error"),
)


def _line(figure: Figure, environment: Environment) -> str:
    return _ROW.format(
        figure.case,
        figure.implementation,
        f"{figure.work_us:.1f}",
        f"{figure.work_us_p20:.1f}..{figure.work_us_p80:.1f}",
        f"{figure.call_us:.1f}",
        f"{figure.gb_s:.0f}",
        f"{figure.share_of_copy:.0%}",
        f"{figure.gb_s / environment.read_gb_s:.0%}",
        f"{figure.tflop_s:.2f}" if figure.tflop_s else "",
        f"{figure.share_of_matmul:.0%}" if figure.share_of_matmul else "",
        f"{figure.share_of_baseline:.0%}" if figure.share_of_baseline else "",
        f"{figure.speedup_over_compile:.2f}" if figure.speedup_over_compile else "",
        f"{figure.error:.0e}",
    )


def main(
    op: str,
    description: str,
    module: str,
    cases: Callable[[torch.device, bool], Sequence[AnyCase]],
    prepare: Callable[[AnyCase, torch.device, Sequence[str]], Job],
    argv: Sequence[str] | None = None,
) -> int:
    """Run one benchmark; returns the exit code: 0, or 1 when a candidate was wrong or failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _arguments(description, op, argv)
    table = Appender(arguments.csv, Figure) if arguments.csv else None
    torch.manual_seed(arguments.seed)
    device = arguments.device
    timer = Timer(device, arguments.runs)
    environment = Environment.record(timer, module, argv, arguments.seed)
    print("\n".join(f"{name}: {value}" for name, value in asdict(environment).items()))
    print(f"\n{_HEADER}", flush=True)
    figures: list[Figure] = []
    failures: list[str] = []
    began = time.monotonic()
    for case in cases(device, arguments.quick):
        if arguments.only not in case.name:
            continue
        with torch.no_grad():
            job = prepare(case, device, arguments.backends)
            if arguments.no_compile:
                job = replace(job, candidates=[c for c in job.candidates if c.name != COMPILE])
            found, failed = _measure(op, case, job, timer, environment)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for line in (*(_line(figure, environment) for figure in found), *failed):
            print(line, flush=True)
        if table:
            table.append(found)
        figures += found
        failures += failed
    if arguments.json:
        record = {"environment": asdict(environment), "figures": [asdict(f) for f in figures], "failures": failures}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{len(figures)} figures in {time.monotonic() - began:.0f} s")
    if failures:
        print(f"\n{len(failures)} failed:", *failures, sep="\n")
    return 1 if failures or not figures else 0
