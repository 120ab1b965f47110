"""Maps from the channels of a group's members to the group's root channels, and reductions without atomics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError

__all__ = ["REDUCTIONS", "Placement", "Straight", "placement", "reduced"]

REDUCTIONS = ("sum", "mean", "max", "prod", "first", "gate", None)
_PAD = {"max": -torch.inf, "prod": 1.0}
_START = {"max": -99999.0, "prod": 1.0}  # of roots that no member reaches: what Torch-Pruning gives them


@lru_cache(maxsize=64)
def _straight(n: int) -> list[int]:
    return list(range(n))


class Straight:
    """Whether lists of indices are 0 … n − 1, which almost all are.

    A group's lists mostly hold the very numbers of its root's, or are that list: comparing with it takes a fifth of the
    time that comparing with other numbers takes (tens of microseconds instead of hundreds for a model's widths).
    """

    def __init__(self, root: Sequence[int]) -> None:
        self._known = root if root == _straight(len(root)) else _straight(len(root))

    def __call__(self, idxs: Sequence[int | None]) -> bool:
        return idxs is self._known or idxs == self._known


class Placement:
    """Root channel `r` takes the member's channels `index[r]`, in a fixed order.

    `index` is int64 `[roots, most]`, padded with the number of channels; None is the identity. `weight` `[roots]` is
    what a root gets of a channel it shares with others; None is all of it.
    """

    def __init__(self, index: Tensor | None, weight: Tensor | None = None) -> None:
        self.index, self.weight = index, weight

    def __call__(self, values: Tensor, reduction: str | None = "sum") -> Tensor:
        """Values `[..., channels]` brought to the roots, `[..., roots]`; `reduction` combines those of one root."""
        if self.index is None:
            return values
        padding = values.new_full((*values.shape[:-1], 1), _PAD.get(reduction or "sum", 0.0))
        padded = torch.cat([values, padding], -1)
        taken = padded[..., self.index.to(values.device)]
        if self.index.shape[1] == 1:
            placed = taken[..., 0]
        elif reduction == "max":
            placed = taken.amax(-1)
        elif reduction == "prod":
            placed = taken.prod(-1)
        else:
            placed = taken.sum(-1)
        return placed if self.weight is None else placed * self.weight.to(values.device)


_IDENTITY = Placement(None)


def placement(
    idxs: Sequence[int], root_idxs: Sequence[int | None], channels: int, roots: int, straight: Straight
) -> Placement | None:
    """The map of one member, or None where nothing says which roots its channels belong to.

    Args:
        idxs: the member's channels, in any order, repeated or not.
        root_idxs: for each of them its root channel; likewise. All None, in a list as long as the root: `idxs[r]`
            serves root `r` along with others (a KV head its query heads), and each gets an equal share of its score.
        channels: of the member. roots: of the group. straight: made of the group's root.
    """
    if channels == roots and straight(idxs) and straight(root_idxs):
        return _IDENTITY
    if len(root_idxs) == 0:
        return Placement(torch.full((roots, 1), channels))
    if None in root_idxs:
        if len(idxs) != roots or any(r is not None for r in root_idxs):
            return None
        shared = np.asarray(idxs, dtype=np.int64)
        times = np.bincount(shared, minlength=channels)[shared]
        return Placement(torch.from_numpy(shared)[:, None], torch.from_numpy(1.0 / times).float())
    of, at = np.asarray(idxs, dtype=np.int64), np.asarray(root_idxs, dtype=np.int64)
    if len(of) != len(at):
        return None
    counts = np.bincount(at, minlength=roots)
    order = np.argsort(at, kind="stable")
    place = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
    index = np.full((roots, max(1, int(counts.max()))), channels, dtype=np.int64)
    index[at[order], place] = of[order]
    return Placement(torch.from_numpy(index))


def reduced(members: Sequence[Tensor], reduction: str | None, roots: int) -> Tensor:
    """One number per root from the members' float32 `[roots]`: "sum", "mean", "max", "prod", "first", "gate" (the
    last), or None: all of them, stacked.

    Raises:
        UsageError: an unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise UsageError(f"group_reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    home = members[0].device
    members = [m.to(home) for m in members]
    if reduction is None:
        return torch.stack(list(members))
    if reduction in ("first", "gate"):
        return members[0 if reduction == "first" else -1].clone()
    total = torch.full((roots,), _START.get(reduction, 0.0), dtype=torch.float32, device=home)
    for member in members:
        if reduction == "max":
            torch.maximum(total, member, out=total)
        elif reduction == "prod":
            total *= member
        else:
            total += member
    return total / len(members) if reduction == "mean" else total
