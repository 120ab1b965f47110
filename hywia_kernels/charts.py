"""Figures as SVG text, for reports and benchmarks: lines, steps and grouped bars, with no plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

__all__ = ["bars", "lines"]

COLOURS = ("#2a6f97", "#e07a1f", "#3a7d44", "#9b2c5a", "#6b5b95", "#8a6d3b")
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 48

Points = Sequence[tuple[float, float]]


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that span [low, high]."""
    if high <= low:
        high = low + 1.0
    raw = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
    first = math.floor(low / step) * step
    return [first + i * step for i in range(math.ceil((high - first) / step - 1e-9) + 1)]


def _label(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.0e}"
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.4g}"


def _frame(title: str, x_label: str, y_label: str, width: int, height: int, body: str, legend: Sequence[str]) -> str:
    entries, at = [], _LEFT
    for i, name in enumerate(legend):
        colour = COLOURS[i % len(COLOURS)]
        entries.append(
            f'<rect x="{at}" y="{_TOP - 16}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{at + 14}" y="{_TOP - 7}">{escape(name)}</text>'
        )
        at += 26 + round(6.6 * len(name))
    middle = _LEFT + (width - _LEFT - _RIGHT) / 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11" role="img" aria-label="{escape(title, quote=True)}">'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        f'<text x="{_LEFT}" y="15" font-size="13" font-weight="bold">{escape(title)}</text>'
        f"{''.join(entries)}{body}"
        f'<text x="{middle:.0f}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text transform="translate(13 {_TOP + (height - _TOP - _BOTTOM) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text></svg>'
    )


def _grid_y(ticks: Sequence[float], y: Callable[[float], float], width: int) -> str:
    return "".join(
        f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}" stroke="#ddd"/>'
        f'<text x="{_LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{_label(t)}</text>'
        for t in ticks
    )


def lines(
    title: str,
    series: Mapping[str, Points],
    *,
    x_label: str = "",
    y_label: str = "",
    width: int = 720,
    height: int = 300,
    zero: bool = True,
) -> str:
    """A curve a series, through its points by x; `zero` lets the y axis start at 0. Series without points are empty."""
    points = [p for s in series.values() for p in s]
    if not points:
        return _frame(title, x_label, y_label, width, height, "", list(series))
    ys = [p[1] for p in points] + ([0.0] if zero else [])
    y_ticks, x_ticks = _ticks(min(ys), max(ys)), _ticks(min(p[0] for p in points), max(p[0] for p in points), 8)
    low, high = min(p[0] for p in points), max(p[0] for p in points)
    across, down = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def x(value: float) -> float:
        return _LEFT + across * (value - low) / ((high - low) or 1.0)

    def y(value: float) -> float:
        return _TOP + down * (1 - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

    body = [_grid_y(y_ticks, y, width)]
    body += [
        f'<text x="{x(t):.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle">{_label(t)}</text>'
        for t in x_ticks
        if low <= t <= high
    ]
    for i, found in enumerate(series.values()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in sorted(found))
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(found) <= 40:
            body += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.4" fill="{colour}"/>' for a, b in found]
    return _frame(title, x_label, y_label, width, height, "".join(body), list(series))


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
    """A group of bars a label, one of each series; None leaves a gap."""
    values = [v for s in series.values() for v in s if v is not None]
    ticks = _ticks(0.0, max(values, default=1.0))
    across, down = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    slot = across / max(len(labels), 1)
    bar = min(slot * 0.8 / max(len(series), 1), 48.0)

    def y(value: float) -> float:
        return _TOP + down * (1 - value / ticks[-1])

    body = [_grid_y(ticks, y, width)]
    every = math.ceil(len(labels) * 40 / across) if labels else 1
    for j, label in enumerate(labels):
        left = _LEFT + slot * (j + 0.5) - bar * len(series) / 2
        for i, found in enumerate(series.values()):
            value = found[j]
            if value is not None:
                body.append(
                    f'<rect x="{left + bar * i:.1f}" y="{y(value):.1f}" width="{max(bar - 0.5, 0.5):.1f}" '
                    f'height="{max(_TOP + down - y(value), 0):.1f}" fill="{COLOURS[i % len(COLOURS)]}">'
                    f"<title>{escape(label)}: {_label(value)}</title></rect>"
                )
        if j % every == 0:
            middle = _LEFT + slot * (j + 0.5)
            body.append(
                f'<text x="{middle:.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle">{escape(label)}</text>'
            )
    return _frame(title, x_label, y_label, width, height, "".join(body), list(series))
