from __future__ import annotations

from LLMPruner import torch_pruning as tp


class _Pruner(tp._Functions):
    pass


hf_attention_pruner, hf_rmsnorm_pruner, hf_linear_pruner = _Pruner(), _Pruner(), _Pruner()


class MagnitudeImportance(tp.Importance):
    def __init__(self, p=2, group_reduction="mean", normalizer=None):
        self.p, self.group_reduction, self.normalizer = p, group_reduction, normalizer


class TaylorImportance(tp.Importance):
    def __init__(self, group_reduction="sum", normalizer=None, taylor=None):
        self.group_reduction, self.normalizer, self.taylor = group_reduction, normalizer, taylor

    def __call__(self, group, ch_groups=1, consecutive_groups=1):
        """Rows and columns added up; heads that are many are folded with the stride of those that are few."""
        total = None
        for dep, idxs in group:
            weight = dep.target.module.weight
            term = (weight * weight.grad).detach().abs()
            values = term.sum(0 if dep.handler == tp.prune_linear_in_channels else 1)[idxs]
            values = values.view(-1, len(group[0][1])).sum(0)
            total = values if total is None else total + values
        return total
