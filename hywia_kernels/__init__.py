"""Hybrid-grained weight importance kernels and structured pruning for language models (HyWIA, arXiv 2403.10799).

    import hywia_kernels as hk

    model, tokenizer = hk.load("smollm2")
    result = hk.compress(model, tokenizer, hk.Recipe(ratio=0.2))    # what `hywia prune` does
    hk.save(model, tokenizer, "smollm2-small", result=result)

Every name is imported when it is first asked for: importing the package loads neither torch nor transformers, probes
no device and compiles nothing. It does one thing to another package: transformers' auto classes learn, when
transformers is imported, to load checkpoints whose layers differ in width.
"""

import importlib as _importlib
from typing import Any as _Any

from . import _moved
from .checkpoint import adaptive as _adaptive

__version__ = "0.2.0"

_HOMES = {  # public name -> module it is in
    **dict.fromkeys(("BackendError", "HywiaError", "UsageError"), "errors"),
    **dict.fromkeys(("Depth", "Group", "LayerScores", "Member", "Plan", "Scores", "Statistics"), "types"),
    **dict.fromkeys(("HyWIAScorer", "MagnitudeScorer", "Scorer", "TaylorScorer"), "integrations.protocol"),
    **dict.fromkeys(("Measured", "Result", "compress", "compress_files", "measure"), "compression"),
    **dict.fromkeys(("Evaluation", "evaluate", "perplexity"), "evaluation"),
    **dict.fromkeys(("head_residuals", "rank_heads"), "method.head_residual"),
    **dict.fromkeys(("load_scores", "save_scores"), "checkpoint.scores_file"),
    **dict.fromkeys(("mask", "prune"), "method.surgery"),
    **dict.fromkeys(("Recovered", "recover"), "method.recovery.job"),
    "Recipe": "recipe",
    "Recovery": "method.recovery.request",
    "calibrate": "method.statistics",
    "calibrate_streamed": "scale.job",
    "calibration": "method.calibration_data",
    "fuse": "method.scores",
    "groups": "arch",
    "layer_influence": "method.layer_influence",
    "learn_masks": "method.mask_learning",
    "load": "checkpoint.loading",
    "open_stored": "checkpoint.stored_model",
    "plan": "method.selection",
    "plan_for": "deploy.planning",
    "prove": "method.derivation",
    "prune_files": "method.pruned_files",
    "rank_layers": "method.depth",
    "reconstruct": "method.reconstruction",
    "save": "checkpoint.saving",
    "score": "method.criteria",
    "skeleton": "checkpoint.skeleton",
}

__all__ = [*sorted(_HOMES), "ops"]

_adaptive.register()
_moved.register()


def __getattr__(name: str) -> _Any:
    if name in _HOMES:
        value = getattr(_importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    if name == "ops":
        return _importlib.import_module(".ops", __name__)
    if name in _moved.NAMES:
        return getattr(_importlib.import_module(__name__), _moved.renamed(name))
    if name in _moved.MODULES:
        return _moved.module(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
