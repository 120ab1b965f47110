"""Whether an entry of the table of architectures holds for a model, seen on the model itself.

Each check compares two ways to the same numbers, one of which knows nothing of the entry: the model with a unit's
values at zero, its own loss moved by a small step, or what another load of the saved model computes. What fails is
named by module and part.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import arch
from ..arch.holding import plain_model
from ..checkpoint.saving import save
from ..engine.passes import apart, plain_modes
from ..errors import HywiaError
from ..types import Group, Plan, Statistics
from . import surgery
from .criteria import random
from .reconstruction import reconstruct
from .selection import plan as selected
from .statistics import calibrate
from .undo import Undo

__all__ = [
    "ERRORS",
    "check_causal",
    "check_covered",
    "check_cut",
    "check_gradients",
    "check_layers",
    "check_refit",
    "check_saved",
    "check_steps",
    "sample_tokens",
]

_SHARE = 0.4  # of each group's units that a trial cut removes
# Relative errors that a dtype's rounding, through a whole model, may make of logits.
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_MATTERS = 10.0  # how many times the error a trial cut must change the logits for the comparison to say anything
_RELOADED = 1e-5  # of logits, whose sums transformers may order otherwise where it stacks experts
# What a module raises whose shapes are not what it was made for, or that lacks what was looked for.
ERRORS = (
    *(RuntimeError, IndexError, KeyError, ValueError, TypeError, AttributeError),
    *(AssertionError, ArithmeticError, NotImplementedError),
)
# Of the finite differences, of weights that are float64: a router may choose another expert within a long step, and
# what a model computes in float32 all the same is coarse beside a short one.
_STEPS = (1e-3, 1e-4, 1e-5)
_STATISTIC = 1e-2  # relative error of a statistic, of the largest one of its matrix


def sample_tokens(model: Any, samples: int, length: int, seed: int = 11) -> Tensor:
    """Random token ids int64 `[samples, length]` of a model's vocabulary, without its special first ones."""
    words = int(arch.text_config(model).vocab_size)
    return torch.randint(min(5, words - 1), words, (samples, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _logits(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    tokens = tokens.to(model.get_input_embeddings().weight.device)
    return model(input_ids=tokens, **({"use_cache": False} | options)).logits


def _error(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over the norm of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def _failed(what: str, groups: Sequence[Group], part: str) -> HywiaError:
    kinds = sorted({g.kind for g in groups})
    modules = sorted({m.module for g in groups[:1] for m in g.members})
    where = ", ".join(modules[:4]) if modules else "the model"
    return HywiaError(
        f"proof: {part} of {where} ({' and '.join(kinds) or 'units'}): {what}; the structure that was derived does not "
        "hold for this model, which is refused. CONTRIBUTING.md says how to describe it by hand"
    )


def _kinds(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """Kinds that can go together: whole experts are not cut with channels of experts."""
    kinds = {g.kind for g in groups}
    together = tuple(k for k in ("mlp", "attention") if k in kinds)
    return [k for k in (together, ("experts",) if "experts" in kinds else ()) if k]


def _trial(model: Any, kinds: tuple[str, ...], layers: tuple[int, int] | None = None, share: float = _SHARE) -> Plan:
    scores = random(model, seed=5)
    align = 8 if any(g.tied_width for g in scores.groups) else 1  # products of stacked experts want such widths
    return selected(scores, group_ratio=share, units=kinds, align=align, layers=layers)


def _cuts(plan: Plan) -> list[Group]:
    return [g for g in plan.groups if plan.keep[g.name].numel() < g.units]


def check_causal(model: Any) -> None:
    """What a token is followed by changes nothing before it.

    Raises:
        HywiaError: it does: the model is no causal language model.
    """
    tokens = sample_tokens(model, 2, 12)
    other = tokens.clone()
    other[:, 8:] = sample_tokens(model, 2, 4, seed=12)
    one, two = _logits(model, tokens), _logits(model, other)
    if _error(one[:, :8], two[:, :8]) > _CLOSE[torch.float32]:
        raise HywiaError(
            "proof: the logits of a token change with what comes behind it, so this is no causal language model (an "
            "encoder whose config lacks is_decoder?); it cannot be scored by the next token's loss"
        )


def check_cut(model: Any, kinds: tuple[str, ...] | None = None) -> None:
    """The cut model computes what the masked one does; on copies of a small model.

    Raises:
        HywiaError: it does not, or the cut has no effect that could be seen.
    """
    tokens = sample_tokens(model, 3, 13)
    dense = _logits(model, tokens)
    groups = arch.groups(model)
    for chosen in _kinds(groups) if kinds is None else [kinds]:
        for kind in chosen:
            plan = _trial(model, (kind,))
            cut = _cuts(plan)
            if not cut:
                continue
            masked, pruned = copy.deepcopy(model), copy.deepcopy(model)
            try:
                surgery.mask(masked, plan)
                want = _logits(masked, tokens)
                surgery.prune(pruned, plan)
                got = _logits(pruned, tokens)
            except ERRORS as error:
                raise _failed(f"the cut model does not run ({error})", cut, "a cut") from error
            error, effect = _error(got, want), _error(want, dense)
            if not error <= _CLOSE[torch.float32]:
                raise _failed(f"cut and masked differ by {error:.1e} of the logits", cut, "a cut")
            if effect < _MATTERS * _CLOSE[torch.float32]:
                raise _failed(f"a mask changes the logits by no more than {effect:.1e}", cut, "a mask")


def _sample_losses(model: Any, tokens: Tensor) -> Tensor:
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
        sides.append(_sample_losses(model, tokens))
        for (part, _), values in zip(pieces, before, strict=True):
            part.copy_(values)
    return (sides[0] - sides[1]) / (2 * step)


def check_steps(model: Any) -> None:
    """Coarse statistics, by every pass that serves the model, equal finite differences of its own loss.

    Each matrix is moved along random signs of its units at once, in float64, so that every unit counts.

    Raises:
        HywiaError: they do not, or no statistics can be had.
    """
    tokens = sample_tokens(model, 3, 13)
    groups = arch.groups(model)
    found = []
    for memory in ("fast", "lean"):
        try:
            found.append(calibrate(model, tokens, memory=memory, backend="reference"))
        except ERRORS as error:
            raise _failed(f"its pass does not run in memory mode {memory} ({error})", groups, "statistics") from error
    exact = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")  # the others have no float64
    parts = [(of, i) for of in _together(groups) for i in range(len(of[0].members))]
    worst = _step_error(exact, found, parts, tokens)
    if worst <= _STATISTIC:
        return
    for part in parts:  # which of them it is
        error = _step_error(exact, found, [part], tokens)
        if not error <= _STATISTIC:
            of, index = part
            what = f"they differ from finite differences of the loss by {error:.1e} at {of[0].members[index].module}"
            raise _failed(what, of, "statistics")
    raise _failed(f"together they differ from finite differences of the loss by {worst:.1e}", groups, "statistics")


def _step_error(
    exact: Any, found: Sequence[Statistics], parts: Sequence[tuple[list[Group], int]], tokens: Tensor
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
            pieces.append((arch.view(exact, member, group.units).data, along[:, None] if member.axis == 0 else along))
            for into, statistics in zip(got, found, strict=True):
                into += statistics.coarse[group.name][index].double() @ signs
            scale += float(found[0].coarse[group.name][index].double().square().sum(1).max())
    least = float("inf")
    for step in _STEPS:
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


def check_refit(model: Any) -> None:
    """A refitted model, whose layers run one at a time, is cut like any other; on a copy of a small model.

    Raises:
        HywiaError: it is not, or its layers do not run by themselves.
    """
    tokens = sample_tokens(model, 6, 13)
    plan = _trial(model, _kinds(arch.groups(model))[0], share=0.3)
    refitted = copy.deepcopy(model)
    try:
        after = reconstruct(refitted, plan, tokens, ridge=1e-2)
    except ERRORS as error:
        raise _failed(f"its layers do not run one at a time ({error})", _cuts(plan), "the reconstruction") from error
    want = _logits(refitted, tokens)
    surgery.prune(refitted, after)
    error = _error(_logits(refitted, tokens), want)
    if not error <= _CLOSE[torch.float32]:
        raise _failed(f"cut and refitted differ by {error:.1e} of the logits", _cuts(plan), "the reconstruction")


def check_saved(model: Any) -> None:
    """What is saved reloads to the same logits, in equal and in unequal layers, with and without a cache.

    Raises:
        HywiaError: it does not.
    """
    from transformers import AutoModelForCausalLM

    tokens = sample_tokens(model, 2, 12)
    layers = 1 + max(g.layer for g in arch.groups(model))
    for chosen in _kinds(arch.groups(model)):
        for shape in (None, (layers - 1, layers)):
            pruned = copy.deepcopy(model)
            plan = _trial(pruned, chosen, shape) if shape is None or _has(pruned, chosen, shape) else None
            if plan is None:
                continue
            surgery.prune(pruned, plan)
            want = _logits(pruned, tokens)
            _check_cache(pruned, tokens, want, plan)
            with tempfile.TemporaryDirectory(prefix="hywia-proof-") as folder:
                save(pruned, None, Path(folder) / "model", plan=plan)
                again = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
                error = _error(_logits(again, tokens), want)
                if not error <= _RELOADED:
                    raise _failed(f"a saved model reloads to logits that differ by {error:.1e}", _cuts(plan), "a save")
                _check_cache(again, tokens, want, plan)


def _has(model: Any, kinds: tuple[str, ...], layers: tuple[int, int]) -> bool:
    return any(g.kind in kinds and layers[0] <= g.layer < layers[1] for g in arch.groups(model))


@torch.no_grad()
def _check_cache(model: Any, tokens: Tensor, want: Tensor, plan: Plan) -> None:
    """The last logits, where all tokens but the last ones came before through a cache."""
    try:
        first = model(input_ids=tokens[:, :-2], use_cache=True)
    except ERRORS as error:
        raise _failed(f"the cut model does not run with a cache ({error})", _cuts(plan), "a cut") from error
    cache = getattr(first, "past_key_values", None)
    if cache is None:
        return
    got = []
    for at in (len(tokens[0]) - 2, len(tokens[0]) - 1):
        step = model(input_ids=tokens[:, at : at + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        got.append(step.logits[:, -1])
    error = _error(torch.stack(got, 1), want[:, -2:])
    if not error <= 1e-3:
        raise _failed(f"with a cache the logits differ by {error:.1e}", _cuts(plan), "a cut")


def check_covered(model: Any, alone: Sequence[str]) -> None:
    """Every matrix in the decoder layers is in a group, or said to be left alone.

    Args:
        alone: names of modules of a layer, or of modules in whose inside all is left alone.

    Raises:
        HywiaError: one is neither.
    """
    entry = arch.architecture(model)
    described = {(m.module, m.parameter) for g in arch.groups(model) for m in (*g.members, *g.vectors)}
    layers: Any = model.get_submodule(entry.layers)
    for i, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if any(name == a or name.startswith(f"{a}.") for a in alone):
                continue
            for leaf, parameter in module._parameters.items():
                full = f"{entry.layers}.{i}.{name}".rstrip(".")
                if parameter is not None and parameter.dim() > 1 and (full, leaf) not in described:
                    raise HywiaError(
                        f"proof: {full}.{leaf} of the decoder is neither among the units nor said to be left alone; "
                        "the structure that was derived is not complete, and the model is refused"
                    )


@contextmanager
def _cut_for_a_while(model: Any, plan: Plan) -> Iterator[None]:
    """A model in place, cut and put back bit for bit."""
    undo = Undo(model)
    try:
        surgery._cut(model, plan, None, undo)
        yield
    finally:
        undo.roll_back()


@contextmanager
def _masked_for_a_while(model: Any, plan: Plan) -> Iterator[None]:
    cut = _cuts(plan)
    named = {(m.module, leaf) for g in cut for m in (*g.members, *g.vectors) for leaf in (m.parameter, m.bias) if leaf}
    held = [model.get_submodule(module)._parameters[leaf] for module, leaf in sorted(named)]
    before = [p.detach().clone() for p in held if p is not None]
    routers = [vars(model.get_submodule(g.members[0].module)) for g in cut if g.kind == "experts"]
    try:
        for group in cut:
            surgery.zero_units(model, group, plan.keep[group.name])
        yield
    finally:
        for parameter, values in zip(held, before, strict=True):
            parameter.data.copy_(values)
        for router in routers:
            router.pop("forward", None)


@torch.no_grad()
def check_layers(model: Any) -> list[int]:
    """`check_cut` on the model at hand, in place: one layer of each kind, and the last, one at a time.

    Returns:
        the layers that were tried. The model is as it was, bit for bit.

    Raises:
        HywiaError: a cut layer does not give what the masked one does.
    """
    model = plain_model(model, changing=True)
    tokens = sample_tokens(model, 2, 12)
    groups = arch.groups(model)
    kinds = {}
    for layer in sorted({g.layer for g in groups}):
        here = tuple((g.kind, g.units, len(g.members)) for g in groups if g.layer == layer)
        kinds.setdefault(here, layer)
    tried = sorted({*list(kinds.values())[:4], max(g.layer for g in groups)})
    close = _CLOSE[next(model.parameters()).dtype]
    with plain_modes():
        dense = _logits(model, tokens)
        for layer in tried:
            for chosen in _kinds([g for g in groups if g.layer == layer]):
                plan = _trial(model, chosen, (layer, layer + 1))
                with _masked_for_a_while(model, plan):
                    want = _logits(model, tokens)
                with _cut_for_a_while(model, plan):
                    got = _logits(model, tokens)
                error, effect = _error(got, want), _error(want, dense)
                if not error <= max(close, effect / _MATTERS if close > 1e-3 else 0.0):
                    raise _failed(f"cut and masked differ by {error:.1e} of the logits", _cuts(plan), "a cut")
    return tried


def check_gradients(model: Any) -> None:
    """Coarse statistics of the model at hand equal plain gradients of its own loss, for one matrix of each kind.

    Raises:
        HywiaError: they do not.
    """
    tokens = sample_tokens(model, 1, 12)
    groups = arch.groups(model)
    statistics = calibrate(model, tokens)
    last = {(g.kind, len(g.members), bool(g.tied_width)): g for g in groups if g.kind != "experts"}
    with apart(dict(model.named_modules())), torch.enable_grad():
        for group in last.values():
            member = group.members[0]
            parameter: Any = model.get_submodule(member.module)._parameters[member.parameter]
            parameter.requires_grad_(True)
            (gradient,) = torch.autograd.grad(_sample_losses(model, tokens).sum(), parameter, allow_unused=True)
            parameter.requires_grad_(False)
            if gradient is None:
                continue
            holder = nn.Module()
            holder._parameters[member.parameter] = gradient
            moved = arch.view({member.module: holder}, member, group.units).float()
            weight = arch.view(model, member, group.units).detach().float()
            per_line = (moved * weight).sum(1 - member.axis).view(group.units, -1).sum(1)
            got = statistics.coarse[group.name][0][0].to(per_line.device)
            error = float((got - per_line).norm() / per_line.norm().clamp_min(1e-20))
            limit = 1e-2 if parameter.dtype == torch.float32 else 0.2
            if not error <= limit:
                raise _failed(f"statistics and the loss's own gradients differ by {error:.1e}", [group], "statistics")
