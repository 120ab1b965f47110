"""Time of a linear layer against its width, and the alignment that follows: `python -m benchmarks.bench_width --help`.

A pruned layer has products of two forms, `[tokens, hidden] x [hidden, width]` (q, k, v, gate, up) and `[tokens, width]
x [width, hidden]` (o, down). Both are timed at every width of a coarse grid and, around several bases, at widths whose
largest power-of-two divisor is 1, 2, 4, ...: what a width costs beyond its FLOPs is what alignment buys.
`hywia_kernels.deploy.device_profiles` reads the outcome; `rule` is how the alignment follows from the rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from hywia_kernels.cli import charts

from . import models
from .rows import Row, read_rows
from .session import Session, add_dtype, argv_of, common_arguments, make_parser, parse
from .timing import Timer

FORMS = ("up", "down")
GRID = 64  # a profile keeps the rates of the widths that are multiples of this
ALIGNMENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOLERANCE = 0.03  # a wider alignment must gain more than this to be asked for


MODULE = "benchmarks.bench_width"
# Of the product `[tokens, k] x [k, n]`; gb_s counts the weight's bytes alone: what decoding waits for.
COLUMNS = {
    "dtype": str,
    "form": str,
    "tokens": int,
    "hidden": int,
    "width": int,
    **dict.fromkeys(("us", "us_p20", "us_p80", "tflop_s", "gb_s"), float),
}


def fine_widths(bases: Iterable[int]) -> list[int]:
    """Around each base (a multiple of 256) widths of every alignment, all within 256 of it."""
    return sorted({base + a for base in bases for a in ALIGNMENTS} | set(bases))


def alignment_costs(rows: Iterable[Row], bases: Sequence[int]) -> dict[int, float]:
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
    """Rounds to five digits, as in the rows; a number of decimals would make zero of a slow device's rates."""
    return float(f"{rate:.5g}")


def profile(rows: Sequence[Row], bases: Sequence[int], capability: tuple[int, int] | None = None) -> dict:
    """The device's profile from a sweep's rows. `capability` is the GPU's; others of the same one borrow its
    figures."""
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


def measure(timer: Timer, form: str, tokens: int, hidden: int, width: int, dtype: torch.dtype):
    k, n = (hidden, width) if form == "up" else (width, hidden)
    x = torch.randn((tokens, k), dtype=dtype, device=timer.device)
    weight = torch.randn((n, k), dtype=dtype, device=timer.device)
    out = torch.empty((tokens, n), dtype=dtype, device=timer.device)
    # A weight that decoding reads comes from memory; one that prefill multiplies by is a small part of the time.
    return timer.work(lambda: torch.mm(x, weight.T, out=out), cold=tokens < 256)


def figure(rows: Sequence[Row]) -> str:
    """TFLOP/s against width, a curve a form and count of tokens, on the coarse grid."""
    series: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        if r.width % GRID == 0:
            series.setdefault(f"{r.form}, {r.tokens} tokens", []).append((r.width, r.tflop_s))
    title = f"{rows[0].device}, {rows[0].dtype}: linear layers beside a hidden size of {rows[0].hidden}"
    return charts.standalone([charts.lines(title, series, x_label="width", y_label="TFLOP/s")])


def show(measured: dict, path: Path | None) -> None:
    print("alignment: time beside the line between multiples of 256")
    for a, cost in measured["alignment_costs"].items():
        print(f"  {a:>4} {cost:6.3f}")
    print(f"rule: multiples of {measured['align']}")
    if path is not None:
        path.write_text(json.dumps(measured) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(MODULE, __doc__)
    common_arguments(parser, runs=7)
    add_dtype(parser)
    cuda = torch.cuda.is_available()  # LLaMA-7B's sizes there, SmolLM2's elsewhere
    parser.add_argument("--hidden", type=int, default=4096 if cuda else 576)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096] if cuda else [128, 512])
    grid = [1024, 11008, 64] if cuda else [256, 1536, 64]
    parser.add_argument("--grid", type=int, nargs=3, metavar=("FIRST", "LAST", "STEP"), default=grid)
    bases = [2048, 3072, 4096, 5120, 6144, 8192] if cuda else [512, 768, 1024, 1280]
    parser.add_argument("--bases", type=int, nargs="+", default=bases)
    parser.add_argument(
        "--profile", type=Path, help="write the device's profile here (hywia_kernels/deploy/profiles/NAME.json)"
    )
    parser.add_argument("--rows", type=Path, help="measure nothing: the profile of an earlier run's --csv")
    parser.add_argument("--figure", type=Path, help="write rates against width as SVG")
    argv = argv_of(arguments)
    given = parse(parser, argv)
    if given.rows is not None:
        rows = [r for r in read_rows(given.rows, COLUMNS) if r.tokens in given.tokens]
    else:
        rows = sweep(given, argv)
    if given.figure is not None:
        given.figure.write_text(figure(rows))
    device = given.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    show(profile(rows, given.bases, capability), given.profile)
    return 0


def sweep(given: argparse.Namespace, argv: Sequence[str]) -> list[Row]:
    """Every width of the grid and around the bases, measured."""
    timer = Timer(given.device, given.runs)
    session = Session(given, MODULE, argv, COLUMNS, timer)
    dtype = models.DTYPES[given.dtype]
    print(f"{given.dtype}, hidden {given.hidden}, tokens {given.tokens}")
    first, last, step = given.grid
    widths = sorted({*range(first, last + 1, step), *fine_widths(given.bases)})
    for form, tokens in ((f, t) for f in FORMS for t in given.tokens):
        for width in widths:
            reading = measure(timer, form, tokens, given.hidden, width, dtype)
            us, size = reading.median, given.hidden * width
            session.add(
                dtype=given.dtype,
                form=form,
                tokens=tokens,
                hidden=given.hidden,
                width=width,
                **reading.columns("us"),
                tflop_s=2 * tokens * size / us / 1e6,
                gb_s=size * dtype.itemsize / us / 1e3,
            )
    session.finish()
    return session.rows


if __name__ == "__main__":
    sys.exit(main())
