"""Modules and functions under the names they had before 0.2: each warns when it is used, and goes in 0.3."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from typing import Any

__all__ = ["MODULES", "NAMES", "module", "register", "renamed"]

_PACKAGE = __name__.rpartition(".")[0]
MODULES = {
    "adaptive": "checkpoint.adaptive",
    "atomic": "checkpoint.atomic_directory",
    "baichuan": "checkpoint.baichuan",
    "budgets": "method.allocation",
    "charts": "cli.charts",
    "constraints": "deploy.serving_rules",
    "export": "checkpoint.saving",
    "figures": "cli.figures",
    "fusion": "method.scores",
    "hardware": "deploy.hardware",
    "html_report": "cli.html_report",
    "learned": "method.mask_learning",
    "moments": "method.moments",
    "planning": "deploy.planning",
    "reading": "method.reading",
    "record": "types.record",
    "report": "cli.console",
    "scorer": "integrations.protocol",
    "selection": "method.selection",
    "served": "checkpoint.gguf",
    "speed": "deploy.speed",
    "speed.decode_attention": "engine.decode_attention",
    "speed.driver": "engine.static_driver",
    "speed.measure": "deploy.speed",
    "speed.work": "deploy.cost",
    "storage": "checkpoint.scores_file",
    "surgery": "method.surgery",
    "targets": "deploy.device_profiles",
    "text": "method.calibration_data",
    "tokens": "method.tokens",
    "undo": "method.undo",
    "weights": "arch.facts",
    "writing": "method.writing",
}
# Those whose name a function has too: `import hywia_kernels.load` still gives the module.
_SHADOWED = {
    "calibrate": "method.statistics",
    "evaluate": "evaluation",
    "leftover": "method.head_residual",
    "load": "checkpoint.loading",
    "refit": "method.reconstruction",
}
_APART = {  # old module -> what is not in the module that it mostly became -> where that is
    "fusion": {"CRITERIA": "settings", **dict.fromkeys(("magnitude", "random", "score"), "method.criteria")},
    "served": {"write_decilm": "checkpoint.decilm"},
    "speed": dict.fromkeys(("Work", "work_of"), "deploy.cost"),
}

NAMES = {"learn": "learn_masks", "leftover": "head_residuals", "refit": "reconstruct", "with_leftover": "rank_heads"}
_INNER = {
    "USUAL": "DEFAULT_KINDS",
    "Work": "Cost",
    "factored": "cholesky_factor",
    "fused": "blend",
    "redistribute": "allocate",
    "silence": "zero_units",
    "work_of": "cost_of",
}


def renamed(name: str) -> str:
    """The present name of a function."""
    _warn(name, NAMES[name], stacklevel=4)
    return NAMES[name]


def _warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Blamed on the code that uses the old name: others' deprecations are shown to nobody."""
    message = f"{_PACKAGE}.{old} is now {_PACKAGE}.{new}; the old name goes in 0.3"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


class _Moved(types.ModuleType):
    """Stands for a module under its old name."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(f"{_PACKAGE}.{old}", f"Moved to {_PACKAGE}.{new}.")
        self.__dict__["_hywia_moved"] = (old, new)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        old, new = self.__dict__["_hywia_moved"]
        new = _APART.get(old, {}).get(name, new)
        value = getattr(importlib.import_module(f".{new}", _PACKAGE), (NAMES | _INNER).get(name, name))
        _warn(old, new)
        return value


def register() -> None:
    """Let `import` find the old names; nothing else is imported for it."""
    for old, new in (MODULES | _SHADOWED).items():
        sys.modules.setdefault(f"{_PACKAGE}.{old}", _Moved(old, new))


def module(name: str) -> types.ModuleType:
    """The stand-in of an old name."""
    return sys.modules[f"{_PACKAGE}.{name}"]
