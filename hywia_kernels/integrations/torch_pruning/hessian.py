"""Second order: the diagonal of the empirical Fisher information, kept as sums over channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner import importance

from ...errors import UsageError
from ..measured import any_measured, measured
from ..modules import BySide, Sums, SumsCache, bias_terms, taylor_sums, tensor_of
from .base import TYPES, Scorer

__all__ = ["HessianImportance"]


def _read(owner: Any) -> tuple[Tensor, ...]:
    """The tensors that a module's sums are made of, beside gradients."""
    return (owner.weight,) if getattr(owner, "bias", None) is None else (owner.weight, owner.bias)


class HessianImportance(Scorer, importance.HessianImportance):
    """Diagonal empirical Fisher information: `Σ w²·mean_s g_s²` over each channel of every member.

    Either `accumulate_grad(model)` after the backward of each sample, as upstream, or, for causal language models,
    `accumulate_fisher(model, batches)` once. Neither keeps anything as large as a weight: `Σ_w w²·g²` is summed over
    channels at once, so weights must not change before scoring: accumulate again after a pruning step.

    Args:
        group_reduction, normalizer, bias, target_types: upstream's.
        upstream_compat: see the module. backend: of the ops.
    """

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: Any = "mean",
        bias: bool = False,
        target_types: Sequence[type] = TYPES,
        *,
        upstream_compat: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(group_reduction, normalizer, bias, list(target_types))
        self._begin(upstream_compat, backend)
        self._calls = SumsCache()  # module -> Σ (w·g)² by side, the bias's own, calls
        self._vectors: dict[int, list] = {}  # of bare parameters: the parameter, Σ (w·g)², calls, their stamp

    def clear(self) -> None:
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget what `accumulate_grad` added up."""
        super().zero_grad()
        self._calls.clear()
        self._vectors.clear()

    @torch.no_grad()
    def accumulate_grad(self, model: nn.Module) -> None:
        """Add the squares of one sample's gradients, times the squares of their weights, summed over channels."""
        if self.upstream_compat:
            super().accumulate_grad(model)
            return
        types = tuple(self.target_types)
        owners = [m for m in model.modules() if isinstance(m, types) and tensor_of(m) is not None]
        for owner in owners:
            self._add(owner)
        if nn.Parameter in types:
            known = {id(owner.weight) for owner in owners}
            for parameter in model.parameters():
                if parameter.dim() == 1 and id(parameter) not in known:
                    self._add_vector(parameter)

    def _add(self, owner: Any) -> None:
        weight, bias = owner.weight, bias_terms(owner, grad=True)
        sums: BySide = {}
        if weight.grad is not None:
            term = weight.float() * weight.grad.float()
            sums = taylor_sums(owner, term, term, self.backend)
        own = None if bias is None else (bias[0] * bias[1]).square()  # type: ignore[operator]
        if not sums and own is None:
            return
        before = self._added(owner)
        if before is None:
            self._calls.put(owner, _read(owner), [sums, own, 1])
            return
        before[0] = {s: Sums(before[0][s].fine + new.fine, new.signed) for s, new in sums.items()} or before[0]
        before[1] = before[1] if own is None or before[1] is None else before[1] + own
        before[2] += 1

    def _added(self, owner: Any, scope: Any = None) -> Any | None:
        """`[Σ (w·g)² by side, the bias's own, calls]` of a module; None where nothing was added."""
        return self._calls.find(owner, _read(owner), "zero_grad(), then accumulate_grad(model)", scope)

    def _add_vector(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        term = (parameter.float() * parameter.grad.float()).square()
        record = self._vector(parameter) or [parameter, torch.zeros_like(term), 0, SumsCache.stamp(parameter)]
        self._vectors[id(parameter)] = record
        record[1] += term
        record[2] += 1

    def _vector(self, parameter: Tensor) -> list | None:
        """`[parameter, Σ (w·g)², calls, stamp]` of a bare parameter; None where nothing was added."""
        record = self._vectors.get(id(parameter))
        if record is not None and not record[3].fits(parameter):
            raise UsageError(
                f"{type(parameter).__name__} {list(parameter.shape)}: expected the values whose gradients were added "
                "up, got others; call zero_grad(), then accumulate_grad(model) again"
            )
        return record

    def _sums(self, owner: Any, side: str) -> BySide | None:
        if isinstance(owner, Tensor):
            record = self._vector(owner)
            return None if record is None else {"out": Sums(record[1] / record[2], record[1] / record[2])}
        if self._calls:
            added = self._added(owner, self.scope)
            if added is None or side not in added[0]:
                return None  # it had no gradient
            mean = added[0][side].fine / added[2]
            return {side: Sums(mean, mean)}
        before = measured(owner, side, self.scope)
        if before is not None:
            twice = 2.0 * before.fine["second"]  # the ops' term has a half
            return {side: Sums(twice, twice)}
        if not any_measured():
            raise UsageError(
                f"{type(owner).__name__} {list(owner.weight.shape)}: expected squares of gradients, got none; call "
                "accumulate_grad(model) after each sample's backward, or accumulate_fisher(model, batches)"
            )
        return None

    def _bias(self, owner: Any) -> Tensor | None:
        if isinstance(owner, Tensor):
            return None
        added = self._added(owner, self.scope)
        return None if added is None or added[1] is None else added[1] / added[2]
