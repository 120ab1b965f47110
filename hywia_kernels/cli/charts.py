"""Figures as SVG text, drawn by matplotlib: bars, lines and the spread of values.

A figure has no background and takes its ink from the text colour around it, so that one file serves a light page and a
dark one. Nothing in it is fetched, and what it is labelled with is text, never markup or a formula.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from ..errors import HywiaError

__all__ = ["available", "bars", "lines", "require", "spread", "standalone"]

COLOURS = ("#3583c6", "#e07f2e", "#3f9c5a", "#c65590", "#8b7bd0", "#a98732")
_STYLES = ("-", "--", ":")  # the next one is used once all colours are
_INK = "#010203"  # no figure has this colour otherwise; it is replaced by the page's text colour
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_RC: Any = {
    "svg.fonttype": "none",  # text stays text: it can be searched, read out and styled
    "svg.hashsalt": "hywia",  # the same figure gives the same file
    "text.parse_math": False,
    "text.usetex": False,
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 11.0,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": False,
}

Points = Sequence[tuple[float, float]]


def require() -> None:
    """Check that matplotlib is installed.

    Raises:
        HywiaError: it is missing or broken.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise HywiaError(
            f"figures: the package 'matplotlib' is missing or broken ({error}): pip install 'hywia_kernels[report]'"
        ) from error


def available() -> bool:
    """Whether figures can be drawn here."""
    try:
        require()
    except HywiaError:
        return False
    return True


def _text(value: object) -> str:
    """The value as text, with spaces for characters that SVG cannot hold."""
    return _UNPRINTABLE.sub(" ", str(value))


