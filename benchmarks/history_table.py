"""The main figures over time: a line for each device and commit that measured any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from . import quality_rows
from .document_rows import Line, figure, markdown, percent, read
from .quality_tables import TEXT, with_error
from .recoveries import NONE

Run = tuple[str, str, str]  # device, day and commit
_PRODUCT = "11008x4096 bf16 rows {samples}x128 second"  # cases of linear_importance whose share of cuBLAS is shown
_QUALITY = {  # heading -> setting and recovery
    f"{setting} perplexity{told}": (setting, recovery)
    for setting in ("A50", "P50")
    for recovery, told in ((NONE, ""), ("self", ", recovered"))
}


def _run(row: Line) -> Run:
    return row["device"], row["date"][:10], row["commit"]


def _last(lines: Iterable[Line], shown: Callable[[Line], str]) -> dict[Run, str]:
    return {_run(row): shown(row) for row in lines}


def _scoring() -> dict[Run, str]:
    wanted = {"shape": "7b", "layers": "32", "flow": "fast", "samples": "10", "length": "128"}
    found = (row for row in read("engine") if wanted.items() <= row.items())
    return _last(found, lambda row: f"{float(row['ratio_to_plain']):.2f}")


def _second_order(samples: int) -> dict[Run, str]:
    wanted = {"op": "linear_importance", "case": _PRODUCT.format(samples=samples), "implementation": "cuda"}
    found = (row for row in read("results") if wanted.items() <= row.items())
    return _last(found, lambda row: percent(row["share_of_baseline"]))


def _recipe() -> dict[Run, str]:
    wanted = {"shape": "7b", "layers": "32", "ratio": "0.5", "recover_tokens": "0", "step": "all"}
    found = (row for row in read("recipe") if wanted.items() <= row.items())
    return _last(found, lambda row: figure(row["seconds"]))


def _perplexity(setting: str, recovery: str) -> dict[Run, str]:
    """Of the recipe, with as many samples as it scored last."""
    lines = quality_rows.found(old=True)
    counts = quality_rows.samples_of(lines, "recipe", recovery)
    told = {}
    for run in dict.fromkeys(map(_run, lines)) if counts else ():
        own = [row for row in lines if _run(row) == run]
        measured = quality_rows.of(own, "recipe", counts[-1], setting, recovery).perplexity(TEXT)
        if measured is not None:
            told[run] = with_error(*measured)
    return told


def history() -> str:
    """By device and day, oldest first; of several runs of one commit in a day the last. Figures without a row are left
    out."""
    columns = {
        "scoring, × forward + backward": _scoring(),
        "second order, of cuBLAS: 10 samples": _second_order(10),
        "second order, of cuBLAS: 128 samples": _second_order(128),
        "the recipe, s": _recipe(),
        **{heading: _perplexity(*wanted) for heading, wanted in _QUALITY.items()},
    }
    columns = {heading: cells for heading, cells in columns.items() if cells}
    runs = sorted(dict.fromkeys(run for cells in columns.values() for run in cells), key=lambda run: run[:2])
    lines = [[*run, *(cells.get(run, "") for cells in columns.values())] for run in runs]
    return markdown(["device", "date", "commit", *columns], lines)
