"""Orders whose sums do not add up over samples: every process scores some units, over the operands of all samples.

Fine sums of the first and the mixed order are of magnitudes of a mean over all samples, which no process can make of
its own. So operands are kept until all runs have brought theirs, and then change hands. Of a matrix's two operands one
has a column for each row or column that belongs to a unit (the output's gradient of q, k, v, gate and up, the input of
o and down); the other one all of its units share. Units fall into slabs, cut by the model alone and dealt out. A slab's
owner gets its columns and the shared operand from everybody, puts the rows into the runs' order, and scores the slab
once: by the same call on the same numbers, whatever the number of processes.

With `T` tokens, `R` processes and `e` bytes a number, a process receives `(R-1)/R · T · e · (c + w/R)` bytes a layer:
`c` columns of shared operands (four times the hidden size in a LLaMA layer, as q, k and v share theirs, and gate and
up), and `w` of the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import arch, ops
from ..engine.experts import whole_experts
from ..engine.samples import Samples
from ..types import Group, Member
from .operands import Operands, Place, Source
from .ranks import Ranks
from .runs import LEAST, dealt
from .sums import Layout

__all__ = ["Exchange", "exchanged", "kept_columns"]


def exchanged(orders: Sequence[str]) -> bool:
    """Whether the sums of these orders take the operands of all samples together."""
    return tuple(orders) != ("second",)


def kept_columns(modules: Mapping[str, Any], groups: Sequence[Group]) -> int:
    """Numbers a token that are kept of one layer's matrices, at the most; stacked experts are left out."""
    found = [m for m in arch.matrices(modules, groups) if m.index is None]
    views = (arch.view(modules, g.members[i], g.units) for m in found for g, i in m.members)
    return sum(sum(view.shape) for view in views)


@dataclass(frozen=True)
class _Slab:
    """Units from `begin` to `end` of a group, and the process that scores them."""

    group: int
    begin: int
    end: int
    owner: int


class _Sums:
    """A layer's sums over all samples, as `Results` has them. This process makes some; the others stay zero."""

    def __init__(self, layout: Layout, samples: int, device: torch.device) -> None:
        self.samples = samples
        self.fine = {g.name: torch.zeros(len(layout.orders), g.units, device=device) for g in layout.groups}
        shapes = {g.name: (len(g.members), samples, g.units) for g in layout.groups}
        self.coarse = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}

    def row(self, layout: Layout) -> Tensor:
        """The layer's row, float64 `[width]`."""
        scaled = {name: of.double() * self.samples for name, of in self.fine.items()}
        # What an expert's channels add to its own scores may be another process's part, so float64 adds it here too.
        experts = [g.name for g in layout.groups if g.kind == "experts"]
        for name in experts:
            self.fine[name].zero_()
        whole_experts(self.fine, self.coarse, layout.groups)
        for name in experts:
            scaled[name] += self.fine[name].double() * self.samples
        return layout.row(scaled, self.coarse)


