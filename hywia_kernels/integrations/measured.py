"""Second order without weight-sized buffers: one calibration pass leaves sums per channel, which scorers then read.

`Σ_w w²·mean_s G_s²` over a channel is all that a score takes from the Fisher information, so that is what is kept:
a few numbers per channel instead of one per weight, and no gradient either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import arch
from ..calibrate import measure
from ..errors import UsageError
from ..ops.checks import ORDERS
from ..types import Group, Member
from .modules import Sums, SumsCache

__all__ = ["AXES", "Measured", "accumulate_fisher", "any_measured", "clear_fisher", "measured"]

AXES = ("units", "both")
_SIDES = ("out", "in")  # of a linear layer, by the axis of its weight


class Measured(NamedTuple):
    """Of the channels of one side of one matrix, on the CPU, float32.

    `fine`: order ("first", "second", "mixed") -> `[channels]`, with a half in the second-order term (`ops` says how);
    `samples`: `[samples, channels]`, the signed first-order sum of every sample.
    """

    fine: dict[str, Tensor]
    samples: Tensor

    def sums(self, order: str) -> Sums:
        """The signed sum of a second-order term is its fine sum: no summand is negative."""
        mean = self.samples.double().mean(0).float()
        signed = {"first": mean, "second": self.fine["second"], "mixed": mean - self.fine["second"]}[order]
        return Sums(self.fine[order], signed)


_STORE = SumsCache()


def measured(owner: Any, side: str) -> Measured | None:
    """What `accumulate_fisher` left for a module's channels.

    Raises:
        UsageError: its weight has changed since, or only the other side was measured.
    """
    if not isinstance(owner, nn.Linear):
        return None
    sides = _STORE.find(owner, (owner.weight,), "accumulate_fisher(model, batches)")
    if sides is not None and side not in sides:
        raise UsageError(
            f"{type(owner).__name__} {list(owner.weight.shape)}: expected its {side}put channels measured, got the "
            "others only; call accumulate_fisher(model, batches, axes='both')"
        )
    return None if sides is None else sides[side]


def any_measured() -> bool:
    return bool(_STORE)


def clear_fisher() -> None:
    """Forget what `accumulate_fisher` left, for every model."""
    _STORE.clear()


def accumulate_fisher(
    model: Any,
    batches: Tensor | Sequence[Tensor],
    *,
    axes: str = "both",
    backend: str | None = None,
    memory: str = "auto",
) -> None:
    """Gradients and Fisher information of a causal language model, reduced to channels, from one pass over the samples.

    The scorers of `torch_pruning` and `llm_pruner` take first and second order from here wherever a weight has no
    `.grad` (and, for LLM-Pruner, no `.acc_grad`) of its own. It replaces the per-sample loop: no `.grad`, no
    accumulator of a weight's size, float32 sums in float16 models too. A result lasts until its weight changes; nothing
    is hung on parameters, so nothing gets into checkpoints.

    Args:
        model, batches, backend, memory: as in `hywia_kernels.calibrate`. `L_s` is the mean next-token loss of a sample,
            `G = mean_s G_s`, `F = mean_s G_s²`. Only the decoder layers' matrices are measured: not embeddings, norms,
            biases and the head.
        axes: "both" measures output and input channels of every matrix, so that hidden dimensions can be pruned as
            well; "units" only those that heads and MLP channels consist of, in less time.

    Raises:
        UsageError, HywiaError: as `calibrate`.
    """
    if axes not in AXES:
        raise UsageError(f"axes: expected one of {', '.join(AXES)}, got {axes!r}")
    native = {m.module: (g, m.axis) for g in arch.groups(model) for m in g.members}
    groups = []
    for name, (group, unit_axis) in native.items():
        weight = model.get_submodule(name).weight
        for axis in (unit_axis, 1 - unit_axis)[: 1 if axes == "units" else 2]:
            members = (Member(name, axis, 1),)
            groups.append(
                Group(f"{name}:{_SIDES[axis]}", group.kind, group.layer, weight.shape[axis], "channel", members, 0)
            )
    statistics = measure(model, batches, tuple(groups), backend=backend, memory=memory)
    for name in native:
        module = model.get_submodule(name)
        names = {side: f"{name}:{side}" for side in _SIDES}
        sides = {
            side: Measured({order: statistics.fine[key][order] for order in ORDERS}, statistics.coarse[key][0])
            for side, key in names.items()
            if key in statistics.fine
        }
        _STORE.put(module, (module.weight,), sides)
