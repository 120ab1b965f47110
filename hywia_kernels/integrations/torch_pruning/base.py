"""The scorers' common part: which members of a group count, where their channels belong, and how they are combined."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch_pruning.pruner import function

from ..modules import BySide, Sums, SumsCache, tensor_of
from ..placement import Placement, Straight, placement, reduced
from .steps import running_step

__all__ = ["TYPES", "Member", "Scorer"]

TYPES = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)

# Which side of a module a pruning function cuts, and whether the layer is a vector.
SIDES = {
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


class Member(NamedTuple):
    """A scored member of a group: whose weight, which side of it, and where its channels belong."""

    owner: Any
    side: str
    idxs: Sequence[int]
    place: Placement


class Scorer:
    """The scorers' common part, mixed into upstream's classes: one number per root channel from a group's members."""

    group_reduction: str | None
    normalizer: Any
    target_types: Sequence[type]
    bias: bool

    def _begin(self, upstream_compat: bool, backend: str | None) -> None:
        self.upstream_compat, self.backend = upstream_compat, backend
        self.cache = SumsCache()
        self.scope: Any = None  # stands for a stretch of time in which weights and gradients stay as they are
        self._declared = False
        self._step: Any = None  # the frame of the pruner's step that the present scope stands for

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Declare that weights and gradients stay as they are within the context, but for changes that torch counts.

        Each is then read once for all the groups that it is in, as in a step of Torch-Pruning's own pruners.
        """
        before = self.scope, self._declared
        self.scope, self._declared = object(), True
        try:
            yield
        finally:
            self.scope, self._declared = before
            self.cache.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "scope": None, "_declared": False, "_step": None}

    def clear(self) -> None:
        """Forget every result kept."""
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
        if not self._declared:
            step = running_step()
            if step is not self._step:
                self._step, self.scope = step, None if step is None else object()
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

    def _members(self, group: Any, roots: int) -> Iterator[Member]:
        types, straight = tuple(self.target_types), Straight(group[0].idxs)
        for i, (dep, idxs) in enumerate(group):
            owner = dep.target.module
            if not isinstance(owner, types):
                continue
            side = SIDES.get(dep.handler)
            weight = tensor_of(owner)
            if side is None or weight is None:
                continue  # an operation, a layer that upstream has no branch for, or a norm without weight
            if isinstance(owner, Tensor) and weight.dim() != 1:
                continue  # along which dimension of a bare parameter the channels lie is the graph's knowledge
            place = placement(idxs, group[i].root_idxs, self._width(owner, weight, side), roots, straight)
            if place is not None:
                yield Member(owner, side, idxs, place)

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

    def _channels(self, member: Member) -> Iterator[Tensor]:
        """Scores float32 `[channels]` of a member's weight, then of its bias if that counts."""
        sides = self._sums(member.owner, member.side)
        if sides is not None:
            values = self._value(sides[member.side])
            yield self._repeated(values, member)
        if self.bias and member.side == "out":
            bias = self._bias(member.owner)
            if bias is not None:
                yield bias

    @staticmethod
    def _repeated(values: Tensor, member: Member) -> Tensor:
        """The input channels of a grouped convolution are as many as its weight has, once for every group."""
        width = Scorer._width(member.owner, tensor_of(member.owner), member.side)  # type: ignore[arg-type]
        times = width // max(1, values.shape[-1])
        return values.repeat(times) if times > 1 else values

    def _value(self, sums: Sums) -> Tensor:
        return sums.fine

    def _sums(self, owner: Any, side: str) -> BySide | None:
        raise NotImplementedError

    def _bias(self, owner: Any) -> Tensor | None:
        raise NotImplementedError

    def _kept(self, owner: Any, tensors: tuple[Tensor, ...], compute: Callable[[], BySide]) -> BySide:
        if isinstance(owner, Tensor):  # a vector, which costs next to nothing to read again
            return compute()
        return self.cache.get(owner, tensors, compute, self.scope)
