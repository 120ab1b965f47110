"""Time of a linear layer against its width, and the alignment that follows: `python -m benchmarks.bench_width --help`.

A pruned layer has products of three forms, `[tokens, hidden] x [hidden, width]` (q, k, v, gate, up), `[tokens, width] x
[width, hidden]` (o, down). Both are timed at every width of a coarse grid and, around several bases, at widths whose
largest power-of-two divisor is 1, 2, 4, ...: what a width costs beyond its FLOPs is what alignment buys.
`hywia_kernels.targets` holds the outcome; `rule` is how it is read from the rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from hywia_kernels import charts

from .rows import Appender, read
from .timing import Environment, Timer

FORMS = ("up", "down")
GRID = 64  # of the widths whose rates a target keeps
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


def fine_widths(bases: Iterable[int]) -> list[int]:
    """Around each base (a multiple of 256) widths of every alignment, all within 256 of it."""
    return sorted({base + a for base in bases for a in ALIGNMENTS} | set(bases))


def alignment_costs(rows: Iterable[WidthRow], bases: Sequence[int]) -> dict[int, float]:
    """Alignment -> mean time of a width so aligned, relative to the line between the multiples of 256 beside it."""
    times = {(r.form, r.tokens, r.width): r.us for r in rows}
    costs: dict[int, list[float]] = {a: [] for a in ALIGNMENTS[:-1]}
    for form, tokens in sorted({key[:2] for key in times}):
        for base in bases:
            low, high = times[form, tokens, base], times[form, tokens, base + 256]
            for a, cost in costs.items():
                cost.append(times[form, tokens, base + a] / (low + (high - low) * a / 256))
    return {a: sum(cost) / len(cost) for a, cost in costs.items()} | {256: 1.0}


def rule(costs: dict[int, float], tolerance: float = TOLERANCE) -> int:
    """The smallest alignment that no wider one beats by more than `tolerance`."""
    return next(a for a in sorted(costs) if all(costs[a] <= costs[b] * (1 + tolerance) for b in costs if b > a))


def _digits(rate: float) -> float:
    """Five of them, as in the rows: so many decimals would make nothing of a slow device's rates."""
    return float(f"{rate:.5g}")


def profile(rows: Sequence[WidthRow], bases: Sequence[int], capability: tuple[int, int] | None = None) -> dict:
    """What `hywia_kernels.targets` keeps of a sweep; `capability`: of the GPU, by which others borrow its figures."""
    costs, first = alignment_costs(rows, bases), rows[0]
    rates: dict[str, dict[str, dict[str, float]]] = {}
    for r in rows:
        if r.width % GRID == 0:
            rates.setdefault(r.form, {}).setdefault(str(r.tokens), {})[str(r.width)] = _digits(r.tflop_s)
    return {
        "device": first.device,
        **({} if capability is None else {"capability": list(capability)}),
        "source": f"{first.command}, {first.date[:10]}, torch {first.torch}",
        "dtype": first.dtype,
        "hidden": first.hidden,
        "align": rule(costs),
        "alignment_costs": {str(a): round(c, 4) for a, c in costs.items()},
        "tflop_s": rates,
        "matmul_tflop_s": _digits(first.matmul_tflop_s),
        "copy_gb_s": _digits(first.copy_gb_s),
    }


def read_rows(path: Path) -> list[WidthRow]:
    kinds = {f.name: f.type for f in fields(WidthRow)}
    convert = {"str": str, "int": int, "float": float}
    return [WidthRow(**{k: convert[str(kinds[k])](v) for k, v in row.items()}) for row in read(path)]


def measure(timer: Timer, form: str, tokens: int, hidden: int, width: int, dtype: torch.dtype):
    k, n = (hidden, width) if form == "up" else (width, hidden)
    x = torch.randn((tokens, k), dtype=dtype, device=timer.device)
    weight = torch.randn((n, k), dtype=dtype, device=timer.device)
    out = torch.empty((tokens, n), dtype=dtype, device=timer.device)
    # A weight that decoding reads comes from memory; one that prefill multiplies by is a small part of the time.
    return timer.work(lambda: torch.mm(x, weight.T, out=out), cold=tokens < 256)


def figure(rows: Sequence[WidthRow]) -> str:
    """TFLOP/s against width, a curve a form and count of tokens, on the coarse grid."""
    series: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        if r.width % GRID == 0:
            series.setdefault(f"{r.form}, {r.tokens} tokens", []).append((r.width, r.tflop_s))
    title = f"{rows[0].device}, {rows[0].dtype}: linear layers beside a hidden size of {rows[0].hidden}"
    return charts.standalone([charts.lines(title, series, x_label="width", y_label="TFLOP/s")])


def show(found: dict, path: Path | None) -> None:
    print("alignment: time beside the line between multiples of 256")
    for a, cost in found["alignment_costs"].items():
        print(f"  {a:>4} {cost:6.3f}")
    print(f"rule: multiples of {found['align']}")
    if path is not None:
        path.write_text(json.dumps(found) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_width", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, choices=("bfloat16", "float16", "float32"))
    cuda = torch.cuda.is_available()  # LLaMA-7B's sizes there, SmolLM2's elsewhere
    parser.add_argument("--hidden", type=int, default=4096 if cuda else 576)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096] if cuda else [128, 512])
    grid = [1024, 11008, 64] if cuda else [256, 1536, 64]
    parser.add_argument("--grid", type=int, nargs=3, metavar=("FIRST", "LAST", "STEP"), default=grid)
    bases = [2048, 3072, 4096, 5120, 6144, 8192] if cuda else [512, 768, 1024, 1280]
    parser.add_argument("--bases", type=int, nargs="+", default=bases)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--csv", type=Path, help="append rows here")
    parser.add_argument(
        "--profile", type=Path, help="write the target's profile here (hywia_kernels/targets/NAME.json)"
    )
    parser.add_argument("--rows", type=Path, help="measure nothing: the profile of an earlier run's --csv")
    parser.add_argument("--figure", type=Path, help="write rates against width as SVG")
    given = parser.parse_args(arguments)
    if given.rows is not None:
        rows = [r for r in read_rows(given.rows) if r.tokens in given.tokens]
        if given.figure is not None:
            given.figure.write_text(figure(rows))
        show(profile(rows, given.bases), given.profile)
        return 0
    device = torch.device(given.device)
    name = given.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    appender = Appender(given.csv, WidthRow) if given.csv else None
    torch.manual_seed(0)
    timer = Timer(device, given.runs)
    own = sys.argv[1:] if arguments is None else list(arguments)
    found = Environment.record(timer, "benchmarks.bench_width", own, 0)
    first, last, step = given.grid
    grid, fine = list(range(first, last + 1, step)), fine_widths(given.bases)
    rows: list[WidthRow] = []
    for form, tokens in ((f, t) for f in FORMS for t in given.tokens):
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
    if appender is not None:
        appender.append(rows)
    print(f"{found.device}, torch {found.torch}: {name}, hidden {given.hidden}, tokens {given.tokens}")
    print(f"product {found.matmul_tflop_s:.0f} TFLOP/s, copy {found.copy_gb_s:.0f} GB/s")
    if given.figure is not None:
        given.figure.write_text(figure(rows))
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    show(profile(rows, given.bases, capability), given.profile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
