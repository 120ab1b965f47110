"""Whether a scorer is called from inside one of Torch-Pruning's steps, during which weights change by pruning alone."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch_pruning import pruner

__all__ = ["running_step"]

# MetaPruner is BasePruner's name in older versions, and an alias in newer ones.
_STEPS = {
    getattr(pruner, name).step.__code__
    for name in ("BasePruner", "MetaPruner")
    if hasattr(getattr(pruner, name, None), "step")
}
_TRUSTED = ("torch_pruning", "torch")  # torch's decorator of generators runs Torch-Pruning's


def running_step() -> FrameType | None:
    """The frame of the pruner's step that calls the scorer; two steps never have the same one while it is held.

    It is None where other code may have run since the step began: in a step that hands its groups out (interactive),
    with a pruner of the caller's own between the step and the scorer, or with layers that the caller's own functions
    prune.
    """
    frame: Any = sys._getframe(2)
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _TRUSTED:
        if frame.f_code in _STEPS:
            graph = getattr(frame.f_locals["self"], "DG", None)
            return frame if graph is not None and not getattr(graph, "CUSTOMIZED_PRUNERS", True) else None
        frame = frame.f_back
    return None
