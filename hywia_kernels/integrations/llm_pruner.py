"""LLM-Pruner's scorers over this package's kernels, and HyWIA's.

    from hywia_kernels.integrations import llm_pruner as llama_pruner
                                       # was: from LLMPruner.pruner import hf_llama_pruner as llama_pruner

Constructors, reductions, the normaliser's two arguments and the keywords of the call are upstream's; so are names not
defined here, such as `hf_rmsnorm_pruner`. `upstream_compat=True` hands the whole call to upstream's own class, bits and
defects included.

Where results differ
--------------------
1. Grouped-query attention: query heads are consecutive, `k·rep … k·rep + rep − 1` under KV head `k`, and a channel of
   theirs counts towards that head. Upstream folds with the stride of the KV heads and credits others.
2. A member with fewer channels than the root (KV heads under a query root) shares its score among the heads it serves,
   and scores are as long as the root. Upstream shortens them to the shortest member, whatever the root.
3. `hf_attention_pruner`: all four criteria work. Upstream raises TypeError or NotImplementedError but for "vectorize".
4. `idxs` are followed in every branch and left as they are. Upstream sorts the caller's list, and ignores it for
   linear output channels and RMSNorm (Taylor).
5. Embeddings in MagnitudeImportance are summed over their entries; upstream leaves a matrix there.
6. Products and sums are float32 whatever the weights' dtype: in float16 upstream's second-order terms become zero.
7. A `taylor` that is unknown, or a missing gradient, is an error that says what to do.

Second order without `.acc_grad`: `accumulate_fisher(model, batches)` instead of the per-sample loop. It hangs nothing
on parameters; upstream's `.acc_grad` outlives pruning steps and is saved with checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..errors import UsageError
from ..method import scores as fusions
from ..settings import BLEND, ORDERS
from .measured import Measured, accumulate_fisher, clear_fisher, measured
from .modules import Sums, gradient
from .placement import Straight

try:
    import LLMPruner.torch_pruning as tp
    from LLMPruner.pruner import hf_llama_pruner as upstream
except ImportError as error:
    if error.name is not None and error.name.partition(".")[0] != "LLMPruner":
        raise ImportError(f"LLM-Pruner was found, but it needs a package that was not: {error}") from error
    raise ImportError(
        "hywia_kernels.integrations.llm_pruner needs LLM-Pruner, which is no package to install: "
        f"git clone https://github.com/horseee/LLM-Pruner and add the folder to PYTHONPATH ({error})"
    ) from error

__all__ = ["HyWIAImportance", "MagnitudeImportance", "TaylorImportance", "accumulate_fisher", "clear_fisher"]

_ORDERS = {"vectorize": "first", "param_first": "first", "param_second": "second", "param_mix": "mixed"}
_REDUCTIONS = ("sum", "mean", "max", "prod", "first", "second", None)

# Axis of the weight that a handler cuts; None is a vector.
_AXES: dict[Any, int | None] = {
    tp.prune_linear_out_channels: 0,
    tp.prune_linear_in_channels: 1,
    tp.prune_embedding_out_channels: 1,
    upstream.hf_linear_pruner.prune_out_channels: 0,
    upstream.hf_linear_pruner.prune_in_channels: 1,
    upstream.hf_rmsnorm_pruner.prune_out_channels: None,
}


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(upstream, name)


class _Part(NamedTuple):
    """One weight that counts towards a member's score."""

    owner: Any
    axis: int | None


def _parts(owner: Any, handler: Any) -> list[_Part] | None:
    """The weights behind a member, or None when it is not scored."""
    if handler == upstream.hf_attention_pruner.prune_out_channels:  # the hidden dimension, around a whole attention
        return [_Part(owner.o_proj, 0)] + [_Part(p, 1) for p in (owner.q_proj, owner.k_proj, owner.v_proj)]
    return [_Part(owner, _AXES[handler])] if handler in _AXES else None


