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

Each weight is read once for both its axes. Results are kept by module and dropped when the weight or its gradient is
replaced or changed in place; changes made through `tensor.data` go unseen, so call `scorer.clear()` after them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import fusion as fusions
from ..errors import UsageError
from ..ops.checks import ORDERS
from .measured import accumulate_fisher, any_measured, clear_fisher, measured
from .modules import BySide, Sums, SumsCache, bias_terms, gradient, magnitude_sums, taylor_sums, tensor_of
from .placement import Placement, Straight, placement, reduced

try:
    from torch_pruning.pruner import function, importance
except ImportError as error:
    raise ImportError(
        f"hywia_kernels.integrations.torch_pruning needs Torch-Pruning ({error}); pip install 'torch-pruning>=1.5'"
    ) from error

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

_TYPES = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)

# Which side of a module a pruning function cuts, and whether the layer is a vector.
_SIDES = {
    function.prune_conv_out_channels: "out",
    function.prune_linear_out_channels: "out",
    function.prune_conv_in_channels: "in",
    function.prune_linear_in_channels: "in",
    function.prune_batchnorm_out_channels: "out",
    function.prune_layernorm_out_channels: "out",
    function.prune_groupnorm_out_channels: "out",
    function.prune_embedding_out_channels: "out",
    function.prune_parameter_out_channels: "out",
}


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importance, name)


class _Member(NamedTuple):
    """A scored member of a group: whose weight, which side of it, and where its channels belong."""

    owner: Any
    side: str
    idxs: Sequence[int]
    place: Placement


class _Scorer:
    """What the scorers share: members in, one number per root channel out. Mixed into upstream's classes."""

    group_reduction: str | None
    normalizer: Any
    target_types: Sequence[type]
    bias: bool

    def _begin(self, upstream_compat: bool, backend: str | None) -> None:
        self.upstream_compat, self.backend = upstream_compat, backend
        self.cache = SumsCache()

    def clear(self) -> None:
        """Forget every result kept, and read the weights again."""
        self.cache.clear()

    def __call__(self, group: Any, ch_groups: int = 1, consecutive_groups: int = 1) -> Tensor | None:
        """Scores of a group.

        Args:
            group: torch-pruning's: pairs `(dep, idxs)`, each with `root_idxs`.
            ch_groups, consecutive_groups: not used; LLM-Pruner's pruner passes them.

        Returns:
            float32, one per channel of the group's root; larger is more important. None when no member is scored.

        Raises:
            UsageError: a member without what this scorer reads (gradient, accumulated squares).
        """
        if self.upstream_compat:
            return super().__call__(group)  # type: ignore[misc]
        with torch.no_grad():
            return self._scores(group)

    def _scores(self, group: Any) -> Tensor | None:
        roots = len(group[0].idxs)
        values: list[Tensor] = []
        for member in self._members(group, roots):
            for channels in self._channels(member):
                if self.group_reduction is None:
                    values.append(channels[torch.as_tensor(member.idxs, device=channels.device)])
                else:
                    values.append(member.place(channels, self.group_reduction))
        if not values:
            return None
        return self._normalize(reduced(values, self.group_reduction, roots), self.normalizer)  # type: ignore[attr-defined]

    def _members(self, group: Any, roots: int) -> Iterator[_Member]:
        types, straight = tuple(self.target_types), Straight(group[0].idxs)
        for i, (dep, idxs) in enumerate(group):
            owner = dep.target.module
            if not isinstance(owner, types):
                continue
            side = _SIDES.get(dep.handler)
            weight = tensor_of(owner)
            if (
                side is None or weight is None
            ):  # an operation, a layer upstream has no branch for, a norm without weight
                continue
            if isinstance(owner, Tensor) and weight.dim() != 1:
                continue  # along which dimension of a bare parameter the channels lie is the graph's knowledge
            place = placement(idxs, group[i].root_idxs, self._width(owner, weight, side), roots, straight)
            if place is not None:
                yield _Member(owner, side, idxs, place)

    @staticmethod
    def _width(owner: Any, weight: Tensor, side: str) -> int:
        """How many channels a side of a member has."""
        if weight.dim() == 1:
            return weight.shape[0]
        if isinstance(owner, nn.Embedding):
            return weight.shape[1]
        transposed = getattr(owner, "transposed", False)
        if side == "in":
            return weight.shape[0 if transposed else 1] * (1 if transposed else getattr(owner, "groups", 1))
        return weight.shape[1 if transposed else 0]

    def _channels(self, member: _Member) -> Iterator[Tensor]:
        """Float32 `[channels]` of a member's weight, then of its bias if that counts."""
        sides = self._sums(member.owner, member.side)
        if sides is not None:
            values = self._value(sides[member.side])
            yield self._repeated(values, member)
        if self.bias and member.side == "out":
            bias = self._bias(member.owner)
            if bias is not None:
                yield bias

    @staticmethod
    def _repeated(values: Tensor, member: _Member) -> Tensor:
        """The input channels of a grouped convolution are as many as its weight has, once for every group."""
        width = _Scorer._width(member.owner, tensor_of(member.owner), member.side)  # type: ignore[arg-type]
        times = width // max(1, values.shape[-1])
        return values.repeat(times) if times > 1 else values

    def _value(self, sums: Sums) -> Tensor:
        return sums.fine

    def _sums(self, owner: Any, side: str) -> BySide | None:
        raise NotImplementedError

    def _bias(self, owner: Any) -> Tensor | None:
        raise NotImplementedError

    def _kept(self, owner: Any, tensors: tuple[Tensor, ...], compute: Callable[[], BySide]) -> BySide:
        if isinstance(owner, Tensor):  # vectors: nothing to save
            return compute()
        return self.cache.get(owner, tensors, compute)


