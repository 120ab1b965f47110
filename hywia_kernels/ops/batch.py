"""How the lists of a `taylor_importance_batch` call belong together."""

from __future__ import annotations

from torch import Tensor

__all__ = ["Operands", "by_result", "triples"]

Operands = tuple[Tensor, Tensor | None, Tensor | None]


def triples(weights: list[Tensor], grads: list[Tensor], fishers: list[Tensor]) -> list[Operands]:
    """Weight, gradient and Fisher information of each matrix; an empty list is an operand that `order` leaves out."""
    return [(w, grads[i] if grads else None, fishers[i] if fishers else None) for i, w in enumerate(weights)]


def by_result(into: list[int], results: int) -> list[list[int]]:
    """The matrices that add to each result, in the order in which they are listed."""
    listed: list[list[int]] = [[] for _ in range(results)]
    for i, result in enumerate(into):
        listed[result].append(i)
    return listed
