"""Statistics and scores on disk: one directory of safetensors + JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from . import atomic
from .errors import HywiaError, UsageError
from .types import Group, Member, Scores, Statistics
from .verify import check_file

__all__ = ["load_scores", "save_scores"]

_TENSORS, _INDEX = "scores.safetensors", "scores.json"
_FORMAT = 2


def save_scores(
    path: str | Path, scores: Scores, statistics: Statistics | None = None, *, overwrite: bool = False
) -> Path:
    """Write scores, and the statistics they came from if given, so that another ratio, fusion or order needs no
    second calibration.

    Raises:
        UsageError: the directory exists. HywiaError: it cannot be written.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, value in scores.values.items():
        tensors[f"values/{name}"] = value
    for name, value in scores.loss.items():
        tensors[f"loss/{name}"] = value
    index: dict[str, Any] = {
        "format": _FORMAT,
        "groups": [dataclasses.asdict(g) for g in scores.groups],
        "parameters": scores.parameters,
        "fingerprint": scores.fingerprint,
        "scores": dict(scores.record),
    }
    if statistics is not None:
        index["statistics"] = dict(statistics.record)
        for name, orders in statistics.fine.items():
            for order, value in orders.items():
                tensors[f"fine/{order}/{name}"] = value
        for name, value in statistics.coarse.items():
            tensors[f"coarse/{name}"] = value
    content = _index_text(index)
    need = sum(v.numel() * v.element_size() for v in tensors.values())
    with atomic.directory(Path(path), overwrite=overwrite, need=need) as folder:
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / _TENSORS)
        check_file(folder / _TENSORS, tensors)
        (folder / _INDEX).write_text(content)
    return Path(path)


def _index_text(index: dict[str, Any]) -> str:
    try:
        return json.dumps(index, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise UsageError(f"scores: expected a record that JSON can hold, got something else: {error}") from error


def load_scores(path: str | Path) -> tuple[Scores, Statistics | None]:
    """Read what `save_scores` wrote.

    Raises:
        HywiaError: no such directory, or not one of scores, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(path)
    if not (folder / _INDEX).is_file() or not (folder / _TENSORS).is_file():
        raise HywiaError(f"scores: {folder} is not a directory written by 'hywia score'")
    try:
        index = json.loads((folder / _INDEX).read_text())
        tensors = load_file(folder / _TENSORS)
        if index["format"] != _FORMAT:
            raise HywiaError(f"scores: {folder} has format {index['format']}, expected {_FORMAT}; score again")
        groups = tuple(_group(g) for g in index["groups"])
        common = {"groups": groups, "parameters": index["parameters"], "fingerprint": index["fingerprint"]}
        scores = Scores(
            values=_part(tensors, "values/"), loss=_part(tensors, "loss/"), record=index["scores"], **common
        )
        statistics = None
        if "statistics" in index:
            fine: dict[str, dict[str, Tensor]] = {}
            for key, value in _part(tensors, "fine/").items():
                order, _, name = key.partition("/")
                fine.setdefault(name, {})[order] = value
            statistics = Statistics(fine=fine, coarse=_part(tensors, "coarse/"), record=index["statistics"], **common)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise HywiaError(f"scores: {folder} is damaged ({error}); score again") from error
    return scores, statistics


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _group(values: dict[str, Any]) -> Group:
    lists = {k: tuple(Member(**m) for m in values[k]) for k in ("members", "vectors")}
    return Group(**{**values, **lists, "stock_counts": tuple(values["stock_counts"])})