class MagnitudeImportance(_Scorer, importance.MagnitudeImportance):
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
        target_types: Sequence[type] = _TYPES,
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
        found = bias_terms(owner, grad=False)
        return None if found is None else found[0].abs().pow(self.p)


class TaylorImportance(_Scorer, importance.TaylorImportance):
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
        target_types: Sequence[type] = _TYPES,
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
            before = measured(owner, side)
            if before is not None:
                return {side: before.sums("first")}
        grad = gradient(owner, weight)
        return self._kept(owner, (weight, grad), lambda: taylor_sums(owner, weight, grad, self.backend))

    def _bias(self, owner: Any) -> Tensor | None:
        found = bias_terms(owner, grad=True)
        return None if found is None else (found[0] * found[1]).abs()  # type: ignore[operator]


class HessianImportance(_Scorer, importance.HessianImportance):
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
        target_types: Sequence[type] = _TYPES,
        *,
        upstream_compat: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(group_reduction, normalizer, bias, list(target_types))
        self._begin(upstream_compat, backend)
        self._calls = SumsCache()  # module -> Σ (w·g)² by side, the bias's own, calls
        self._vectors: dict[int, list] = {}  # of bare parameters: the parameter, Σ (w·g)², calls

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
        before = self._calls.find(owner, (weight,), "zero_grad(), then accumulate_grad(model)")
        if before is None:
            self._calls.put(owner, (weight,), [sums, own, 1])
            return
        before[0] = {s: Sums(before[0][s].fine + new.fine, new.signed) for s, new in sums.items()} or before[0]
        before[1] = before[1] if own is None or before[1] is None else before[1] + own
        before[2] += 1

    def _add_vector(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        term = (parameter.float() * parameter.grad.float()).square()
        seen = self._vectors.setdefault(id(parameter), [parameter, torch.zeros_like(term), 0])
        seen[1] += term
        seen[2] += 1

    def _sums(self, owner: Any, side: str) -> BySide | None:
        if isinstance(owner, Tensor):
            seen = self._vectors.get(id(owner))
            return None if seen is None else {"out": Sums(seen[1] / seen[2], seen[1] / seen[2])}
        if self._calls:
            found = self._calls.find(owner, (owner.weight,), "zero_grad(), then accumulate_grad(model)")
            if found is None or side not in found[0]:
                return None  # it had no gradient
            mean = found[0][side].fine / found[2]
            return {side: Sums(mean, mean)}
        before = measured(owner, side)
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
        found = self._calls.find(owner, (owner.weight,), "zero_grad(), then accumulate_grad(model)")
        return None if found is None or found[1] is None else found[1] / found[2]


class HyWIAImportance(_Scorer, importance.Importance):
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
        fusion: str = "attention",
        order: str = "second",
        num_heads: Mapping[nn.Module, int] | None = None,
        normalizer: Any = None,
        target_types: Sequence[type] = _TYPES,
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
        score = fusions.fused(fine.cpu(), coarse.cpu(), self.fusion, "reference")
        scores = score.repeat_interleave(size) if size > 1 else score
        return importance.MagnitudeImportance()._normalize(scores, self.normalizer)

    def _estimates(self, member: _Member, size: int) -> tuple[Tensor, Tensor] | None:
        """`(fine, coarse)` of one member's part of every unit, `size` root channels each."""
        owner, side, _, place = member
        weight = tensor_of(owner)
        assert weight is not None
        if self.order != "first" or weight.grad is None:
            before = measured(owner, side)
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


GroupMagnitudeImportance, GroupTaylorImportance, GroupHessianImportance = (
    MagnitudeImportance,
    TaylorImportance,
    HessianImportance,
)
