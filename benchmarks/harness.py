"""The frame that the runners share: arguments, correctness gate, timing, table, CSV and JSON.

A runner hands over its cases and a function that turns one case into a `Job`. Nothing is timed before its result has
passed the job's gate, on the inputs that are then timed.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from hywia_kernels import ops
from hywia_kernels.errors import BackendError
from hywia_kernels.ops import registry

from .timing import Environment, Timer

EAGER, COMPILE = "eager", "torch.compile"


class Case(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def bytes(self) -> int: ...


AnyCase = TypeVar("AnyCase", bound=Case)


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case."""

    name: str
    call: Callable[[], object]  # what a user runs
    work: Callable[[], object] | None = None  # on a GPU: its device work alone, where `call` waits for it


@dataclass(frozen=True)
class Job:
    """One case on one device."""

    candidates: Sequence[Candidate]
    error: Callable[[Callable[[], object]], float]  # runs a candidate and holds its result against the reference
    tolerance: float


@dataclass(frozen=True)
class Figure:
    """One row of results.csv."""

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


COLUMNS = [field.name for field in fields(Figure)]


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


class _Csv:
    """Appends figures; refuses a file with other columns before anything has been measured."""

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and path.stat().st_size:
            with path.open(newline="") as file:
                header = next(csv.reader(file))
            if header != COLUMNS:
                raise SystemExit(f"--csv: {path} has other columns than this version writes; name another file")
        else:
            with path.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(COLUMNS)

    def append(self, figures: Sequence[Figure]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            for figure in figures:
                row = asdict(figure)
                writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def _measure(op: str, case: Case, job: Job, timer: Timer, environment: Environment) -> tuple[list[Figure], list[str]]:
    readings, failures = {}, []
    cuda = timer.device.type == "cuda"
    for candidate in job.candidates:
        work = (candidate.work if cuda else None) or candidate.call
        try:
            errors = [job.error(run) for run in {candidate.call, work}]
            error = max(errors)
            if not all(e <= job.tolerance for e in errors):  # NaN fails too
                failures.append(f"{case.name}, {candidate.name}: WRONG, errors {errors}, allowed {job.tolerance:.0e}")
                continue
            device = timer.work(work)
            call = timer.call(candidate.call) if cuda else device
            readings[candidate.name] = (error, device, call)
        except Exception as problem:  # one broken candidate must not cost the run its other figures
            failures.append(f"{case.name}, {candidate.name}: {type(problem).__name__}: {problem}")
    baseline = readings.get(COMPILE)
    figures = []
    for name, (error, device, call) in readings.items():
        gb_s = case.bytes / device.median / 1e3
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
                speedup_over_compile=baseline[1].median / device.median if baseline else None,
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
            )
        )
    return figures, failures


_ROW = "{:<34} {:<14} {:>9} {:>19} {:>9} {:>8} {:>6} {:>6} {:>9} {:>8}"
_HEADER = _ROW.format("case", "by", "work µs", "20 %..80 %", "call µs", "GB/s", "copy", "read", "×compile", "error")


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
    table = _Csv(arguments.csv) if arguments.csv else None
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
            found, failed = _measure(op, case, prepare(case, device, arguments.backends), timer, environment)
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