class _Scorer:
    """The scorers' common part, mixed into upstream's classes: one number per root channel from a group's members."""

    group_reduction: str | None
    normalizer: Any

    def _begin(self, upstream_compat: bool, head_dim: int | None, backend: str | None) -> None:
        self.upstream_compat, self.head_dim, self.backend = upstream_compat, head_dim, backend
        if self.group_reduction not in _REDUCTIONS:
            raise UsageError(f"group_reduction: expected one of {_REDUCTIONS}, got {self.group_reduction!r}")

    def __call__(self, group: Any, ch_groups: int = 1, consecutive_groups: int = 1) -> Tensor | None:
        """Scores of a group.

        Args:
            group: LLM-Pruner's: pairs `(dep, idxs)`, the root first.
            ch_groups: not used. consecutive_groups: channels of a head, where the group is an attention's.

        Returns:
            float32, one per channel of the root, in its order; larger is more important. None when no member is scored.

        Raises:
            UsageError: a member without what this scorer reads, or channels that are no multiple of heads.
        """
        if self.upstream_compat:
            return super().__call__(group, ch_groups, consecutive_groups)  # type: ignore[misc]
        with torch.no_grad():
            members = [(parts, idxs) for dep, idxs in group if (parts := _parts(dep.target.module, dep.handler))]
            if not members:
                return None
            roots = len(group[0][1])
            return self._scores(group, members, roots, consecutive_groups)

    def _scores(self, group: Any, members: list, roots: int, consecutive: int) -> Tensor:
        values = self._values([part for parts, _ in members for part in parts])
        home, rows = None, []
        straight = None
        for parts, idxs in members:
            total = next(values)  # the first one launches the kernels of all
            straight = straight or Straight(group[0][1])
            for _ in parts[1:]:
                total = total + next(values)
            home = total.device if home is None else home
            rows.append(self._aligned(_picked(total, idxs, straight), roots, consecutive).to(home))
        scores = self._reduced(rows)
        return scores if self.normalizer is None else self.normalizer(group, scores)

    def _reduced(self, rows: list[Tensor]) -> Tensor:
        """One number per root channel from the members' `[..., roots]`; all of them, stacked, without a reduction."""
        reduction = self.group_reduction
        if reduction in ("first", "second"):
            return rows[("first", "second").index(reduction)]
        stacked = torch.stack(rows)
        if reduction is None:
            return stacked
        if reduction == "max":
            return stacked.amax(0)
        if reduction == "prod":
            return stacked.prod(0)
        return stacked.mean(0) if reduction == "mean" else stacked.sum(0)

    def _aligned(self, values: Tensor, roots: int, consecutive: int) -> Tensor:
        """Values `[..., channels]` at the root's channels: heads folded into, or shared by, the heads they go with."""
        channels = values.shape[-1]
        if channels == roots:
            return values
        head = consecutive if consecutive > 1 else self.head_dim
        few, many = sorted((channels, roots))
        if many % few or head is None or few % head:
            raise UsageError(
                f"group: expected members of {roots} channels, or of whole heads that go with the root's, got one of "
                f"{channels} with heads of {head}; pass consecutive_groups or head_dim"
            )
        rep = many // few
        if channels > roots:
            return values.unflatten(-1, (-1, rep, head)).sum(-2).flatten(-2)
        return (values / rep).unflatten(-1, (-1, 1, head)).repeat_interleave(rep, -2).flatten(-3)

    def _values(self, parts: Sequence[_Part]) -> Iterator[Tensor]:
        """Scores float32 `[channels]` of each of the weights, in their order."""
        raise NotImplementedError


def _picked(values: Tensor, idxs: Sequence[int], straight: Straight) -> Tensor:
    """The channels `idxs`, in their order."""
    if len(idxs) == values.shape[-1] and straight(idxs):
        return values
    return values[..., torch.as_tensor(idxs, dtype=torch.int64, device=values.device)]


class _Operands(NamedTuple):
    """The tensors from which one weight is scored."""

    weight: Tensor
    grad: Tensor | None
    fisher: Tensor | None


