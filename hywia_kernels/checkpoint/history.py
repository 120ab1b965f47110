"""The cuts that came before: what a model's source says of how it was made."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import HywiaError
from ..types import Plan
from .run_record import base_of, reduction
from .saving import RECORD, read_record

__all__ = ["history"]


def _folder(source: str | Path | None) -> Path | None:
    """The directory of a source that has a record: itself, or the hub's copy on this machine."""
    if source is None or not str(source):
        return None
    path = Path(source)
    if path.is_dir():
        return path if (path / RECORD).is_file() else None
    if path.exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(str(source), RECORD)
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _is_step(value: Any) -> bool:
    """Whether a value describes an earlier cut."""
    if not isinstance(value, Mapping):
        return False
    before, after = value.get("parameters_before"), value.get("parameters_after")
    return isinstance(before, int) and isinstance(after, int) and before >= after > 0


def history(source: str | Path | None, plan: Plan) -> list[dict[str, Any]]:
    """The cuts that made the model which `plan` cuts, the oldest first; empty for one that was not cut before.

    Call it before the new model is written, which may replace its source.

    Args:
        source: where the model was loaded from: a directory, a hub id, anything else `load` takes.
        plan: of the cut that comes next.

    Returns:
        One mapping per cut: "base", the model it was made from (None where unknown), "parameters_before",
        "parameters_after" and "ratio", the share of parameters that went. A record that is damaged, or does not lead to
        the number of parameters that the plan starts from, describes another model: it gives a warning and no history.
    """
    folder = _folder(source)
    if folder is None:
        return []
    try:
        record = read_record(folder)
    except HywiaError as error:
        warnings.warn(f"the reduction since the original is unknown: {error}", stacklevel=2)
        return []
    earlier = record.get("history", [])
    steps = [dict(s) for s in earlier] if isinstance(earlier, list) and all(map(_is_step, earlier)) else None
    last, _ = reduction(record)
    if last is not None and steps is not None:
        steps.append(
            {
                "base": base_of(record),
                "parameters_before": last.before,
                "parameters_after": last.after,
                "ratio": last.share,
            }
        )
    if steps == []:
        return []  # written by this package, and never cut
    if steps is None or not _follow(steps, plan.parameters_before):
        warnings.warn(
            f"the reduction since the original is unknown: {folder / RECORD} does not lead to the "
            f"{plan.parameters_before:,} parameters that the model has",
            stacklevel=2,
        )
        return []
    return steps


def _follow(steps: list[dict[str, Any]], now: int) -> bool:
    """Whether each cut starts where the one before it ended, and the last ends at the model as it is."""
    starts = [s["parameters_before"] for s in steps[1:]] + [now]
    return [s["parameters_after"] for s in steps] == starts
