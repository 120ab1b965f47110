"""Whether an entry of the table of architectures holds for a model, seen on the model itself.

Each check compares two ways to the same numbers, one of which knows nothing of the entry: the model with a unit's
values at zero, or what another load of the saved model computes (and in `loss_steps` its own loss). What fails is named
by module and part.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import arch
from ..arch.holding import plain_model
from ..checkpoint.saving import save
from ..engine.passes import plain_modes
from ..errors import HywiaError
from ..types import Plan
from ..versions import cache_keyword
from . import surgery
from .reconstruction import reconstruct
from .trials import CLOSE, ERRORS, MATTERS, cuts_of, error_of, failed, kinds_of, logits_of, sample_tokens, trial
from .undo import Undo

__all__ = [
    "check_causal",
    "check_covered",
    "check_cut",
    "check_layers",
    "check_refit",
    "check_saved",
    "is_matrix",
]

_CACHED = 1e-3  # of logits: one token at a time is summed otherwise
_RELOADED = 1e-5  # of logits, whose sums transformers may order otherwise where it stacks experts


def check_causal(model: Any) -> None:
    """What a token is followed by changes nothing before it.

    Raises:
        HywiaError: it does: the model is no causal language model.
    """
    tokens = sample_tokens(model, 2, 12)
    other = tokens.clone()
    other[:, 8:] = sample_tokens(model, 2, 4, seed=12)
    one, two = logits_of(model, tokens), logits_of(model, other)
    if error_of(one[:, :8], two[:, :8]) > CLOSE[torch.float32]:
        raise HywiaError(
            "proof: the logits of a token change with what comes behind it, so this is no causal language model (an "
            "encoder whose config lacks is_decoder?); it cannot be scored by the next token's loss"
        )


def check_cut(model: Any, kinds: tuple[str, ...] | None = None) -> None:
    """The cut model computes what the masked one does; on copies of a small model.

    Raises:
        HywiaError: it does not, or the cut has no effect that could be seen.
    """
    tokens = sample_tokens(model, 2, 12)
    dense = logits_of(model, tokens)
    groups = arch.groups(model)
    for kind in kinds_of(groups)[-1] if kinds is None else kinds:
        plan = trial(model, (kind,))
        cut = cuts_of(plan)
        if not cut:
            continue
        masked, pruned = copy.deepcopy(model), copy.deepcopy(model)
        try:
            surgery.mask(masked, plan)
            want = logits_of(masked, tokens)
            surgery.prune(pruned, plan)
            got = logits_of(pruned, tokens)
        except ERRORS as error:
            raise failed(f"the cut model does not run ({error})", cut, "a cut") from error
        apart, effect = error_of(got, want), error_of(want, dense)
        if not apart <= CLOSE[torch.float32]:
            raise failed(f"cut and masked differ by {apart:.1e} of the logits", cut, "a cut")
        if effect < MATTERS * CLOSE[torch.float32]:
            raise failed(f"a mask changes the logits by no more than {effect:.1e}", cut, "a mask")


def check_refit(model: Any) -> None:
    """A refitted model, whose layers run one at a time, is cut like any other; on a copy of a small model.

    Raises:
        HywiaError: it is not, or its layers do not run by themselves.
    """
    tokens = sample_tokens(model, 6, 13)
    plan = trial(model, kinds_of(arch.groups(model))[-1], share=0.3)
    refitted = copy.deepcopy(model)
    try:
        after = reconstruct(refitted, plan, tokens, ridge=1e-2)
    except ERRORS as error:
        raise failed(f"its layers do not run one at a time ({error})", cuts_of(plan), "the reconstruction") from error
    cut = copy.deepcopy(refitted)
    for group in cuts_of(after):
        if group.kind == "experts":  # routers choose among all again once the layers are solved
            surgery.zero_units(refitted, group, after.keep[group.name])
    want = logits_of(refitted, tokens)
    surgery.prune(cut, after)
    apart = error_of(logits_of(cut, tokens), want)
    if not apart <= CLOSE[torch.float32]:
        raise failed(f"cut and refitted differ by {apart:.1e} of the logits", cuts_of(plan), "the reconstruction")


def check_saved(model: Any) -> None:
    """What is saved reloads to the same logits, in equal and in unequal layers, with and without a cache.

    Raises:
        HywiaError: it does not.
    """
    tokens = sample_tokens(model, 2, 12)
    layers = 1 + max(g.layer for g in arch.groups(model))
    cached = _runs_with_cache(model, tokens)
    for chosen in kinds_of(arch.groups(model)):
        for shape in (None, (layers - 1, layers)):
            pruned = copy.deepcopy(model)
            plan = trial(pruned, chosen, shape) if shape is None or _has(pruned, chosen, shape) else None
            if plan is None:
                continue
            surgery.prune(pruned, plan)
            want = logits_of(pruned, tokens)
            if cached:
                _check_cache(pruned, tokens, want, plan)
            with tempfile.TemporaryDirectory(prefix="hywia-proof-") as folder:
                save(pruned, None, Path(folder) / "model", plan=plan)
                again = (
                    arch.auto_class(model.config).from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
                )
                error = error_of(logits_of(again, tokens), want)
                if not error <= _RELOADED:
                    raise failed(f"a saved model reloads to logits that differ by {error:.1e}", cuts_of(plan), "a save")
                if cached:
                    _check_cache(again, tokens, want, plan)


def _has(model: Any, kinds: tuple[str, ...], layers: tuple[int, int]) -> bool:
    return any(g.kind in kinds and layers[0] <= g.layer < layers[1] for g in arch.groups(model))


def _runs_with_cache(model: Any, tokens: Tensor) -> bool:
    """Whether the model as it is gives the same logits through a cache: a few families have none of their own."""
    want = logits_of(model, tokens)
    try:
        got = _by_cache(model, tokens)
    except ERRORS:
        return False
    return got is not None and error_of(got, want[:, -2:]) <= _CACHED


def _check_cache(model: Any, tokens: Tensor, want: Tensor, plan: Plan) -> None:
    try:
        got = _by_cache(model, tokens)
    except ERRORS as error:
        raise failed(f"the cut model does not run with a cache ({error})", cuts_of(plan), "a cut") from error
    apart = float("inf") if got is None else error_of(got, want[:, -2:])
    if not apart <= _CACHED:
        raise failed(f"with a cache the logits differ by {apart:.1e}", cuts_of(plan), "a cut")


@torch.no_grad()
def _by_cache(model: Any, tokens: Tensor) -> Tensor | None:
    """The logits of the last two tokens, one at a time, after all others; None where no cache is given."""
    first = model(input_ids=tokens[:, :-2], use_cache=True)
    keyword, cache = cache_keyword(type(model).forward), getattr(first, "past_key_values", None)
    if cache is None:
        return None
    got = []
    for at in (tokens.shape[1] - 2, tokens.shape[1] - 1):
        step = model(input_ids=tokens[:, at : at + 1], use_cache=True, **{keyword: cache})
        cache = step.past_key_values
        got.append(step.logits[:, -1])
    return torch.stack(got, 1)


def is_matrix(leaf: str, parameter: Tensor | None) -> bool:
    """Whether a parameter is a matrix or a stack of them, and no stack of biases."""
    return parameter is not None and parameter.dim() > 1 and not leaf.endswith("bias")


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
                if is_matrix(leaf, parameter) and (full, leaf) not in described:
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
    cut = cuts_of(plan)
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
    kinds: dict[Any, int] = {}
    for layer in sorted({g.layer for g in groups}):
        here = tuple((g.kind, g.units, len(g.members)) for g in groups if g.layer == layer)
        kinds.setdefault(here, layer)
    tried = sorted({*list(kinds.values())[:4], max(g.layer for g in groups)})
    close = CLOSE[next(model.parameters()).dtype]
    with plain_modes():
        dense = logits_of(model, tokens)
        for layer in tried:
            for chosen in kinds_of([g for g in groups if g.layer == layer]):
                plan = trial(model, chosen, (layer, layer + 1))
                with _masked_for_a_while(model, plan):
                    want = logits_of(model, tokens)
                with _cut_for_a_while(model, plan):
                    got = logits_of(model, tokens)
                error, effect = error_of(got, want), error_of(want, dense)
                if not error <= max(close, effect / MATTERS if close > 1e-3 else 0.0):
                    raise failed(f"cut and masked differ by {error:.1e} of the logits", cuts_of(plan), "a cut")
    return tried