def _sums(parts: Sequence[_Part], operands: Sequence[_Operands], order: str, backend: str | None) -> list[Sums]:
    """Taylor sums of weights, in one launch for all the matrices of a device."""
    results: list[Sums | None] = [None] * len(parts)
    by_device: dict[torch.device, list[int]] = {}
    for i, (part, given) in enumerate(zip(parts, operands, strict=True)):
        if part.axis is None:
            term = torch.zeros_like(given.weight, dtype=torch.float32)
            if given.grad is not None:
                term += given.weight.float() * given.grad.float()
            if given.fisher is not None:
                half = 0.5 * given.fisher.float() * given.weight.float().square()
                term = half if order == "second" else term - half
            results[i] = Sums(term.abs(), term)
        else:
            by_device.setdefault(given.weight.device, []).append(i)
    for here in by_device.values():
        chosen = [operands[i] for i in here]
        batch_sums = ops.taylor_importance_batch(
            [c.weight for c in chosen],
            None if order == "second" else [c.grad for c in chosen],  # type: ignore[misc]
            None if order == "first" else [c.fisher for c in chosen],  # type: ignore[misc]
            axes=[parts[i].axis for i in here],  # type: ignore[misc]
            order=order,
            backend=backend,
        )
        for i, sums in zip(here, batch_sums, strict=True):
            results[i] = Sums(*sums)
    return results  # type: ignore[return-value]


