"""The README's tables of measurements, from the CSV files: `python -m benchmarks.table --help`.

Of every case and device the latest figures are shown: those of the last run that measured one of this package's
backends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hywia_kernels import ops

from . import rows
from .document_rows import markdown
from .environment import REPOSITORY
from .harness import COMPILE, EAGER

Row = dict[str, str]
# A heading, and a function that makes a cell's text from a case's rows by implementation and from our own row.
Column = tuple[str, Callable[[dict[str, Row], Row], str]]


def _number(key: str, form: str) -> Callable[[dict[str, Row], Row], str]:
    return lambda case, ours: form.format(float(ours[key])) if ours.get(key) else ""


def _times(other: str) -> Callable[[dict[str, Row], Row], str]:
    """How many times faster than another implementation of the same run."""
    return lambda case, ours: f"{float(case[other]['work_us']) / float(ours['work_us']):.2f}" if other in case else ""


_BY: Column = ("by", lambda case, ours: ours["implementation"])
_TIME: Column = ("µs", _number("work_us", "{:.1f}"))
_AGAINST: tuple[Column, ...] = (("× eager", _times(EAGER)), ("× torch.compile", _times(COMPILE)))
_BANDWIDTH: tuple[Column, ...] = (
    _BY,
    _TIME,
    ("GB/s", _number("gb_s", "{:.0f}")),
    ("of copy", _number("share_of_copy", "{:.0%}")),
    *_AGAINST,
)
OPS: dict[str, tuple[Column, ...]] = {
    "taylor_importance": _BANDWIDTH,
    "taylor_importance_batch": _BANDWIDTH,
    "linear_importance": (
        _BY,
        _TIME,
        ("TFLOP/s", _number("tflop_s", "{:.3g}")),
        ("of the product alone", _number("share_of_baseline", "{:.0%}")),
        ("of the matmul ceiling", _number("share_of_matmul", "{:.0%}")),
        *_AGAINST,
    ),
    "compact": _BANDWIDTH,
}


def _source(row: Row) -> str:
    versions = [f"torch {row['torch']}", f"triton {row['triton']}" * bool(row["triton"])]
    versions.append(f"CUDA {row['cuda']}" if row["cuda"] else f"{row['threads']} threads")
    return f"{row['device']} ({', '.join(filter(None, versions))}), {row['date']}, {row['commit']}{_ceilings(row)}"


def _ceilings(row: Row) -> str:
    """The ceilings of the device in that run, where the row has any."""
    forms = {"copy": ("copy_gb_s", "{:.0f} GB/s"), "read": ("read_gb_s", "{:.0f} GB/s")}
    forms["matmul"] = ("matmul_tflop_s", "{:.3g} TFLOP/s")
    ceilings = [f"{name} {form.format(float(row[key]))}" for name, (key, form) in forms.items() if row.get(key)]
    return f", ceilings: {', '.join(ceilings)}" if ceilings else ""


def _latest(measured: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(device, case) -> implementation -> row, of the last run that measured one of the package's backends there."""
    runs: dict[tuple[str, str], dict[tuple[str, str], dict[str, Row]]] = {}
    for row in measured:
        by_run = runs.setdefault((row["device"], row["case"]), {})
        by_run.setdefault((row["date"], row["command"]), {})[row["implementation"]] = row
    latest = {}
    for key, by_run in runs.items():
        ours = [run for run in sorted(by_run) if any(name in ops.BACKENDS for name in by_run[run])]
        if ours:
            latest[key] = by_run[ours[-1]]
    return latest


def ops_tables(measured: Sequence[Row]) -> list[str]:
    """One table per op and device: a line per case, with the package's fastest backend."""
    tables = []
    for op, columns in OPS.items():
        latest = _latest([row for row in measured if row["op"] == op])
        for device in dict.fromkeys(device for device, _ in latest):
            lines: list[list[str]] = []
            shown: list[Row] = []
            for (where, name), case in latest.items():
                if where == device:
                    best = min((r for n, r in case.items() if n in ops.BACKENDS), key=lambda r: float(r["work_us"]))
                    lines.append([name, *(text(case, best) for _, text in columns)])
                    shown.append(best)
            table = markdown(["case", *(heading for heading, _ in columns)], lines)
            sources = "; ".join(dict.fromkeys(_source(row) for row in shown))
            tables.append(f"`{op}`, {sources}.\n\n{table}")
    return tables


def engine_tables(measured: Sequence[Row]) -> list[str]:
    """One table per device and model: a line per flow and number of samples."""
    models: dict[tuple[str, ...], dict[tuple[str, str], Row]] = {}
    for row in sorted(measured, key=lambda row: row["date"]):
        model = tuple(row[key] for key in ("device", "shape", "layers", "dtype", "weights"))
        models.setdefault(model, {})[row["flow"], row["samples"]] = row
    tables = []
    for (_, shape, layers, dtype, weights), flows in models.items():
        lines = []
        for row in sorted(flows.values(), key=lambda row: int(row["samples"])):
            mode = f" ({row['memory']})" if row["flow"] == "auto" and row["memory"] else ""
            lines.append(
                [
                    row["flow"] + mode,
                    f"{row['samples']} × {row['length']}",
                    f"{float(row['seconds']):.3f}",
                    f"{1e3 * float(row['seconds_per_sample']):.2f}",
                    f"{float(row['ratio_to_plain']):.2f}" if row["ratio_to_plain"] else "",
                    f"{float(row['peak_bytes']) / 1e9:.1f}" if row["peak_bytes"] else "",
                    f"{float(row['peak_over_weights']):.2f}" if row["peak_over_weights"] else "",
                ]
            )
        headings = ["flow", "samples", "s", "ms a sample", "× forward + backward", "peak GB", "× weights"]
        title = f"Scoring a whole model: {shape}, {layers} layers, {dtype}, {weights} weights"
        tables.append(f"{title}; {_source(list(flows.values())[-1])}.\n\n{markdown(headings, lines)}")
    return tables


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results.csv", metavar="FILE")
    parser.add_argument("--engine", type=Path, default=REPOSITORY / "benchmarks" / "engine.csv", metavar="FILE")
    parser.add_argument("--device", default="", metavar="TEXT", help="devices whose name contains TEXT")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases of ops whose name contains TEXT")
    arguments = parser.parse_args(argv)

    def read(path: Path) -> list[Row]:
        return [row for row in rows.read(path) if arguments.device in row["device"]] if path.exists() else []

    tables = ops_tables([row for row in read(arguments.results) if arguments.only in row["case"]])
    tables += engine_tables(read(arguments.engine))
    print("\n\n".join(tables) if tables else "no figures")
    return 0 if tables else 1


if __name__ == "__main__":
    sys.exit(main())