def _draw(
    title: str, x_label: str, y_label: str, width: int, height: int, plot: Callable[[Any], Sequence[tuple[Any, str]]]
) -> str:
    """The SVG element of one pair of axes; `plot` draws on them and returns (artist, name) pairs for the legend."""
    require()
    title, x_label, y_label = _text(title), _text(x_label), _text(y_label)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_RC), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about glyphs that the fonts here lack, which a reader's fonts have
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        named = plot(axes)
        axes.set_xlabel(x_label, color=_INK)
        axes.set_ylabel(y_label, color=_INK)
        axes.tick_params(colors=_INK)
        axes.grid(axis="y", color=_INK, alpha=0.15)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
        rows = 0
        if named:
            widths = [42 + 6.2 * len(name) for _, name in named]
            columns = max(1, min(len(named), int((width - 80) // max(widths))))
            columns = len(named) if sum(widths) <= width - 80 else columns
            rows = -(-len(named) // columns)
            # Names go in afterwards: a legend leaves out those that begin with an underscore.
            legend = axes.legend(
                [artist for artist, _ in named],
                [str(i) for i in range(len(named))],
                loc="lower left",
                bbox_to_anchor=(0.0, 1.0),
                ncols=columns,
                frameon=False,
                borderpad=0.0,
                handlelength=2.0,
                fontsize=10,
                labelcolor=_INK,
            )
            for label, (_, name) in zip(legend.get_texts(), named, strict=True):
                label.set_text(_text(name))
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK, pad=8 + 16 * rows)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True)
    return _inline(written.getvalue(), title, width, height)


def _inline(svg: str, title: str, width: int, height: int) -> str:
    """The SVG element without its header, in the page's colour; its ids are unique, so that a page can hold several."""
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    prefix = f"f{hashlib.sha256((title + body).encode()).hexdigest()[:10]}-"
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", body).replace(_INK, "currentColor")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" stroke-linejoin="round" role="img" '
        f'aria-label="{escape(title, quote=True)}">{body.rstrip()}'
    )


def standalone(figures: Sequence[str], *, across: bool = False) -> str:
    """One SVG file of several figures, one below another, or beside one another with `across`; a browser shows it light
    or dark, as the reader prefers."""
    placed, width, height = [], 0, 0
    for figure in figures:
        size = re.search(r'viewBox="0 0 (\d+) (\d+)"', figure)
        assert size is not None, "made by `_inline`"
        mine = int(size[1]), int(size[2])
        if across:
            placed.append(figure.replace("<svg ", f'<svg x="{width}" ', 1))
            width, height = width + mine[0], max(height, mine[1])
        else:
            placed.append(figure.replace("<svg ", f'<svg y="{height}" ', 1))
            width, height = max(width, mine[0]), height + mine[1]
    width = max(width, 1)
    style = (
        "svg{color:#1b1f24;background:#fff}"
        "@media(prefers-color-scheme:dark){svg{color:#dfe3e8;background:#14171b}}text{fill:currentColor}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{style}</style>{''.join(placed)}</svg>\n"
    )


def _finite(value: float | None) -> float:
    """The value; for None and what is not finite NaN, which leaves a gap."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _label_categories(axes: Any, labels: Sequence[str], width: int) -> None:
    """Label the x axis, with as many of the labels as fit in `width` points."""
    every = max(1, math.ceil(len(labels) * (10 + 7 * max(map(len, labels), default=1)) / max(width - 80, 1)))
    shown = range(0, len(labels), every)
    axes.set_xticks(list(shown), [_text(labels[i]) for i in shown])
    axes.set_xlim(-0.6, max(len(labels), 1) - 0.4)


def bars(
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    x_label: str = "",
    y_label: str = "",
    width: int = 720,
    height: int = 300,
) -> str:
    """An SVG figure with a group of bars for each label, one of each series; None and what is not finite leave gaps.

    Raises:
        HywiaError: matplotlib is not installed.
    """

    def plot(axes: Any) -> list[tuple[Any, str]]:
        named = []
        each = 0.8 / max(len(series), 1)
        for i, (name, values) in enumerate(series.items()):
            there = [j for j, v in enumerate(values) if v is not None and math.isfinite(v)]
            at = [j + (i - (len(series) - 1) / 2) * each for j in there]
            drawn = axes.bar(at, [values[j] for j in there], each * 0.94, color=COLOURS[i % len(COLOURS)])
            for j, bar in zip(there, drawn, strict=True):
                bar.set_gid(f"bar-{i}-{j}")
            named.append((drawn, name))
        _label_categories(axes, labels, width)
        if all(isinstance(v, int) for values in series.values() for v in values if v is not None):
            axes.yaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.set_major_formatter("{x:,.10g}")
        return named

    return _draw(title, x_label, y_label, width, height, plot)


def lines(
    title: str,
    series: Mapping[str, Points],
    *,
    x_label: str = "",
    y_label: str = "",
    width: int = 720,
    height: int = 300,
    zero: bool = True,
    log: bool = False,
    looks: Mapping[str, tuple[int, int]] | None = None,
) -> str:
    """An SVG figure with a curve for each series, through its points in the order of x.

    With `zero` the y axis starts at 0 where no value is negative; with `log` it is logarithmic, and its ticks are at
    values that are plainly read. A series without points has a legend entry only. `looks` gives series the number of a
    colour and that of a line style, so that kin look alike; by default each has the next colour.

    Raises:
        HywiaError: matplotlib is not installed.
    """

    def plot(axes: Any) -> list[tuple[Any, str]]:
        named = []
        for i, (name, points) in enumerate(series.items()):
            ordered = sorted(points)
            colour, style = (looks or {}).get(name, (i, i // len(COLOURS)))
            (line,) = axes.plot(
                [_finite(x) for x, _ in ordered],
                [_finite(y) for _, y in ordered],
                color=COLOURS[colour % len(COLOURS)],
                linestyle=_STYLES[style % len(_STYLES)],
                linewidth=1.6,
                marker="o" if len(ordered) <= 40 else None,
                markersize=4,
            )
            line.set_gid(f"line-{i}")
            named.append((line, name))
        values = [y for points in series.values() for _, y in points if math.isfinite(y)]
        if log:
            _logarithmic(axes, values)
        elif zero and values and min(values) >= 0:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,.10g}")
        return named

    return _draw(title, x_label, y_label, width, height, plot)


def _logarithmic(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic y axis with ticks at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import NullLocator

    axes.set_yscale("log")
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    ticks = [digit * 10.0**power for power in range(low, high + 1) for digit in (1, 2, 5)]
    axes.set_yticks([t for t in ticks if min(values) / 1.3 <= t <= 1.3 * max(values)])
    axes.yaxis.set_minor_locator(NullLocator())


def spread(
    title: str,
    positions: Sequence[float],
    quantiles: Sequence[Sequence[float]],
    marks: Mapping[str, Sequence[float | None]],
    *,
    x_label: str = "",
    y_label: str = "",
    width: int = 720,
    height: int = 300,
) -> str:
    """An SVG figure of how values spread at each position: least to largest, middle half, and median; and of marks.

    The axis is logarithmic where all values are positive and span more than three decades.

    Args:
        positions: on the x axis.
        quantiles: least value, lower quartile, median, upper quartile and largest value at each position.
        marks: name -> a value at each position; None leaves it out.

    Raises:
        HywiaError: matplotlib is not installed.
    """

    def plot(axes: Any) -> list[tuple[Any, str]]:
        rows = [[_finite(v) for v in column] for column in zip(*quantiles, strict=True)] or [[]] * 5
        whole = axes.fill_between(positions, rows[0], rows[4], color=COLOURS[0], alpha=0.15, linewidth=0)
        half = axes.fill_between(positions, rows[1], rows[3], color=COLOURS[0], alpha=0.35, linewidth=0)
        (median,) = axes.plot(positions, rows[2], color=COLOURS[0], linewidth=1.6)
        median.set_gid("median")
        named = [(whole, "least to largest"), (half, "middle half"), (median, "median")]
        for i, (name, values) in enumerate(marks.items()):
            (points,) = axes.plot(
                positions, [_finite(v) for v in values], "_", color=COLOURS[i + 1], markersize=9, markeredgewidth=2
            )
            points.set_gid(f"mark-{i}")
            named.append((points, name))
        if all(float(p).is_integer() for p in positions):
            axes.xaxis.get_major_locator().set_params(integer=True)
        known = [v for row in rows for v in row if math.isfinite(v)]
        if known and min(known) > 0 and max(known) > 1000 * min(known):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:,.10g}")  # the scale's own writes formulas
        return named

    return _draw(title, x_label, y_label, width, height, plot)