class MagnitudeImportance(_Scorer, upstream.MagnitudeImportance):
    """Sum of `|w|^p` over each channel of every member.

    Args:
        p, group_reduction, normalizer: upstream's; the normaliser is called with `(group, scores)`.
        upstream_compat: see the module. head_dim: channels of a head, for callers that pass no `consecutive_groups`.
        backend: of the ops (p = 1 and 2; other powers are taken by torch first).
    """

    def __init__(
        self,
        p: float = 2,
        group_reduction: str | None = "mean",
        normalizer: Any = None,
        *,
        upstream_compat: bool = False,
        head_dim: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(p, group_reduction, normalizer)
        self._begin(upstream_compat, head_dim, backend)

    def _values(self, parts: Sequence[_Part]) -> Iterator[Tensor]:
        operands = []
        for part in parts:
            weight = part.owner.weight.detach()
            if self.p not in (1, 2) or weight.dim() == 1:
                weight = weight.float().abs().pow(self.p)
            one = torch.ones((), dtype=torch.float32, device=weight.device).expand(weight.shape)
            operands.append(_Operands(weight, weight if self.p == 2 and weight.dim() > 1 else one, None))
        return (sums.fine for sums in _sums(parts, operands, "first", self.backend))


class TaylorImportance(_Scorer, upstream.TaylorImportance):
    """LLM-Pruner's four criteria, per channel of every member.

    "vectorize": `|Σ w·g|`; "param_first": `Σ|w·g|`; "param_second": `Σ|w·F·w|`; "param_mix": `Σ|w·g − ½·w·F·w|`, with
    `g` from `.grad` and `F` from `.acc_grad`; for linear layers that lack what the criterion needs, both from
    `accumulate_fisher(model, batches)`.

    Args:
        group_reduction, normalizer, taylor: upstream's; the normaliser is called with `(group, scores)`.
        upstream_compat: see the module. head_dim: channels of a head, for callers that pass no `consecutive_groups`.
        backend: of the ops.
    """

    def __init__(
        self,
        group_reduction: str | None = "sum",
        normalizer: Any = None,
        taylor: str | None = None,
        *,
        upstream_compat: bool = False,
        head_dim: int | None = None,
        backend: str | None = None,
    ) -> None:
        if taylor not in _ORDERS and not upstream_compat:
            raise UsageError(f"taylor: expected one of {', '.join(_ORDERS)}, got {taylor!r}")
        super().__init__(group_reduction, normalizer, taylor)
        self._begin(upstream_compat, head_dim, backend)

    def _values(self, parts: Sequence[_Part]) -> Iterator[Tensor]:
        order = _ORDERS[self.taylor]
        before = [_measured(part, order) for part in parts]
        fresh = [i for i, kept in enumerate(before) if kept is None]
        operands = [_operands(parts[i].owner, order) for i in fresh]
        sums = dict(zip(fresh, _sums([parts[i] for i in fresh], operands, order, self.backend), strict=True))
        for i, kept in enumerate(before):
            fine, signed = sums[i] if kept is None else kept.sums(order)
            if self.taylor == "vectorize" and parts[i].axis is not None:
                yield signed.abs()
            else:
                yield 2.0 * fine if order == "second" else fine  # the ops' second-order term has a half


def _measured(part: _Part, order: str) -> Measured | None:
    """What `accumulate_fisher` left for a weight, if it lacks a tensor that the order needs."""
    weight = part.owner.weight
    lacks = (order != "second" and weight.grad is None) or (order != "first" and not hasattr(weight, "acc_grad"))
    return measured(part.owner, ("out", "in")[part.axis]) if lacks and part.axis is not None else None


def _operands(owner: Any, order: str) -> _Operands:
    weight = owner.weight
    fisher: Any = getattr(weight, "acc_grad", None)
    if order != "first" and fisher is None:
        raise UsageError(
            f"{type(owner).__name__} {list(weight.shape)}: expected squares of gradients in .acc_grad, got none; "
            "call accumulate_fisher(model, batches), or accumulate them sample by sample"
        )
    grad = None if order == "second" else gradient(owner, weight).detach()
    return _Operands(weight.detach(), grad, None if order == "first" else fisher.detach())


class HyWIAImportance(_Scorer, tp.importance.Importance):
    """Hybrid-grained importance (HyWIA, arXiv 2403.10799): fine and coarse estimates of every unit, fused.

    A unit is `consecutive_groups` channels of the root (a head), whose score all of them get. Estimates and arguments
    are those of `hywia_kernels.integrations.torch_pruning.HyWIAImportance`.
    """

    group_reduction = "sum"

    def __init__(
        self,
        fusion: str = BLEND,
        order: str = "second",
        normalizer: Any = None,
        *,
        head_dim: int | None = None,
        backend: str | None = None,
    ) -> None:
        if fusion not in fusions.FUSIONS:
            raise UsageError(f"fusion: expected one of {', '.join(fusions.FUSIONS)}, got {fusion!r}")
        if order not in ORDERS:
            raise UsageError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
        self.fusion, self.order, self.normalizer = fusion, order, normalizer
        self._begin(False, head_dim, backend)

    def _scores(self, group: Any, members: list, roots: int, consecutive: int) -> Tensor:
        size = consecutive if consecutive > 1 and roots % consecutive == 0 else 1
        straight = Straight(group[0][1])
        fine = torch.zeros(roots // size)
        coarse = torch.zeros_like(fine)
        for parts, idxs in members:
            for part in parts:
                by_channel, by_sample = self._both(part)
                by_channel, by_sample = (
                    self._aligned(_picked(v, idxs, straight), roots, consecutive)
                    .cpu()
                    .unflatten(-1, (-1, size))
                    .sum(-1)
                    for v in (by_channel, by_sample)
                )
                fine += by_channel
                coarse += fusions.coarse_estimate(by_sample[None], self.order)
        prior = fusions.prior("head" if size > 1 else "channel")
        scores = fusions.blend(fine, coarse, self.fusion, "reference", prior).repeat_interleave(size)
        return scores if self.normalizer is None else self.normalizer(group, scores)

    def _both(self, part: _Part) -> tuple[Tensor, Tensor]:
        """`(fine [channels], signed sums [samples, channels])` of one weight."""
        weight = part.owner.weight
        if part.axis is not None and (self.order != "first" or weight.grad is None):
            before = measured(part.owner, ("out", "in")[part.axis])
            if before is not None:
                return before.fine[self.order], before.samples
        if self.order != "first":
            raise UsageError(
                f"order: expected accumulate_fisher(model, batches) before scoring with {self.order!r}, got none for "
                f"{type(part.owner).__name__} {list(weight.shape)}; call it, or pass order='first'"
            )
        ((fine, signed),) = _sums([part], [_operands(part.owner, "first")], "first", self.backend)
        return fine, signed[None]
