"""Second order without weight-sized buffers: one calibration pass leaves sums per channel, which scorers then read.

All that a score takes from the Fisher information is `Σ_w w²·mean_s G_s²` over a channel. So a few numbers per channel
are kept instead of one per weight, and no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import arch
from ..errors import UsageError
from ..method.statistics import measure
from ..settings import ORDERS
from ..types import Group, Member
from .modules import Sums, SumsCache

__all__ = ["AXES", "Measured", "accumulate_fisher", "any_measured", "clear_fisher", "measured"]

AXES = ("units", "both")
_SIDES = ("out", "in")  # of a linear layer, by the axis of its weight


class Measured(NamedTuple):
    """Sums over the channels of one side of one matrix, float32 on the CPU.

    Attributes:
        fine: order ("first", "second", "mixed") -> `[channels]`, the sums of absolute Taylor terms; the second-order
            term is `½·w²·F`.
        samples: `[samples, channels]`, the signed first-order sum of every sample.
    """

    fine: dict[str, Tensor]
    samples: Tensor

    def sums(self, order: str) -> Sums:
        """Fine and signed sums of one order; those of the second order are equal, since no summand is negative."""
        mean = self.samples.double().mean(0).float()
        signed = {"first": mean, "second": self.fine["second"], "mixed": mean - self.fine["second"]}[order]
        return Sums(self.fine[order], signed)


_STORE = SumsCache()


def measured(owner: Any, side: str, scope: Any = None) -> Measured | None:
    """What `accumulate_fisher` left for a module's channels.

    Args:
        owner, side: the module, "out" or "in". scope: as `SumsCache` takes it; the weight is compared once a scope.

    Raises:
        UsageError: its weight has changed since, or only the other side was measured.
    """
    if not isinstance(owner, nn.Linear):
        return None
    kept = _STORE.find(owner, (owner.weight,), "accumulate_fisher(model, batches)", scope)
    if kept is None:
        return None
    axes, sides = kept
    if side not in sides and axes == "units":
        raise UsageError(
            f"{type(owner).__name__} {list(owner.weight.shape)}: expected its {side}put channels measured, got the "
            "others only; call accumulate_fisher(model, batches, axes='both')"
        )
    return sides.get(side)


def any_measured() -> bool:
    """Whether `accumulate_fisher` left anything, for any model."""
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
    accumulator of a weight's size, float32 sums in float16 models too. A result lasts until its weight changes, by
    whatever means: its bits are compared when it is read. Nothing is hung on parameters or gets into checkpoints.

    Args:
        model, batches, backend, memory: as `calibrate` takes them. `L_s` is the mean next-token loss of a sample,
            `G = mean_s G_s`, `F = mean_s G_s²`. Only the decoder layers' linear layers are measured: not embeddings,
            norms, biases, the head, and stacked experts.
        axes: "both" measures output and input channels of every matrix, so that hidden dimensions can be pruned as
            well; "units" only those that heads and MLP channels consist of, in less time.

    Raises:
        UsageError, HywiaError: as `calibrate`.
    """
    if axes not in AXES:
        raise UsageError(f"axes: expected one of {', '.join(AXES)}, got {axes!r}")
    groups, parts = _by_channel(model, axes)
    statistics = measure(model, batches, groups, backend=backend, memory=memory)
    for name, sides in parts.items():
        module = model.get_submodule(name)
        by_side = {}
        for side, keys in sides.items():
            fine = {order: torch.cat([statistics.fine[key][order] for key in keys]) for order in ORDERS}
            by_side[side] = Measured(fine, torch.cat([statistics.coarse[key][0] for key in keys], 1))
        _STORE.put(module, (module.weight,), (axes, by_side))


def _by_channel(model: Any, axes: str) -> tuple[tuple[Group, ...], dict[str, dict[str, list[str]]]]:
    """Groups for every channel of every matrix, and where they belong.

    The architecture's groups are split into one for each matrix and side, whose units are the channels. Returned with
    them is module -> side -> the names of its groups, in the order of its channels. A linear layer that holds several
    matrices has a group for each along its outputs, and none along its inputs. Groups of anything but linear layers
    (stacked experts, transposed weights) stay as they are, and are not among the names.
    """
    groups: list[Group] = []
    starts: dict[str, dict[str, dict[int, str]]] = {}
    for group in arch.groups(model):
        modules = [model.get_submodule(m.module) for m in group.members]
        if any(type(m) is not nn.Linear for m in modules) or any(m.index is not None for m in group.members):
            groups.append(group)
            continue
        for member, module in zip(group.members, modules, strict=True):
            length = group.units * member.group_size
            whole = length == module.weight.shape[member.axis]
            for axis in (member.axis, 1 - member.axis)[: 2 if axes == "both" and whole else 1]:
                key = f"{member.module}:{_SIDES[axis]}:{member.start}"
                units = length if axis == member.axis else module.weight.shape[axis]
                part = Member(member.module, axis, 1, member.start if axis == member.axis else 0)
                groups.append(Group(key, group.kind, group.layer, units, "channel", (part,), 0))
                starts.setdefault(member.module, {}).setdefault(_SIDES[axis], {})[member.start] = key
    return tuple(groups), {
        name: {side: [keys[at] for at in sorted(keys)] for side, keys in sides.items()}
        for name, sides in starts.items()
    }
