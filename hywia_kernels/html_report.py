"""A pruning run's record as one self-contained HTML page: no script, no link, figures as SVG."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import torch

from . import charts
from .types import Plan, Scores

__all__ = ["page", "score_summary"]

_STYLE = """
body { font: 15px/1.5 sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .8rem 0; } th, td { padding: .25rem .8rem; text-align: right; }
th { border-bottom: 1px solid #999; font-weight: 600; }
td:first-child, th:first-child { text-align: left; white-space: nowrap; }
tr:nth-child(even) td { background: #f6f6f6; } svg { max-width: 100%; height: auto; display: block; margin: .8rem 0; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px; } .note { color: #666; }
"""
_NAMES = {
    "parameters": ("parameters", "{:,}"),
    "bytes": ("bytes on disk", "{:,}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "tokens_per_second": ("tokens a second (greedy, one sequence)", "{:.1f}"),
}


def score_summary(scores: Scores, plan: Plan) -> list[dict[str, Any]]:
    """Of each group: its scores' quantiles, the least score kept and the largest removed, and the estimated loss that
    goes, as a share of the group's; what the page draws."""
    found = []
    for group in scores.groups:
        values = scores.values[group.name].double()
        kept = torch.zeros(group.units, dtype=torch.bool)
        kept[plan.keep[group.name]] = True
        loss = scores.loss.get(group.name)
        quantiles = torch.quantile(values, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)).tolist()
        found.append(
            {
                "group": group.name,
                "kind": group.kind,
                "layer": group.layer,
                "units": group.units,
                "kept": int(kept.sum()),
                "quantiles": quantiles,
                "least_kept": float(values[kept].min()),
                "largest_removed": float(values[~kept].max()) if not kept.all() else None,
                "loss_removed": float(loss.double()[~kept].sum() / loss.double().sum().clamp_min(1e-300))
                if loss is not None
                else None,
            }
        )
    return found


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{escape(str(h))}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def page(record: Mapping[str, Any], title: str) -> str:
    """HTML of a `hywia.json`; what it does not hold is left out."""
    sections = [
        _overview(record),
        _evaluation(record.get("evaluation")),
        _widths(record.get("plan"), record.get("scores_summary")),
        _scores(record.get("scores_summary")),
        _speed(record.get("bench"), (record.get("plan") or {}).get("prediction")),
        _provenance(record),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: pruning report</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{''.join(sections)}</body></html>\n"
    )


def _overview(record: Mapping[str, Any]) -> str:
    plan = record.get("plan")
    if plan is None:
        return '<p class="note">The record holds no plan: this model was saved without one.</p>'
    before, after = plan["parameters_before"], plan["parameters_after"]
    rows = [
        ("parameters before", f"{before:,}"),
        ("parameters after", f"{after:,}"),
        ("removed", f"{100 * plan['removed_ratio']:.3f} %"),
        ("layout", plan["layout"]),
        ("protocol", plan.get("protocol", "")),
        ("channel widths are multiples of", plan.get("align", "")),
    ]
    for key, name in (
        ("target", "for the device"),
        ("constraints", "constraints"),
        ("binding", "constraints that bind"),
    ):
        if key in plan:
            value = plan[key]
            rows.append((name, (", ".join(value) or "none") if isinstance(value, list) else value))
    return _table(("", ""), rows)


def _evaluation(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    before, after = found["before"], found["after"]
    rows = []
    for key, (name, form) in _NAMES.items():
        if key in before and key in after:
            rows.append((name, form.format(before[key]), form.format(after[key]), f"{after[key] / before[key]:.3f}"))
    text = "<h2>Before and after</h2>" + _table(("", "before", "after", "ratio"), rows)
    for side, name in ((before, "Before"), (after, "After")):
        if "continuation" in side:
            text += f"<p>{name} continues:</p><pre>{escape(side['continuation'])}</pre>"
    return text


def _widths(plan: Mapping[str, Any] | None, summary: Sequence[Mapping[str, Any]] | None) -> str:
    if plan is None:
        return ""
    text = "<h2>Widths by layer</h2>"
    before: dict[str, dict[int, int]] = {}
    for row in summary or ():
        before.setdefault(row["kind"], {})[row["layer"]] = row["units"]
    for kind, widths in plan["widths"].items():
        series = {"kept": widths}
        if kind in before and len(before[kind]) == len(widths):
            series = {"before": [before[kind][layer] for layer in sorted(before[kind])], "kept": widths}
        labels = [str(i) for i in range(len(widths))]
        text += charts.bars(f"{kind} units kept", labels, series, x_label="layer", y_label="units", height=240)
    return text


def _scores(summary: Sequence[Mapping[str, Any]] | None) -> str:
    if not summary:
        return ""
    text = "<h2>Scores</h2>"
    for kind in dict.fromkeys(row["kind"] for row in summary):
        rows = sorted((r for r in summary if r["kind"] == kind), key=lambda r: r["layer"])
        names = ("least", "quarter", "median", "three quarters", "largest")
        series = {name: [(r["layer"], r["quantiles"][i]) for r in rows] for i, name in enumerate(names)}
        series["least kept"] = [(r["layer"], r["least_kept"]) for r in rows]
        text += charts.lines(f"{kind}: scores of a layer's units", series, x_label="layer", y_label="score", zero=False)
        if all(r["loss_removed"] is not None for r in rows) and any(r["loss_removed"] for r in rows):
            shares = {"removed": [100 * r["loss_removed"] for r in rows]}
            labels = [str(r["layer"]) for r in rows]
            text += charts.bars(
                f"{kind}: share of the estimated loss that goes",
                labels,
                shares,
                x_label="layer",
                y_label="%",
                height=240,
            )
    return text + '<p class="note">Scores are comparable within a layer and kind only.</p>'


def _speed(bench: Mapping[str, Any] | None, prediction: Mapping[str, Any] | None) -> str:
    text = ""
    if prediction:
        rows = [(f"prefill, {t} tokens", f"{s:.3f}") for t, s in prediction["prefill"].items()]
        rows += [
            ("decoding, one sequence", f"{prediction['decode']:.3f}"),
            ("weight bytes", f"{prediction['size']:.3f}"),
        ]
        text += f"<p>Predicted for {escape(prediction['target'])} (before over after):</p>" + _table(
            ("", "times"), rows
        )
    if bench:
        from .commands_bench import figures

        head = ("model", "mode", "case", "ms", "tokens/s", "speed-up", "ideal", "peak MB")
        measured = [
            (
                model["model"], f["mode"], f"{f['phase']} {f['batch']} x {f['context']}", f"{f['ms']:.3f}",
                f"{f['tokens_per_second']:,.1f}",
                *((f"{f['speedup']:.3f}", f"{f['ideal']:.3f}") if f["speedup"] else ("-", "-")),
                f"{f['peak_bytes'] / 1e6:,.0f}" if f["peak_bytes"] else "-",
            )
            for model in bench["models"]
            for f in model["figures"]
        ]  # fmt: skip
        sizes = [
            (m["model"], f"{m['parameters']:,}", f"{m['weight_bytes']:,}", f"{m['kv_bytes_per_token']:,}")
            for m in bench["models"]
        ]
        text += f"<p>Measured on {escape(bench['device'])}.</p>"
        text += _table(("model", "parameters", "weight bytes", "KV bytes a token"), sizes)
        text += "".join(figures(bench["models"])) + _table(head, measured)
    return f"<h2>Speed</h2>{text}" if text else ""


def _provenance(record: Mapping[str, Any]) -> str:
    plan = dict(record.get("plan") or {})
    plan.pop("widths", None)
    shown = {
        "versions": record.get("versions", {}),
        "arguments": record.get("arguments", {}),
        "plan": plan,
    }
    return f"<h2>How it was made</h2><pre>{escape(json.dumps(shown, indent=2, default=str))}</pre>"
