"""A pruning run's record as one HTML page that opens without a network: no script, no link, figures inside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..checkpoint import run_record
from ..checkpoint.metrics import compare
from ..checkpoint.templating import render
from . import charts, figures

__all__ = ["page"]

TEMPLATE = "report.html.jinja"
_LONG = ("widths", "widths_before")  # these are shown as tables and figures


def page(record: Mapping[str, Any], title: str) -> str:
    """The HTML page of a `hywia.json`; sections whose data the record lacks are left out.

    Where matplotlib is not installed, the page has its tables, and says what to install for the figures.

    Args:
        record: the content of the file. title: the model's name.

    Raises:
        HywiaError: the record is damaged.
    """
    with run_record.reading():
        return run_record.plain(render(TEMPLATE, _context(record, title)))


def _context(record: Mapping[str, Any], title: str) -> dict[str, Any]:
    from markupsafe import Markup  # part of jinja2

    plan = run_record.mapping(record.get("plan"))
    bench, prediction = run_record.mapping(record.get("bench")), run_record.mapping(plan.get("prediction"))
    kinds = run_record.kind_widths(record)
    cut, total = run_record.reduction(record)
    history = record.get("history")
    drawing = charts.available()

    def drawn(draw: Any, data: Any) -> list[Markup]:
        return [Markup(svg) for svg in draw(data)] if drawing and data else []

    return {
        "title": title,
        "base": run_record.base_of(record),
        "cut": cut,
        "total": total,
        "cuts": 1 + len(history) if isinstance(history, list) else 1,
        "has_plan": bool(plan),
        "evaluation": _evaluation(run_record.mapping(record.get("evaluation"))),
        "recovered": run_record.recovery_text(record),
        "prompt": run_record.prompt_of(record),
        "text": run_record.evaluation_text(record),
        "kinds": [(k.kind, run_record.spans(k.before) if k.before else "", run_record.spans(k.after)) for k in kinds],
        "width_figures": drawn(figures.width_figures, kinds),
        "score_figures": drawn(figures.score_figures, record),
        "has_scores": bool(run_record.summary_rows(record)),
        "without_figures": None if drawing else "pip install 'hywia_kernels[report]'",
        "predicted": _predicted(prediction),
        "measured": _measured(bench),
        "speed_figures": drawn(figures.speed_figures, bench.get("models")),
        "settings": run_record.settings(record),
        "command": run_record.command_line(record),
        "versions": run_record.versions_of(record),
        "raw": _raw(record, plan),
    }


def _evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    before, after = (run_record.mapping(evaluation.get(side)) for side in ("before", "after"))
    rows = compare(before, after)
    continued = [
        (name, side["continuation"])
        for name, side in (("before", before), ("after", after))
        if isinstance(side.get("continuation"), str)
    ]
    device = evaluation.get("device")
    return {"rows": rows, "continued": continued, "device": device} if rows else None


def _predicted(prediction: Mapping[str, Any]) -> dict[str, Any] | None:
    if not prediction:
        return None
    rows = [(f"prefill, {tokens} tokens", f"{gain:.3f}") for tokens, gain in prediction["prefill"].items()]
    rows += [
        ("decoding, one sequence", f"{prediction['decode']:.3f}"),
        ("bytes of weights", f"{prediction['size']:.3f}"),
    ]
    return {"target": str(prediction["target"]), "rows": rows}


def _measured(bench: Mapping[str, Any]) -> dict[str, Any] | None:
    if not bench:
        return None
    sizes = [
        (m["model"], f"{m['parameters']:,}", f"{m['weight_bytes']:,}", f"{m['kv_bytes_per_token']:,}")
        for m in bench["models"]
    ]
    rows = [
        (
            model["model"],
            f["mode"],
            f"{f['phase']} {f['batch']} x {f['context']}",
            f"{f['ms']:.3f}",
            f"{f['tokens_per_second']:,.1f}",
            f"{f['speedup']:.3f}" if f["speedup"] else "-",
            f"{f['ideal']:.3f}" if f["ideal"] else "-",
            f"{f['peak_bytes'] / 1e6:,.0f}" if f["peak_bytes"] else "-",
        )
        for model in bench["models"]
        for f in model["figures"]
    ]
    return {"device": str(bench["device"]), "sizes": sizes, "rows": rows}


def _raw(record: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """The rest of the record as JSON, without the lists that have an entry for every layer."""
    shown = {key: record[key] for key in ("arguments", "recipe", "history", "not_stock") if record.get(key) is not None}
    shown["plan"] = {key: value for key, value in plan.items() if key not in _LONG}
    return json.dumps(shown, indent=2, default=str)
