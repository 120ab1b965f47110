"""What a run tells people (tables on stdout) and machines (JSON)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import atomic, ops
from .errors import HywiaError
from .types import Plan
from .versions import versions

__all__ = [
    "device_name",
    "environment",
    "print_comparison",
    "print_environment",
    "print_evaluation",
    "print_plan",
    "python_topics",
    "say",
    "write_json",
]

_ROWS = (
    ("parameters", "parameters", "{:,}"),
    ("bytes", "bytes", "{:,}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("tokens_per_second", "tokens a second", "{:.1f}"),
)


def say(line: str) -> None:
    print(line, flush=True)


def print_evaluation(found: Mapping[str, Any]) -> None:
    for key, title, form in _ROWS:
        say(f"{title:<16} {form.format(found[key]):>16}")


def print_comparison(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> None:
    """Before, after and their ratio; and a continuation from each where there is one."""
    if before is None or after is None:
        return
    say(f"{'':<16} {'before':>16} {'after':>16} {'ratio':>8}")
    for key, title, form in _ROWS:
        ratio = after[key] / before[key]
        say(f"{title:<16} {form.format(before[key]):>16} {form.format(after[key]):>16} {ratio:>8.3f}")
    for name, side in (("before", before), ("after", after)):
        if "continuation" in side:
            say(f"{name} continues: {' '.join(side['continuation'].split())}")


def print_plan(plan: Plan) -> None:
    removed = plan.parameters_before - plan.parameters_after
    share = f"{100 * plan.ratio:.3f} %"
    say(f"removing {removed:,} of {plan.parameters_before:,} parameters: {share}, {plan.layout} layout")
    for kind in sorted({g.kind for g in plan.groups}):
        groups = sorted((g for g in plan.groups if g.kind == kind), key=lambda g: g.layer)
        was, now = [g.units for g in groups], plan.widths(kind)
        say(f"  {kind}: {_spans(was)} -> {_spans(now)} {groups[0].unit}s a layer")

    _say_planning(plan.record)


def _say_planning(record: Mapping[str, Any]) -> None:
    """Which constraints bind, and what the plan should gain."""
    if record.get("binding"):
        rules = [c for c in record["constraints"] if c.partition(":")[0] in record["binding"]]
        say(f"  bound by {'; '.join(rules)}")
    if "prediction" in record:
        found = record["prediction"]
        prefill = ", ".join(f"{s:.2f} at {t} tokens" for t, s in found["prefill"].items())
        say(
            f"  predicted on {found['target']}: prefill x{prefill}; decoding x{found['decode']:.2f}; "
            f"weights {found['size']:.2f} times smaller"
        )


def _spans(widths: list[int]) -> str:
    """`1536` when all are equal, `1536 x4, 768 x24, 1536 x2` otherwise."""
    runs: list[list[int]] = []
    for width in widths:
        if runs and runs[-1][0] == width:
            runs[-1][1] += 1
        else:
            runs.append([width, 1])
    return str(runs[0][0]) if len(runs) == 1 else ", ".join(f"{w} x{n}" for w, n in runs)


def device_name(device: str) -> str:
    """What a person calls it."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return "cpu"


def environment() -> dict[str, Any]:
    """Versions, devices, and the state of every backend."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    backends = {b.name: {"on": b.on, "reason": b.reason, "ops": list(b.ops)} for b in ops.availability()}
    return {"versions": versions(), "cuda": torch.version.cuda, "devices": devices, "backends": backends}


def print_environment(found: Mapping[str, Any]) -> None:
    say("versions: " + ", ".join(f"{k} {v}" for k, v in found["versions"].items()))
    say("GPUs: " + (", ".join(found["devices"]) or "none"))
    for name, state in found["backends"].items():
        detail = ", ".join(state["ops"]) if state["on"] else state["reason"]
        say(f"{name:<10} {'on ' if state['on'] else 'off'} {detail}")


def python_topics() -> str:
    """English prose that comes with Python itself: its help topics, in a fixed order."""
    from pydoc_data.topics import topics

    joined = "\n\n".join(topics[name] for name in sorted(topics))
    return re.sub(r"[ \t]+", " ", joined)


def write_json(path: str | None, content: Any) -> None:
    """Write a report, when a path is given."""
    if path is None:
        return
    try:
        text = json.dumps(content, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise HywiaError(f"json: the report holds what JSON cannot: {error}") from error
    atomic.write_text(path, text, "json")
