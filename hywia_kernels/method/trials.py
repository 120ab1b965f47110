"""Trial cuts by which a proof compares two ways to the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arch
from ..errors import HywiaError
from ..settings import GROUP_KINDS
from ..types import Group, Plan
from .criteria import random
from .selection import plan as selected

__all__ = [
    "CLOSE",
    "ERRORS",
    "MATTERS",
    "cuts_of",
    "error_of",
    "failed",
    "kinds_of",
    "logits_of",
    "sample_tokens",
    "trial",
]

SHARE = 0.4  # of each group's units that a trial cut removes
# Relative errors that a dtype's rounding, through a whole model, may make of logits.
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
MATTERS = 10.0  # how many times the error a trial cut must change the logits for the comparison to say anything
# What a module raises whose shapes are not what it was made for, or that lacks what was looked for.
ERRORS = (
    *(RuntimeError, IndexError, KeyError, ValueError, TypeError, AttributeError),
    *(AssertionError, ArithmeticError, NotImplementedError),
)


def sample_tokens(model: Any, samples: int, length: int, seed: int = 11) -> Tensor:
    """Random token ids int64 `[samples, length]` of a model's vocabulary, without its special first ones."""
    words = int(arch.text_config(model).vocab_size)
    return torch.randint(min(5, words - 1), words, (samples, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    tokens = tokens.to(model.get_input_embeddings().weight.device)
    return model(input_ids=tokens, **({"use_cache": False} | options)).logits


def error_of(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over the norm of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def failed(what: str, groups: Sequence[Group], part: str) -> HywiaError:
    kinds = sorted({g.kind for g in groups})
    modules = sorted({m.module for g in groups[:1] for m in g.members})
    where = ", ".join(modules[:4]) if modules else "the model"
    return HywiaError(
        f"proof: {part} of {where} ({' and '.join(kinds) or 'units'}): {what}; the structure that was derived does not "
        "hold for this model, which is refused. CONTRIBUTING.md says how to describe it by hand"
    )


def kinds_of(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """Kinds that a trial cuts together: all but whole experts, and all, where there are some."""
    kinds = [k for k in GROUP_KINDS if any(g.kind == k for g in groups)]
    without = tuple(k for k in kinds if k != "experts")
    return [k for k in dict.fromkeys((without, tuple(kinds))) if k]


def trial(model: Any, kinds: tuple[str, ...], layers: tuple[int, int] | None = None, share: float = SHARE) -> Plan:
    scores = random(model, seed=5)
    align = 8 if any(g.tied_width for g in scores.groups) else 1  # products of stacked experts want such widths
    return selected(scores, group_ratio=share, units=kinds, align=align, layers=layers)


def cuts_of(plan: Plan) -> list[Group]:
    return [g for g in plan.groups if plan.keep[g.name].numel() < g.units]
