"""Tables of single ops and of the cut, from results.csv, cut.csv, speed.csv and engine.csv."""

from __future__ import annotations

import re

from .document_rows import Line, figure, latest, markdown, percent, read, sources
from .harness import COMPILE

_OURS = ("cuda", "native", "triton")


def _ops(op: str, device: str) -> dict[tuple[str, ...], Line]:
    return latest((row for row in read("results", device) if row["op"] == op), "case", "implementation")


def _times_compile(by: dict[tuple[str, ...], Line], case: str, row: Line) -> str:
    compiled = by.get((case, COMPILE))
    return "" if compiled is None else f"{float(compiled['work_us']) / float(row['work_us']):.2f}"


def _of_ours(by: dict[tuple[str, ...], Line], unit: str) -> tuple[list[list[str]], list[Line]]:
    """A line for each case and back end of this package: time, share of the copy bandwidth, times torch.compile."""
    lines, used = [], []
    for (case, name), row in by.items():
        if name in _OURS:
            scale = {"µs": 1.0, "ms": 1e-3}[unit]
            time = scale * float(row["work_us"])
            told = f"{time:,.0f}" if time >= 1000 else figure(time)
            cells = [told, percent(row["share_of_copy"]), _times_compile(by, case, row)]
            lines.append([re.sub(r"(?<=\d)x(?=\d)", "×", case).replace("cols", "columns"), name, *cells])
            used.append(row)
    return lines, used


def batch() -> str:
    """taylor_importance_batch: all matrices of a layer, or of a few layers, in one launch."""
    lines, used = _of_ours(_ops("taylor_importance_batch", "H100"), "µs")
    return markdown(["matrices", "by", "µs", "of copy", "× torch.compile"], lines) + sources(used)


def compact() -> str:
    """compact: three of four units kept at random; shares by the bytes that survive."""
    lines, used = _of_ours(_ops("compact", "H100"), "µs")
    return markdown(["matrix", "by", "µs", "of copy", "× torch.compile"], lines) + sources(used)


def taylor_cpu() -> str:
    """taylor_importance of 4096 × 4096 on a CPU."""
    by = {key: row for key, row in _ops("taylor_importance", "EPYC").items() if key[0].startswith("4096x4096")}
    lines, used = _of_ours(by, "ms")
    return markdown(["matrix", "by", "ms", "of copy", "× torch.compile"], lines) + sources(used)


def cut() -> str:
    """A whole model cut."""
    by = latest(read("cut", "H100"), "model", "dtype", "ratio")
    lines = [
        [
            percent(row["ratio"]),
            f"{float(row['seconds']):.3f}",
            f"{float(row['bytes_before']) / 1e9:.1f}",
            f"{float(row['bytes_after']) / 1e9:.1f}",
            f"{float(row['extra_bytes']) / 1e6:.0f}",
        ]
        for row in by.values()
    ]
    return markdown(["less", "s", "GB before", "GB after", "MB beside the model"], lines) + sources(by.values())


def recipe() -> str:
    """A whole run step by step, and LLM-Pruner's scoring beside it."""
    steps = {"param_mix": "LLM-Pruner's param_mix, its scoring alone", "all": "the recipe, all of it"}
    found = [row for row in read("recipe") if row["shape"] == "7b" and not int(row["recover_tokens"])]
    by = latest(found, "step", "layer_passes")
    passes = sorted({row["layer_passes"] for row in found}, key=int)
    lines = []
    for step in dict.fromkeys(row["step"] for row in found):
        mine = [by.get((step, count)) for count in passes]
        if step == "param_mix":  # as its latest reading, whatever was measured beside it
            mine = [max((row for row in mine if row), key=lambda row: row["date"])] * len(passes)
        lines.append([steps.get(step, step), *("" if row is None else figure(row["seconds"]) for row in mine)])
    told = {"0": "s, layers not trained", "1": "s, one pass"}
    heads = [told.get(count, f"s, {count} passes") for count in passes]
    return markdown(["step", *heads], lines) + sources(by.values())


def recovered() -> str:
    """Whole runs with a recovery: its seconds, those of its text among them, and the run's, with its memory."""
    found = [row for row in read("recipe") if row["shape"] == "7b" and int(row["recover_tokens"])]
    by = latest(found, "recover_tokens", "limit_bytes", "step")
    lines, used = [], []
    for tokens, limit in dict.fromkeys((row["recover_tokens"], row["limit_bytes"]) for row in found):
        steps = {step: row for (count, most, step), row in by.items() if (count, most) == (tokens, limit)}
        if "all" not in steps:
            continue
        used += steps.values()
        seconds = [figure(steps[s]["seconds"]) if s in steps else "" for s in ("recovery text", "recovery", "all")]
        whole = steps["all"]
        allowed = f"{float(limit) / 1e9:.0f}" if limit else ""
        held = f"{float(whole['peak_bytes']) / 1e9:.1f}"
        lines.append([f"{int(tokens):,}", whole["tune"], whole["hold"], *seconds, held, allowed])
    head = ["tokens", "trained", "the dense model", "s, text", "s, recovery, text and all", "s, the whole run", "GB"]
    return markdown([*head, "GB allowed"], lines) + sources(used)


def captured(widths: dict[str, str], phases: dict[tuple[str, str, str], str]) -> str:
    """As `document_tables.speed`, of steps that are captured without the compiler: ms, times dense."""
    found = [row for row in read("speed", "H100") if row["mode"] == "captured" and row["shape"] == "7b"]
    by = latest(found, "model", "phase", "batch", "context")
    lines = []
    for model, shown in widths.items():
        rows = [by[(model, *phase)] for phase in phases]
        lines.append([shown, *(figure(row["ms"]) + _beside(row) for row in rows)])
    return markdown(["heads × channels", *phases.values()], lines) + sources(by.values())


def _beside(row: Line) -> str:
    return "" if row["model"] == "dense" else f", {float(row['speedup']):.2f}"


def scoring_cpu() -> str:
    """Whole passes of SmolLM2 on a CPU."""
    flows = {"plain": "forward + backward", "param_mix": "LLM-Pruner param_mix", "fast": "`calibrate`, fast"}
    by = latest((row for row in read("engine", "EPYC") if row["shape"] == "smollm2"), "flow")
    rows = [by[(flow,)] for flow in flows]
    lines = [
        [
            flows[row["flow"]],
            f"{row['samples']} × {row['length']}",
            figure(row["seconds"]),
            figure(row["ratio_to_plain"]),
        ]
        for row in rows
    ]
    return markdown(["flow", "samples", "s", "× forward + backward"], lines) + sources(rows)
