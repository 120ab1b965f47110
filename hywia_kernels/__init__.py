"""Hybrid-grained weight importance kernels and structured pruning for language models (HyWIA, arXiv 2403.10799).

    import hywia_kernels as hk

    model, tokenizer = hk.load("smollm2")
    batches = hk.calibration(model, tokenizer)             # or hk.calibration(model, tokenizer, "text.jsonl")
    scores = hk.score(model, batches, fusion="attention")
    plan = hk.plan(scores, ratio=0.2)
    hk.prune(model, plan)
    hk.save(model, tokenizer, "smollm2-small", plan=plan)

Importing the package probes no device and compiles nothing; transformers is imported on first use. One thing is added
outside the package: the config and model class of checkpoints whose layers differ in width are registered with the auto
classes of transformers; until it is imported, a finder in `sys.meta_path` waits for that (`adaptive.register`).
"""

from typing import Any as _Any

from . import ops
from .arch import groups
from .checkpoint import adaptive
from .checkpoint.loading import load
from .checkpoint.saving import save
from .checkpoint.scores_file import load_scores, save_scores
from .errors import BackendError, HywiaError, UsageError
from .evaluation import evaluate, perplexity
from .method.calibration_data import calibration
from .method.head_residual import leftover, with_leftover
from .method.mask_learning import learn
from .method.reconstruction import refit
from .method.scores import fuse, score
from .method.selection import plan
from .method.statistics import calibrate
from .method.surgery import mask, prune
from .types import Group, Member, Plan, Scores, Statistics

__all__ = [
    "BackendError",
    "Group",
    "HyWIAScorer",
    "HywiaError",
    "MagnitudeScorer",
    "Member",
    "Plan",
    "Scorer",
    "Scores",
    "Statistics",
    "TaylorScorer",
    "UsageError",
    "calibrate",
    "calibration",
    "evaluate",
    "fuse",
    "groups",
    "learn",
    "leftover",
    "load",
    "load_scores",
    "mask",
    "ops",
    "perplexity",
    "plan",
    "prune",
    "refit",
    "save",
    "save_scores",
    "score",
    "with_leftover",
]
__version__ = "0.1.0"

adaptive.register()

_SCORERS = ("HyWIAScorer", "MagnitudeScorer", "Scorer", "TaylorScorer")  # imported when they are asked for


def __getattr__(name: str) -> _Any:
    if name in _SCORERS:
        from .integrations import protocol

        return getattr(protocol, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
