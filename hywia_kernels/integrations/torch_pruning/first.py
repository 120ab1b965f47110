"""Torch-Pruning's magnitude and first-order Taylor scorers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch_pruning.pruner import importance

from ..measured import measured
from ..modules import BySide, Sums, bias_terms, gradient, magnitude_sums, taylor_sums, tensor_of
from .base import TYPES, Scorer

__all__ = ["MagnitudeImportance", "TaylorImportance"]


class MagnitudeImportance(Scorer, importance.MagnitudeImportance):
    """Sum of `|w|^p` over each channel of every member.

    Args:
        p, group_reduction, normalizer, bias, target_types: upstream's.
        upstream_compat: see the module. backend: of the ops (p = 1 and 2; other powers are taken by torch first).
    """

    def __init__(
        self,
        p: float = 2,
        group_reduction: str | None = "mean",
        normalizer: Any = "mean",
        bias: bool = False,
        target_types: Sequence[type] = TYPES,
        *,
        upstream_compat: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(p, group_reduction, normalizer, bias, list(target_types))
        self._begin(upstream_compat, backend)

    def _sums(self, owner: Any, side: str) -> BySide:
        weight = tensor_of(owner)
        assert weight is not None
        return self._kept(owner, (weight,), lambda: magnitude_sums(owner, weight, self.p, self.backend))

    def _bias(self, owner: Any) -> Tensor | None:
        terms = bias_terms(owner, grad=False)
        return None if terms is None else terms[0].abs().pow(self.p)


class TaylorImportance(Scorer, importance.TaylorImportance):
    """First-order Taylor: `Σ|w·g|` over each channel of every member, or `|Σ w·g|` with `multivariable=True`.

    Gradients are read from `.grad`; for a module that has none, from `accumulate_fisher(model, batches)`.

    Args:
        group_reduction, normalizer, multivariable, bias, target_types: upstream's.
        upstream_compat: see the module. backend: of the ops.
    """

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: Any = "mean",
        multivariable: bool = False,
        bias: bool = False,
        target_types: Sequence[type] = TYPES,
        *,
        upstream_compat: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(group_reduction, normalizer, multivariable, bias, list(target_types))
        self._begin(upstream_compat, backend)

    def _value(self, sums: Sums) -> Tensor:
        return sums.signed.abs() if self.multivariable else sums.fine

    def _sums(self, owner: Any, side: str) -> BySide | None:
        weight = tensor_of(owner)
        assert weight is not None
        if weight.grad is None:
            before = measured(owner, side, self.scope)
            if before is not None:
                return {side: before.sums("first")}
        grad = gradient(owner, weight)
        return self._kept(owner, (weight, grad), lambda: taylor_sums(owner, weight, grad, self.backend))

    def _bias(self, owner: Any) -> Tensor | None:
        terms = bias_terms(owner, grad=True)
        return None if terms is None else (terms[0] * terms[1]).abs()  # type: ignore[operator]