@dataclass(frozen=True)
class Exchange:
    """How one layer's operands change hands.

    Attributes:
        modules: the model's, by name. layout: of the layer. operands: of this process's runs. runs: of all processes.
        order: that the op is asked for. scale: that multiplies gradients. device: of the sums. orders: of rows, one at
            the most, which the layers of a pass share.
    """

    modules: Mapping[str, Any]
    layout: Layout
    operands: Operands
    runs: Sequence[Samples]
    ranks: Ranks
    order: str
    scale: float
    backend: str | None
    device: torch.device
    orders: dict[tuple[int, ...], Tensor]

    def row(self) -> tuple[Tensor, int]:
        """`(float64 [width], bytes received)`: this process's part of the layer's sums over all samples; the parts of
        all processes add up to the whole. Every process calls it, and those that have runs hold the layer's weights.
        """
        before, samples = self.ranks.received, sum(map(len, self.runs))
        working = self.ranks.rank < len(self.runs)
        places = self.ranks.tell([list(source.own) for source in self.operands.dense], "the operands of a layer")[0]
        sources = [*self.operands.dense, *self.operands.stacks.values()]
        if not working:
            sources = [Source() for _ in (*places, *self.operands.stacks)]
        lengths = [count for run in self.runs for count in run.lengths.tolist()]
        counts = [*(lengths for _ in places), *self._counts(samples)]
        slabs = list(_slabs(self.layout.groups, min(self.ranks.size, len(self.runs))))
        sums = _Sums(self.layout, samples, self.device)
        for source, of in zip(sources, counts, strict=True):
            if sum(of):  # not of an expert that no token came to
                self._score(source, of, slabs, sums)
        return sums.row(self.layout), self.ranks.received - before

    def _counts(self, samples: int) -> list[list[int]]:
        """Of each stacked source the rows of every sample, in the runs' order."""
        if not self.operands.stacks:
            return []
        counts = torch.zeros(len(self.operands.stacks), samples, dtype=torch.int64)
        starts = list(itertools.accumulate(map(len, self.runs), initial=0))
        for row, source in zip(counts, self.operands.stacks.values(), strict=True):
            for run, of in (source.counts or {}).items():
                row[starts[run] : starts[run + 1]] = torch.tensor(of)
        return self.ranks.add_up(counts.to(self.device)).tolist()

    def _score(self, source: Source, counts: Sequence[int], slabs: Sequence[_Slab], sums: _Sums) -> None:
        """Lets a source's operands change hands, and scores this process's slabs of its matrices."""
        groups, rank = self.layout.groups, self.ranks.rank
        wanted = [(slab, place) for slab in slabs for place in source.own if place[0] == slab.group]
        views = {place: arch.view(self.modules, *self._member(place)).detach() for place in source.own}
        pieces = self._pieces(source, counts, wanted, views)
        present = [s for s, count in enumerate(counts) if count]
        offsets = list(itertools.accumulate((counts[s] for s in present), initial=0))
        everywhere = len(present) == sums.samples
        which = None if everywhere else torch.tensor(present, device=self.device)  # the host waits for such a copy
        for slab, place in (of for of in wanted if of[0].owner == rank):
            member, _ = self._member(place)
            part = _part(slab, member)
            own, shared = pieces[slab, place], pieces[None]
            fine, coarse = ops.linear_importance(
                *((own, shared) if member.axis == 0 else (shared, own)),
                views[place].narrow(member.axis, part.start, part.stop - part.start).contiguous(),
                samples=offsets,
                axis=member.axis,
                order=self.order,
                group_size=member.group_size,
                scale=self.scale,
                backend=self.backend,
            )
            units, name = slice(slab.begin, slab.end), groups[slab.group].name
            # A sample without rows has no gradient, and only counts in the number that the sums are divided by.
            sums.fine[name][:, units].add_(fine.view(-1, slab.end - slab.begin), alpha=len(present) / sums.samples)
            into = sums.coarse[name][place[1], :, units]
            if which is None:
                into.add_(coarse)
            else:
                into.index_add_(0, which, coarse)

    def _pieces(
        self,
        source: Source,
        counts: Sequence[int],
        wanted: Sequence[tuple[_Slab, Place]],
        views: Mapping[Place, Tensor],
    ) -> dict[Any, Tensor]:
        """The columns of all samples' operands that this process's slabs take, by slab and matrix, and the shared
        operand under None; rows in the runs' order, contiguous."""
        starts = list(itertools.accumulate(map(len, self.runs), initial=0))
        of_runs = [sum(counts[a:b]) for a, b in itertools.pairwise(starts)]
        dealt_to = [dealt(len(self.runs), r, self.ranks.size) for r in range(self.ranks.size)]
        rows = [sum(of_runs[j] for j in runs) for runs in dealt_to]
        operands: dict[Any, Tensor] = {}
        for place, operand in source.own.items():
            member, like = self._member(place)[0], views[place]
            operands[place] = operand.whole(like.shape[member.axis], like)
            if None not in operands:
                operands[None] = source.shared.whole(like.shape[1 - member.axis], like)

        def parts(rank: int) -> dict[Any, Tensor]:
            of = [(slab, place) for slab, place in wanted if slab.owner == rank]
            columns = {(s, p): operands[p][:, _part(s, self._member(p)[0])] for s, p in of}
            return {None: operands[None], **columns} if of else {}

        if self.ranks.size == 1:
            return {name: columns.contiguous() for name, columns in parts(0).items()}
        nothing = torch.empty(rows[self.ranks.rank], 0, device=self.device)
        nothing = nothing.to(operands[None].dtype) if operands else nothing
        sent = [torch.cat([nothing, *parts(r).values()], 1) for r in range(self.ranks.size)]
        mine = {name: columns.shape[1] for name, columns in parts(self.ranks.rank).items()}
        operands.clear()
        got = self.ranks.exchange(sent, rows)
        del sent
        order = self._order(of_runs, dealt_to)
        return {
            name: columns.index_select(0, order)
            for name, columns in zip(mine, got.split(list(mine.values()), 1), strict=True)
        }

    def _order(self, of_runs: Sequence[int], dealt_to: Sequence[Sequence[int]]) -> Tensor:
        """int64 `[rows]`, on the device: where the rows of the runs, in their order, are among those of all processes,
        which follow each other. All matrices but experts' have the same, so the last one is kept."""
        key = tuple(of_runs)
        if key not in self.orders:
            self.orders.clear()
            begins = dict(zip(itertools.chain(*dealt_to), _starts(of_runs, dealt_to), strict=True))
            rows = [torch.arange(begins[j], begins[j] + count) for j, count in enumerate(of_runs)]
            self.orders[key] = torch.cat(rows).to(self.device)
        return self.orders[key]

    def _member(self, place: Place) -> tuple[Member, int]:
        """A matrix, and how many units lie on it."""
        group = self.layout.groups[place[0]]
        return group.members[place[1]], group.units


def _starts(of_runs: Sequence[int], dealt_to: Sequence[Sequence[int]]) -> list[int]:
    """Where each run begins among the rows of all processes, which follow each other."""
    return list(itertools.accumulate((of_runs[j] for runs in dealt_to for j in runs), initial=0))[:-1]


def _part(slab: _Slab, member: Member) -> slice:
    """A slab's rows or columns of a matrix."""
    return slice(slab.begin * member.group_size, slab.end * member.group_size)


def _slabs(groups: Sequence[Group], workers: int) -> Iterator[_Slab]:
    """The slabs of all groups, dealt out. An expert's channels are one, since they make up its own scores by sample."""
    at = 0
    for g, group in enumerate(groups):
        cuts = 1 if group.tied_width else min(LEAST, group.units)
        for k in range(cuts):
            yield _Slab(g, group.units * k // cuts, group.units * (k + 1) // cuts, at % workers)
            at += 1
