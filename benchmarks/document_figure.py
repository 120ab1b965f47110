"""The figure of README, docs/quality.svg: perplexity by the share of the parameters that is gone, method by method, and
the speed of what is left.

Its `<desc>` says every point in words, for readers who see no figure, and for the test that holds the file to the rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape, unescape
from pathlib import Path

from hywia_kernels.cli import charts

from .document_rows import Line, latest, read
from .environment import REPOSITORY
from .quality_rows import METHODS, dense, found, of, samples_of
from .recoveries import NONE

PATH = REPOSITORY / "docs" / "quality.svg"
_TEXT = "wikitext2_raw_test.txt"
_RECOVERIES = {NONE: "", "self": ", recovered"}  # this package's recovery, of every method's cut
_PHASES = {("prefill", "1", "2048"): "prompt of 2,048", ("decode", "1", "512"): "token by token"}
_WIDTHS = {"this package": ("22x9232", "16x5120"), "LLM-Pruner": ("24x8256@4:30", "13x4403@3:31")}

Series = Mapping[str, list[tuple[float, float]]]  # name -> (share of the parameters that is gone in %, value)


def _share(value: float) -> float:
    return round(100 * value, 1)


def _settings(lines: Sequence[Line]) -> tuple[str, ...]:
    """Shares of all parameters in every layer where other methods have rows of them, else shares of the middle layers'
    units."""
    deep = ("P30", "P50")
    others = [method for method in METHODS if method != "recipe"]
    return deep if any(row["setting"] in deep and row["criterion"] in others for row in lines) else ("A50", "B60")


def perplexities() -> tuple[Series, dict[str, tuple[int, int]]]:
    """Curves on WikiText-2, and how they look: a colour for each method, dashed as cut and plain recovered."""
    lines = found()
    start = dense(lines).perplexity(_TEXT)
    curves: dict[str, list[tuple[float, float]]] = {}
    looks = {}
    settings = _settings(lines)
    for colour, (method, told) in enumerate(METHODS.items()):
        for recovery, suffix in _RECOVERIES.items():
            points = []
            counts = samples_of(lines, method, recovery)
            for setting in settings if counts else ():
                runs = of(lines, method, counts[-1], setting, recovery)
                value, removed = runs.perplexity(_TEXT), runs.mean("removed")
                if value is not None and removed is not None:
                    points.append((_share(removed), round(value[0], 1)))
            if points:
                name = told.strip("*") + suffix
                curves[name] = [*([(0.0, round(start[0], 1))] if start else []), *points]
                looks[name] = (colour, 0 if suffix else 1)
    return curves, looks


def speeds() -> tuple[Series, dict[str, tuple[int, int]]]:
    """Tokens a second of LLaMA-7B's shapes beside the dense model's, for each of two sets of widths."""
    rows = (row for row in read("speed", "H100") if row["mode"] == "static" and row["shape"] == "7b")
    by = latest(rows, "model", "phase", "batch", "context")
    curves: dict[str, list[tuple[float, float]]] = {}
    looks = {}
    for whose, colour in (("this package", 3), ("LLM-Pruner", 0)):
        for style, (phase, told) in enumerate(_PHASES.items()):
            own = [by[(model, *phase)] for model in _WIDTHS[whose]]
            points = [(_share(float(row["removed"])), round(float(row["speedup"]), 2)) for row in own]
            curves[f"{whose}, {told}"] = [(0.0, 1.0), *points]
            looks[f"{whose}, {told}"] = (colour, style)
    return curves, looks


def described() -> str:
    """All points in words."""
    parts = []
    for title, (curves, _) in (("Perplexity", perplexities()), ("Speed in times dense", speeds())):
        for name, points in curves.items():
            parts.append(f"{title}, {name}: " + ", ".join(f"{value:g} at {share:g} %" for share, value in points))
    return "; ".join(parts) + "."


def svg() -> str:
    """The file's content."""
    size = {"width": 560, "height": 380}
    curves, looks = perplexities()
    gone = "% of the parameters gone"
    left = charts.lines(
        "SmolLM2-135M-Instruct: perplexity on WikiText-2",
        curves,
        x_label=gone,
        y_label="perplexity (lower is better)",
        log=True,
        looks=looks,
        **size,
    )
    curves, looks = speeds()
    right = charts.lines(
        "LLaMA-7B's shapes on an H100: speed",
        curves,
        x_label=gone,
        y_label="tokens a second, × dense",
        looks=looks,
        **size,
    )
    file = charts.standalone([left, right], across=True)
    return file.replace("<style>", f"<desc>{escape(described())}</desc><style>", 1)


def description_in(path: Path) -> str:
    """What a file's `<desc>` says; "" where there is none."""
    match = re.search(r"<desc>(.*?)</desc>", path.read_text(encoding="utf-8"), re.DOTALL) if path.exists() else None
    return unescape(match[1]) if match else ""


def write(check: bool = False) -> bool:
    """Write the file where its points are not those of the rows (with `check`: never); whether they were not."""
    if description_in(PATH) == described():
        return False
    if not check:
        PATH.write_text(svg(), encoding="utf-8")
    return True
