"""Hybrid-grained importance through Torch-Pruning's contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch_pruning.pruner import importance

from ...errors import UsageError
from ...method import scores as fusions
from ...settings import BLEND, ORDERS
from ..measured import any_measured, measured
from ..modules import gradient, taylor_sums, tensor_of
from .base import TYPES, Member, Scorer

__all__ = ["HyWIAImportance"]


class HyWIAImportance(Scorer, importance.Importance):
    """Hybrid-grained importance (HyWIA, arXiv 2403.10799): fine and coarse estimates of every unit, fused.

    Fine is `Σ|t|` over a unit's weights, coarse `|Σ t|` over each member's part of it, added up over members; t is the
    Taylor term of `order`. `hywia_kernels.ops.attention_fusion` states the default fusion, which is this project's
    reading of the paper.

    Args:
        fusion: "attention", or its ablations "fine", "coarse", "mean", "product".
        order: "first" reads `.grad` (or `accumulate_fisher` where there is none); "second" and "mixed" need
            `accumulate_fisher(model, batches)`.
        num_heads: the pruner's own dictionary, module -> heads. Groups of attention are then judged by whole heads, and
            all channels of one get its score; without it, channel by channel.
        normalizer: as upstream's. Attention and mean fusion give standardised scores, negative ones too, comparable
            within one group only: rank locally, or use "fine", "coarse" or "product".
        target_types: as upstream's. backend: of the ops.
    """

    group_reduction = "sum"
    bias = False

    def __init__(
        self,
        fusion: str = BLEND,
        order: str = "second",
        num_heads: Mapping[nn.Module, int] | None = None,
        normalizer: Any = None,
        target_types: Sequence[type] = TYPES,
        *,
        backend: str | None = None,
    ) -> None:
        if fusion not in fusions.FUSIONS:
            raise UsageError(f"fusion: expected one of {', '.join(fusions.FUSIONS)}, got {fusion!r}")
        if order not in ORDERS:
            raise UsageError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
        self.fusion, self.order, self.normalizer = fusion, order, normalizer
        self.num_heads = {} if num_heads is None else num_heads  # the pruner's own: it counts heads down in it
        self.target_types = list(target_types)
        self._begin(False, backend)

    def _scores(self, group: Any) -> Tensor | None:
        roots = len(group[0].idxs)
        members = list(self._members(group, roots))
        heads = (
            max((self.num_heads.get(m.owner, 0) for m in members if m.side == "out"), default=0)
            if self.num_heads
            else 0
        )
        size = roots // heads if heads and roots % heads == 0 else 1
        fine = coarse = None
        for member in members:
            estimates = self._estimates(member, size)
            if estimates is None:
                continue
            if fine is None or coarse is None:
                fine, coarse = estimates
            else:
                fine, coarse = fine + estimates[0].to(fine.device), coarse + estimates[1].to(fine.device)
        if fine is None or coarse is None:
            return None
        # On the CPU in float64: the vectors are short, and every machine gets the same scores.
        prior = fusions.prior("head" if size > 1 else "channel")
        score = fusions.blend(fine.cpu(), coarse.cpu(), self.fusion, "reference", prior)
        scores = score.repeat_interleave(size) if size > 1 else score
        return importance.MagnitudeImportance()._normalize(scores, self.normalizer)

    def _estimates(self, member: Member, size: int) -> tuple[Tensor, Tensor] | None:
        """`(fine, coarse)` of one member's part of every unit, `size` root channels each."""
        owner, side, _, place = member
        weight = tensor_of(owner)
        assert weight is not None
        if self.order != "first" or weight.grad is None:
            before = measured(owner, side, self.scope)
            if before is not None:
                fine = place(before.fine[self.order]).view(-1, size).sum(1)
                samples = place(before.samples).unflatten(1, (-1, size)).sum(2)
                return fine, fusions.coarse_estimate(samples[None], self.order)
            if self.order != "first":
                if any_measured():
                    return None
                raise UsageError(
                    f"order: expected accumulate_fisher(model, batches) before scoring with {self.order!r}, got none; "
                    "call it, or pass order='first' and leave gradients in .grad"
                )
        grad = gradient(owner, weight)
        sums = self._kept(owner, (weight, grad), lambda: taylor_sums(owner, weight, grad, self.backend))[side]
        fine, signed = (place(self._repeated(v, member)).view(-1, size).sum(1) for v in sums)
        return fine, signed.abs()
