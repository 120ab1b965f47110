"""The figures of a pruning run and of a benchmark, as SVG text: their data is chosen here, and `charts` draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.run_record import KindWidths, mapping, summary_rows
from . import charts

__all__ = ["score_figures", "speed_figures", "width_figures"]


def width_figures(kinds: Sequence[KindWidths]) -> list[str]:
    """Units in each layer, before and after where both are known; one figure for each kind of unit inside layers of
    which layers hold different numbers: of equal ones the page's table says all."""
    figures = []
    for kind in (k for k in kinds if k.kind != "layers" and len(set(k.after)) > 1):
        before = {"before": kind.before} if kind.before is not None else {}
        figures.append(
            charts.bars(
                f"{kind.kind}: units in each layer",
                [str(i) for i in range(len(kind.after))],
                {**before, "kept": kind.after},
                x_label="layer",
                y_label="units",
                height=240,
            )
        )
    return figures


def score_figures(record: Mapping[str, Any]) -> list[str]:
    """How the scores spread in each layer with the place of the cut, and the share of the estimated loss that goes."""
    rows, figures = summary_rows(record), []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        layers = [row["layer"] for row in mine]
        marks = {
            "least kept": [_number(row.get("least_kept")) for row in mine],
            "largest removed": [_number(row.get("largest_removed")) for row in mine],
        }
        figures.append(
            charts.spread(
                f"{kind}: scores of each layer's units",
                layers,
                [row["quantiles"] for row in mine],
                marks,
                x_label="layer",
                y_label="score",
            )
        )
        losses = [_number(row.get("loss_removed")) for row in mine]
        if any(losses):
            shares = {"removed": [None if loss is None else 100 * loss for loss in losses]}
            figures.append(
                charts.bars(
                    f"{kind}: share of the estimated loss that goes",
                    [str(i) for i in layers],
                    shares,
                    x_label="layer",
                    y_label="%",
                    height=240,
                )
            )
    return figures


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _case(figure: Mapping[str, Any]) -> str:
    return f"{figure['batch']} x {figure['context']}"


def speed_figures(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tokens a second of every case of a benchmark: a figure for each mode and phase, with a bar for each model.

    Args:
        models: mappings with "model", a name, and "figures", the readings as `hywia bench` records them.
    """
    keys = dict.fromkeys((f["mode"], f["phase"]) for model in models for f in model["figures"])
    names = [Path(str(model["model"])).name or str(model["model"]) for model in models]
    if len(set(names)) < len(names):
        names = [str(model["model"]) for model in models]
    drawn = []
    for mode, phase in keys:
        readings = [[f for f in model["figures"] if (f["mode"], f["phase"]) == (mode, phase)] for model in models]
        labels = list(dict.fromkeys(_case(f) for model in readings for f in model))
        series = {}
        for i, (name, model) in enumerate(zip(names, readings, strict=True)):
            rates = {_case(f): _number(mapping(f).get("tokens_per_second")) for f in model}
            # The same model may be measured twice: each keeps its bars.
            series[name if name not in series else f"{name} ({i + 1})"] = [rates.get(label) for label in labels]
        drawn.append(
            charts.bars(f"{phase}, {mode}", labels, series, x_label="sequences x context", y_label="tokens a second")
        )
    return drawn
