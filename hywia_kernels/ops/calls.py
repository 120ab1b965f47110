"""The arguments of a call of an op as one value, which `checks` returns and the backends take; outputs come beside it.

The fields are in the order of the ops' schemas (see `library`).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["BatchCall", "DistillationCall", "LinearCall", "Operands", "TaylorCall", "TopDistillationCall"]

Operands = tuple[Tensor, Tensor | None, Tensor | None]  # weight, gradient and Fisher information of a matrix


class TaylorCall(NamedTuple):
    """A call of `taylor_importance`. Operands that `order` does not read are None."""

    weight: Tensor
    grad: Tensor | None
    fisher: Tensor | None
    axis: int
    order: str
    group_size: int

    @property
    def operands(self) -> Operands:
        return self.weight, self.grad, self.fisher

    @property
    def units(self) -> int:
        return self.weight.shape[self.axis] // self.group_size


class LinearCall(NamedTuple):
    """A call of `linear_importance`. Sample `s` is the tokens from `offsets[s]` to `offsets[s + 1]`."""

    grad_output: Tensor
    input: Tensor
    weight: Tensor
    offsets: list[int]
    axis: int
    order: str
    group_size: int
    per_sample: bool
    scale: float
    mapped: Tensor | None = None

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.grad_output, self.input, self.weight, self.mapped

    @property
    def samples(self) -> int:
        return len(self.offsets) - 1

    @property
    def shapes(self) -> tuple[list[int], list[int]]:
        """Shapes of the fine and of the coarse sums."""
        units = self.weight.shape[self.axis] // self.group_size
        return [3, units] if self.order == "all" else [units], [self.samples if self.per_sample else 1, units]


class BatchCall(NamedTuple):
    """A call of `taylor_importance_batch`. Operands that `order` does not read are []."""

    weights: list[Tensor]
    grads: list[Tensor]
    fishers: list[Tensor]
    axes: list[int]
    order: str
    group_sizes: list[int]
    into: list[int]

    @property
    def matrices(self) -> list[TaylorCall]:
        """The calls of `taylor_importance` that this one stands for, a matrix each."""
        return [
            TaylorCall(
                weight,
                self.grads[i] if self.grads else None,
                self.fishers[i] if self.fishers else None,
                self.axes[i],
                self.order,
                self.group_sizes[i],
            )
            for i, weight in enumerate(self.weights)
        ]

    @property
    def operands(self) -> list[Tensor | None]:
        """Weight, gradient and Fisher information of each matrix in turn, as the backends' `unsupported` takes them."""
        return [operand for matrix in self.matrices for operand in matrix.operands]

    @property
    def members(self) -> list[list[int]]:
        """The matrices that add to each result, in the order in which they are listed."""
        listed: list[list[int]] = [[] for _ in range(max(self.into) + 1)]
        for i, result in enumerate(self.into):
            listed[result].append(i)
        return listed

    @property
    def units(self) -> list[int]:
        """Number of units of each result."""
        matrices = self.matrices
        return [matrices[listed[0]].units for listed in self.members]


class DistillationCall(NamedTuple):
    """A call of `distillation_gradient`. Labels that are not read are None."""

    student: Tensor
    teacher: Tensor
    weight: Tensor
    labels: Tensor | None
    hard: float
    student_scale: float
    student_cap: float | None
    teacher_scale: float
    teacher_cap: float | None

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.student, self.teacher, self.weight, self.labels


class TopDistillationCall(NamedTuple):
    """A call of `top_distillation_gradient`. Labels that are not read are None."""

    student: Tensor
    indices: Tensor
    log_probabilities: Tensor
    rest: Tensor
    weight: Tensor
    labels: Tensor | None
    hard: float
    student_scale: float
    student_cap: float | None

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.student, self.indices, self.log_probabilities, self.rest, self.weight, self.labels
