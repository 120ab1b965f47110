"""Time of a linear layer against its width, and the alignment that follows: `python -m benchmarks.bench_width --help`.

A pruned layer has products of three forms, `[tokens, hidden] x [hidden, width]` (q, k, v, gate, up), `[tokens, width] x
[width, hidden]` (o, down). Both are timed at every width of a coarse grid and, around several bases, at widths whose
largest power-of-two divisor is 1, 2, 4, ...: what a width costs beyond its FLOPs is what alignment buys.
`hywia_kernels.targets` holds the outcome; `rule` is how it is read from the rows.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .rows import Appender
from .timing import Environment, Timer

FORMS = ("up", "down")
ALIGNMENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOLERANCE = 0.03  # a wider alignment must gain more than this to be asked for


@dataclass(frozen=True)
class WidthRow:
    """One row of width.csv: the product `[tokens, k] x [k, n]`."""

    date: str
    device: str
    torch: str
    cuda: str
    threads: int
    commit: str
    command: str
    dtype: str
    form: str
    tokens: int
    hidden: int
    width: int
    us: float
    us_p20: float
    us_p80: float
    tflop_s: float
    gb_s: float  # of the weight's bytes alone: what decoding waits for
    matmul_tflop_s: float
    copy_gb_s: float


def alignment(width: int) -> int:
    """Largest power of two, at most 256, that divides `width`."""
    return math.gcd(width, ALIGNMENTS[-1])


def fine_widths(bases: Iterable[int]) -> list[int]:
    """Around each base (a multiple of 256) widths of every alignment, all within 256 of it."""
    return sorted({base + a for base in bases for a in ALIGNMENTS} | set(bases))


def rule(rows: Sequence[tuple[int, int, float]], tolerance: float = TOLERANCE) -> tuple[int, dict[int, float]]:
    """`(alignment, cost of each)` from `(group, width, time)`; a group holds times of one form, one count of tokens,
    and one base, which are compared with each other.

    An alignment's cost is the mean over groups of time per unit width, relative to the group's best. The rule is the
    smallest alignment that no wider one beats by more than `tolerance`.
    """
    by_group: dict[int, dict[int, float]] = {}
    for group, width, time in rows:
        found = by_group.setdefault(group, {})
        a = alignment(width)
        found[a] = min(found.get(a, math.inf), time / width)
    costs: dict[int, list[float]] = {}
    for found in by_group.values():
        best = min(found.values())
        for a, cost in found.items():
            costs.setdefault(a, []).append(cost / best)
    mean = {a: sum(c) / len(c) for a, c in sorted(costs.items())}
    chosen = next(a for a in mean if all(mean[a] <= mean[b] * (1 + tolerance) for b in mean if b > a))
    return chosen, mean


def measure(timer: Timer, form: str, tokens: int, hidden: int, width: int, dtype: torch.dtype):
    k, n = (hidden, width) if form == "up" else (width, hidden)
    x = torch.randn((tokens, k), dtype=dtype, device=timer.device)
    weight = torch.randn((n, k), dtype=dtype, device=timer.device)
    out = torch.empty((tokens, n), dtype=dtype, device=timer.device)
    # A weight that decoding reads comes from memory; one that prefill multiplies by is a small part of the time.
    return timer.work(lambda: torch.mm(x, weight.T, out=out), cold=tokens < 256)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_width", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--grid", type=int, nargs=3, metavar=("FIRST", "LAST", "STEP"), default=[1024, 11008, 64])
    parser.add_argument("--bases", type=int, nargs="+", default=[2048, 3072, 4096, 5120, 6144, 8192])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--csv", type=Path, help="append rows here")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    name = given.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    appender = Appender(given.csv, WidthRow) if given.csv else None
    torch.manual_seed(0)
    timer = Timer(device, given.runs)
    own = sys.argv[1:] if arguments is None else list(arguments)
    found = Environment.record(timer, "benchmarks.bench_width", own, 0)
    first, last, step = given.grid
    grid, fine = list(range(first, last + 1, step)), fine_widths(given.bases)
    rows, compared = [], []
    for index, (form, tokens) in enumerate((f, t) for f in FORMS for t in given.tokens):
        for width in sorted({*grid, *fine}):
            reading = measure(timer, form, tokens, given.hidden, width, getattr(torch, name))
            us = reading.median
            size = given.hidden * width
            rows.append(
                WidthRow(
                    found.date, found.device, found.torch, found.cuda, found.threads, found.commit, found.command,
                    name, form, tokens, given.hidden, width, us, reading.low, reading.high,
                    2 * tokens * size / us / 1e6, size * getattr(torch, name).itemsize / us / 1e3,
                    found.matmul_tflop_s, found.copy_gb_s,
                )
            )  # fmt: skip
            bases = [b for b in given.bases if b <= width <= b + ALIGNMENTS[-1]]
            if width in fine and bases:
                compared.append((index * 100_000 + bases[-1], width, us))
    if appender is not None:
        appender.append(rows)
    print(f"{found.device}, torch {found.torch}: {name}, hidden {given.hidden}, tokens {given.tokens}")
    print(f"product {found.matmul_tflop_s:.0f} TFLOP/s, copy {found.copy_gb_s:.0f} GB/s")
    chosen, mean = rule(compared)
    print("alignment: time per width, relative to the best nearby")
    for a, cost in mean.items():
        print(f"  {a:>4} {cost:6.3f}")
    print(f"rule: multiples of {chosen}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
