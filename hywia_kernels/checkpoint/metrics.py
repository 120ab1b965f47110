"""The figures that an evaluation yields, in one table that the console, the model card and the HTML page all read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["METRICS", "Comparison", "Metric", "compare", "figures_of"]


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation.

    Attributes:
        key: the figure's key in the mapping that describes an evaluation.
        name: short enough for a column of the console.
        detail: what exactly it is, for pages; the name where there is nothing to add.
        form: the format string by which a value is written.
    """

    key: str
    name: str
    detail: str
    form: str


METRICS = (
    Metric("parameters", "parameters", "parameters", "{:,}"),
    Metric("bytes", "bytes", "bytes of weights", "{:,}"),
    Metric("perplexity", "perplexity", "perplexity", "{:.2f}"),
    Metric("tokens_per_second", "eager tokens/s", "tokens a second (greedy, one sequence)", "{:.1f}"),
)


@dataclass(frozen=True)
class Comparison:
    """One metric before and after, as text; the ratio is after over before, "-" where there is none."""

    metric: Metric
    before: str
    after: str
    ratio: str


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def figures_of(evaluation: Mapping[str, Any]) -> list[tuple[Metric, str]]:
    """Each metric that an evaluation holds, and its value as text."""
    return [(m, m.form.format(evaluation[m.key])) for m in METRICS if _is_number(evaluation.get(m.key))]


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Comparison]:
    """The values and the ratio of each metric that both evaluations hold."""
    rows = []
    for metric in METRICS:
        old, new = before.get(metric.key), after.get(metric.key)
        if old is None or new is None or not (_is_number(old) and _is_number(new)):
            continue
        known = math.isfinite(old) and math.isfinite(new) and old != 0
        ratio = f"{new / old:.3f}" if known else "-"
        rows.append(Comparison(metric, metric.form.format(old), metric.form.format(new), ratio))
    return rows
