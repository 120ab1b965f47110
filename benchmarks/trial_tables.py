"""The tables of docs/kernels.md: `linear_importance` beside cuBLAS, and from trials.csv what was tried of each kernel.

Trials are readings of variants that were mostly not kept, so trials.csv has no runs. Its columns: a study; what was
tried (`arm`), of what (`setting`); the figure (`value`), where there is a range its other end (`to`), and its unit; and
where it was read.
"""

from __future__ import annotations

from .document_rows import Line, latest, markdown, percent, read, sources
from .environment import REPOSITORY
from .rows import read as read_file

PATH = REPOSITORY / "benchmarks" / "trials.csv"
_SHAPES = (
    "4096x4096 rows",
    "11008x4096 rows",
    "4096x11008 cols",
    "8192x8192 rows",
    "28672x8192 rows",
    "8192x28672 cols",
)
_FORMS = {
    "first mean": "first order, mean only (`per_sample=False`)",
    "first": "first order, sums per sample",
    "first mapped": "first order, sums from `mapped`",
    "all": "all orders, sums per sample",
    "all mapped": "all orders, sums from `mapped`",
    "second": "second order",
}
_BACKENDS = ("cuda", "cuda, sums kept", "triton")


def studies() -> list[str]:
    return list(dict.fromkeys(row["study"] for row in read_file(PATH)))


def trials(study: str) -> str:
    """A line for each variant of a study and a column for each setting; a line for each figure where that would leave
    most of the table empty."""
    rows = [row for row in read_file(PATH) if row["study"] == study]
    places = list(dict.fromkeys(row["where"] for row in rows))
    settings = list(dict.fromkeys((row["setting"], row["unit"]) for row in rows))
    variants = list(dict.fromkeys((row["arm"], row["where"]) for row in rows))
    several = len(places) > 1
    if 2 * len(rows) < len(variants) * len(settings):
        heads = ["tried", "measured", "figure"]
        lines = [[row["arm"], row["setting"], f"{_shown(row)} {row['unit']}".strip(), row["where"]] for row in rows]
    else:
        cells = {(row["arm"], row["where"], row["setting"], row["unit"]): row for row in rows}
        heads = ["tried", *(", ".join(filter(None, setting)) for setting in settings)]
        lines = [
            [arm, *(_shown(cells.get((arm, where, *setting))) for setting in settings), where]
            for arm, where in variants
        ]
    if several:
        return markdown([*heads, "on"], lines)
    return markdown(heads, [line[:-1] for line in lines]) + f"\n\n*Trials: {places[0]}.*"


def _shown(row: Line | None) -> str:
    if row is None:
        return ""
    return f"{row['value']} to {row['to']}" if row["to"] else row["value"]


def linear() -> str:
    """Shares of cuBLAS's weight-gradient product, bf16, by form and shape."""
    found = [row for row in read("results") if row["op"] == "linear_importance" and row["cuda"]]
    by = latest(found, "device", "case", "implementation")
    lines, used = [], []
    for device in dict.fromkeys(key[0] for key in by):
        for form, told in _FORMS.items():
            for samples in ("10x128", "128x128", "512x128"):
                for name in _BACKENDS:
                    cases = [f"{shape.replace(' ', ' bf16 ')} {samples} {form}" for shape in _SHAPES]
                    rows = [by.get((device, case, name)) for case in cases]
                    if any(rows):
                        used += [row for row in rows if row]
                        shown = [percent(row["share_of_baseline"]) if row else "" for row in rows]
                        lines.append([told, name, samples.replace("x", " × "), device.split()[1], *shown])
    shapes = [shape.replace("x", "×").replace("cols", "columns") for shape in _SHAPES]
    return markdown(["form", "by", "samples", "GPU", *shapes], lines) + sources(used)
