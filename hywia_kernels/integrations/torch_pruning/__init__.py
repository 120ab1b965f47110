"""Torch-Pruning's scorers over this package's kernels, and one that it does not have.

    from hywia_kernels.integrations import torch_pruning as importance

    scorer = importance.TaylorImportance()          # was: tp.importance.TaylorImportance()
    pruner = tp.pruner.BasePruner(model, example_inputs, importance=scorer, ...)

Signatures, reductions, normalisers and results are upstream's, for torch-pruning 1.5 and 1.6, up to float32 rounding
and but for the points below. `upstream_compat=True` hands the whole call to upstream's own class, bits and defects
included. Names that are not defined here are upstream's.

Where results differ
--------------------
1. Hessian: `accumulate_grad` averages over its calls. Upstream looks for a name in a dictionary of parameters, and so
   keeps the last call alone, with a count of 1.
2. Hessian: gradients are left as they are. Upstream overwrites every `.grad` with the accumulated squares, and lets a
   scorer without any accumulation read plain gradients as if they were squares; here that is an error.
3. Hessian: a BatchNorm's bias counts with `bias=True`. Upstream's test for its gradient is inverted.
4. Taylor: BatchNorm counts. Upstream's branch tests for GroupNorm's pruning function.
5. Grouped-query attention: key and value heads count, an equal share of a channel's score for each query head it
   serves. Upstream finds `None` among their root indices and leaves them out.
6. `idxs` and `root_idxs` are read as pairs, in whatever order. Upstream sorts the one without the other, in the
   caller's list.
7. Several channels of a member under one root: "max" and "prod" take all of them, "first" and "gate" their sum;
   upstream keeps whichever is written last. Scores are as long as the group's root, even if a longer member is first.
8. `target_types` may also name nn.Embedding, nn.GroupNorm and nn.Parameter (bare vectors, such as RMSNorm's weight);
   upstream has no branch for them, or (GroupNorm) in Taylor only.
9. Sums are float32 whatever the weights' dtype, and a missing gradient is an error that says what to do.

Each weight is read once for both its axes in a pruner's `step()`. Nothing is kept longer, for much changes weights
without telling torch: fused optimisers, `tensor.data`, loading by assignment. Who calls a scorer for one group after
another says that nothing changes meanwhile: `with scorer.unchanged(): scores = [scorer(group) for group in groups]`.
"""

from __future__ import annotations

from typing import Any

from ..measured import accumulate_fisher, clear_fisher

try:
    from torch_pruning.pruner import importance as _upstream
except ImportError as error:
    raise ImportError(
        f"hywia_kernels.integrations.torch_pruning needs Torch-Pruning ({error}); pip install 'torch-pruning>=1.5'"
    ) from error

from .first import MagnitudeImportance, TaylorImportance
from .hessian import HessianImportance
from .hybrid import HyWIAImportance

__all__ = [
    "GroupHessianImportance",
    "GroupMagnitudeImportance",
    "GroupTaylorImportance",
    "HessianImportance",
    "HyWIAImportance",
    "MagnitudeImportance",
    "TaylorImportance",
    "accumulate_fisher",
    "clear_fisher",
]

GroupMagnitudeImportance, GroupTaylorImportance, GroupHessianImportance = (
    MagnitudeImportance,
    TaylorImportance,
    HessianImportance,
)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(_upstream, name)
