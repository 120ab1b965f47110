"""Operands of a layer's matrices, kept until all runs have brought theirs.

Of a matrix's two operands one has a column for each of its rows or columns that belong to a unit (the output's gradient
of q, k, v, gate and up, the input of o and down); the other one all of its units share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import arch
from ..engine.linear import Target
from ..types import Group, Member

__all__ = ["Operand", "Operands", "Place", "Source"]

Place = tuple[int, int]  # a group of the layer, and one of its matrices


@dataclass
class Operand:
    """What one operand was in this process's runs: `[rows, columns]` each."""

    pieces: list[Tensor] = field(default_factory=list)

    def whole(self, columns: int, like: Tensor) -> Tensor:
        """All of them, `[rows, columns]`; the pieces are freed."""
        pieces, self.pieces = self.pieces, []
        if not pieces:
            return like.new_empty((0, columns))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@dataclass
class Source:
    """Matrices that share an operand.

    Attributes:
        shared: that operand. own: each matrix's other one. counts: of experts, run -> rows of each sample.
    """

    shared: Operand = field(default_factory=Operand)
    own: dict[Place, Operand] = field(default_factory=dict)
    counts: dict[int, list[int]] | None = None


class Operands:
    """The operands of one layer's matrices in this process's runs. It is a scorer's `collected` while these go back
    through the layer.

    Args:
        modules: the model's, by name. groups: the layer's.

    Attributes:
        dense: in the order of arrival, which is the same on all processes. stacks: of experts, in the model's order;
            of those that no token came to, too.
    """

    def __init__(self, modules: Mapping[str, Any], groups: Sequence[Group]) -> None:
        self._run = 0
        self._places: dict[Member, Place] = {}
        self.dense: list[Source] = []
        self.stacks: dict[tuple[str, int, bool], Source] = {}
        self._arrived: list[tuple[Tensor, Source]] = []  # shared inputs of this run, and where they went
        numbers = {group.name: at for at, group in enumerate(groups)}
        for matrix in arch.matrices(modules, groups):
            for group, i in matrix.members:
                member, place = group.members[i], (numbers[group.name], i)
                self._places[member] = place
                if matrix.index is not None:
                    side = (member.axis == 0) != matrix.transposed  # whether the input is what its units share
                    source = self.stacks.setdefault((matrix.module, matrix.index, side), Source(counts={}))
                    source.own[place] = Operand()

    def begin(self, run: int) -> None:
        """What comes from here on is of this run."""
        self._run, self._arrived = run, []

    def add(self, target: Target, grad_output: Tensor, inputs: Tensor, flatten: Callable[[Tensor], Tensor]) -> None:
        """Keeps a matrix's operands; the output's gradient is `[tokens, out]` without padding already."""
        for matrix in _chain(target):
            place = self._places[matrix.member]
            if (matrix.member.axis == 0) == matrix.transposed:
                self._keep(self._of(place, None), place, grad_output, flatten(inputs))
                continue
            known = next((source for tensor, source in self._arrived if tensor is inputs), None)
            source = self._of(place, known)
            if known is None:
                self._arrived.append((inputs, source))
            self._keep(source, place, flatten(inputs) if known is None else None, grad_output)

    def add_rows(self, target: Target, grad_output: Tensor, inputs: Tensor, offsets: Sequence[int]) -> None:
        """Keeps the operands of one expert's matrix, whose samples have rows of any number, as `offsets` say."""
        for matrix in _chain(target):
            member, place = matrix.member, self._places[matrix.member]
            by_input = (member.axis == 0) != matrix.transposed
            assert member.index is not None
            source = self.stacks[member.module, member.index, by_input]
            assert source.counts is not None
            first = self._run not in source.counts
            source.counts[self._run] = [b - a for a, b in itertools.pairwise(offsets)]
            shared, own = (inputs, grad_output) if by_input else (grad_output, inputs)
            self._keep(source, place, shared if first else None, own)

    def _of(self, place: Place, known: Source | None) -> Source:
        """The source of a dense matrix: where it was in an earlier run, the one whose shared operand it brings, or a
        new one."""
        source = next((s for s in self.dense if place in s.own), known)
        if source is None:
            source = Source()
            self.dense.append(source)
        source.own.setdefault(place, Operand())
        return source

    @staticmethod
    def _keep(source: Source, place: Place, shared: Tensor | None, own: Tensor) -> None:
        # Copied, since backward goes on to write into some of these.
        if shared is not None:
            source.shared.pieces.append(shared.clone())
        source.own[place].pieces.append(own.clone(memory_format=torch.contiguous_format))


def _chain(target: Target) -> Iterator[Target]:
    """A matrix as a part of each group that it is in."""
    of: Target | None = target
    while of is not None:
        yield of
        of = of.also
