"""Statistics of a model held against its own loss: by finite differences on a copy, by gradients on the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import arch
from ..engine.passes import apart
from ..types import Group, Statistics
from .statistics import calibrate
from .trials import ERRORS, failed, sample_tokens

__all__ = ["check_gradients", "check_steps"]

# Of the finite differences, of weights that are float64: a router may choose another expert within a long step, and
# what a model computes in float32 all the same is coarse beside a short one.
_STEPS = (1e-3, 1e-4, 1e-5)
_COARSE_STEPS = (1e-2, 3e-3)  # where the model runs in float32 alone
_STATISTIC = 1e-2  # relative error of a statistic, of the largest one of its matrix


def sample_losses(model: Any, tokens: Tensor) -> Tensor:
    """Mean next-token loss of each sample, by the model's own forward."""
    tokens = tokens.to(model.get_input_embeddings().weight.device)
    logits = model(input_ids=tokens, use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    each = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return each.view(len(tokens), -1).mean(1)


@torch.no_grad()
def _moved(model: Any, pieces: Sequence[tuple[Tensor, Tensor]], tokens: Tensor, step: float) -> Tensor:
    """The derivative of each sample's loss along `weight · (1 + t · factor)` at `t = 0`, by a central difference."""
    sides = []
    for side in (step, -step):
        before = [part.clone() for part, _ in pieces]
        for part, factor in pieces:
            part.mul_(1.0 + side * factor)
        sides.append(sample_losses(model, tokens))
        for (part, _), values in zip(pieces, before, strict=True):
            part.copy_(values)
    return (sides[0] - sides[1]) / (2 * step)


def check_steps(model: Any) -> None:
    """Coarse statistics, by every pass that serves the model, equal finite differences of its own loss.

    Each matrix is moved along random signs of its units at once, in float64, so that every unit counts.

    Raises:
        HywiaError: they do not, or no statistics can be had.
    """
    tokens = sample_tokens(model, 2, 12)
    groups = arch.groups(model)
    found = []
    for memory in ("fast",) if arch.architecture(model).together else ("fast", "lean"):
        try:
            found.append(calibrate(model, tokens, memory=memory, backend="reference"))
        except ERRORS as error:
            raise failed(f"its pass does not run in memory mode {memory} ({error})", groups, "statistics") from error
    _check_reached(groups, found[0])
    exact, steps = copy.deepcopy(model).double(), tuple[float, ...](_STEPS)
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")  # the others have no float64
    try:
        _moved(exact, [], tokens, 0.1)
    except ERRORS:  # masks and constants of a few families are float32's
        exact, steps = copy.deepcopy(model), _COARSE_STEPS
    parts = [(of, i) for of in _together(groups) for i in range(len(of[0].members))]
    worst = _step_error(exact, found, parts, tokens, steps)
    if worst <= _STATISTIC:
        return
    for part in reversed(parts):  # which it is: what a wrong one sends back is wrong in all before it
        apart = _step_error(exact, found, [part], tokens, steps)
        if not apart <= _STATISTIC:
            of, index = part
            what = f"they differ from finite differences of the loss by {apart:.1e} at {of[0].members[index].module}"
            raise failed(what, of, "statistics")
    raise failed(f"together they differ from finite differences of the loss by {worst:.1e}", groups, "statistics")


def _check_reached(groups: Sequence[Group], statistics: Statistics) -> None:
    """Text goes through every group, so that its statistics say something; experts may be chosen by no token of a few.

    Raises:
        HywiaError: a group has none, as a layer that runs for images alone.
    """
    for group in groups:
        if not group.tied_width and group.kind != "experts" and not bool(statistics.coarse[group.name].any()):
            raise failed("no text reaches it, so nothing says what its units are worth", [group], "statistics")


def _step_error(
    exact: Any,
    found: Sequence[Statistics],
    parts: Sequence[tuple[list[Group], int]],
    tokens: Tensor,
    steps: Sequence[float],
) -> float:
    """How far the statistics are from the loss's change along random signs of all units of these matrices, of the
    change's usual size; the largest of all samples and passes."""
    generator = torch.Generator().manual_seed(7)
    pieces, got, scale = [], [torch.zeros(len(tokens), dtype=torch.float64) for _ in found], 0.0
    for of, index in parts:
        for group in of:
            member = group.members[index]
            signs = torch.randint(0, 2, (group.units,), generator=generator).double() * 2 - 1
            along = signs.repeat_interleave(member.group_size)
            part = arch.view(exact, member, group.units).data
            along = along.to(part.dtype)
            pieces.append((part, along[:, None] if member.axis == 0 else along))
            for into, statistics in zip(got, found, strict=True):
                into += statistics.coarse[group.name][index].double() @ signs
            scale += float(found[0].coarse[group.name][index].double().square().sum(1).max())
    least = float("inf")
    for step in steps:
        slope = _moved(exact, pieces, tokens, step)
        least = min(least, max(float((into - slope).abs().max()) for into in got) / max(scale**0.5, 1e-12))
        if least <= _STATISTIC:
            break
    return least


def _together(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Groups by themselves, but all experts of a layer at once."""
    stacks: dict[str, list[Group]] = {}
    for group in groups:
        if group.kind == "experts":
            continue  # whose matrices are their channels'
        if group.tied_width:
            stacks.setdefault(group.tied_width, []).append(group)
        else:
            yield [group]
    yield from stacks.values()


def check_gradients(model: Any) -> None:
    """Coarse statistics of the model at hand equal plain gradients of its own loss, for one matrix of each kind.

    Raises:
        HywiaError: they do not.
    """
    tokens = sample_tokens(model, 1, 12)
    groups = arch.groups(model)
    statistics = calibrate(model, tokens)
    _check_reached(groups, statistics)
    last = {(g.kind, len(g.members), bool(g.tied_width)): g for g in groups if g.kind != "experts"}
    with apart(dict(model.named_modules())), torch.enable_grad():
        for group in last.values():
            member = group.members[0]
            parameter: Any = model.get_submodule(member.module)._parameters[member.parameter]
            parameter.requires_grad_(True)
            (gradient,) = torch.autograd.grad(sample_losses(model, tokens).sum(), parameter, allow_unused=True)
            parameter.requires_grad_(False)
            if gradient is None:
                continue
            holder = nn.Module()
            holder._parameters[member.parameter] = gradient
            moved = arch.view({member.module: holder}, member, group.units).float()
            weight = arch.view(model, member, group.units).detach().float()
            product = moved * weight
            per_unit = product.sum(1 - member.axis).view(group.units, -1).sum(1)
            # Behind a norm of the head its sums cancel, so an error counts beside what was summed.
            summed = product.abs().sum(1 - member.axis).view(group.units, -1).sum(1)
            got = statistics.coarse[group.name][0][0].to(per_unit.device)
            error = float((got - per_unit).norm() / summed.norm().clamp_min(1e-20))
            if not error <= (1e-3 if parameter.dtype == torch.float32 else 3e-2):
                raise failed(f"statistics and the loss's own gradients differ by {error:.1e}", [group], "statistics")
