"""Which of the plans that meet a request is taken: the one that leaves most of the dense model's predictions.

Estimates of the loss are made for single units in the whole model. They rank the units of a layer well, but added up
over a deep cut they say little about how much of each kind should go, or how far layers should differ. So some plans
are tried, on text that was not scored, after what is cheap of what follows the cut (see `judging`). The plans differ in
the count of heads and in how far the estimates set layers apart; first the former is looked for, then the latter.
How many are tried goes by what there is to choose, never by a clock: a run repeats.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..arch.facts import count_parameters
from ..settings import JUDGED_SAMPLES, ByDevice
from ..types import Plan, Scores
from .judging import Follow, Judge, shared_out
from .selection import estimated_loss
from .training_runs import TRAINED_TOKENS

__all__ = ["EFFORTS", "LEAST_TRAINED_TOKENS", "Choices", "Effort", "best_plan"]

LEAST_TRAINED_TOKENS = 16 * TRAINED_TOKENS  # of a trial's text: training a layer on less tells nothing
_LEAST_SHARE = 1 / 8  # of a kind's units, below which a split is only tried where there are few

Split = Mapping[str, int]


@dataclass(frozen=True)
class Choices:
    """The plans that meet one request.

    Attributes:
        splits: kind -> width, the estimate's own choice first; `[None]` where the request itself says the widths.
        spreads: how far the estimates set layers apart, the usual one last.
        plan: makes the plan of one of each.
    """

    splits: Sequence[Split | None]
    spreads: Sequence[float]
    plan: Callable[[Split | None, float], Plan]

    def __len__(self) -> int:
        return len(self.splits) * len(self.spreads)


@dataclass(frozen=True)
class Effort:
    """How much a search does.

    Attributes:
        splits: how many it tries at the most. refit, judged: samples that each is refitted and judged on. A refit on
            few says of deep cuts that channels are worth more, and heads less, than they are after one on many.
    """

    splits: int
    refit: ByDevice[int]
    judged: int

    def refit_samples(self, model: Any, device_type: str) -> int:
        """Samples to refit on, of a model that runs on this type of device."""
        return self.refit.on(device_type, count_parameters(model))

    def trials(self, choices: Choices) -> int:
        """How many plans are tried at the most."""
        return 0 if len(choices) == 1 else min(self.splits, len(choices.splits)) + len(choices.spreads) - 1


EFFORTS = {
    "fast": Effort(splits=6, refit=ByDevice(cpu=32, gpu=256, large=32), judged=JUDGED_SAMPLES["fast"]),
    "thorough": Effort(splits=16, refit=ByDevice(cpu=128, gpu=512, large=128), judged=JUDGED_SAMPLES["thorough"]),
}


@dataclass
class _Trial:
    split: int  # its place in `Choices.splits` by count of heads
    spread: float
    plan: Plan
    estimate: float | None
    divergence: float
    seconds: float
    followed: float | None = None  # the divergence after what follows

    def record(self, chosen: bool) -> dict[str, Any]:
        widths = {}
        for kind in sorted({g.kind for g in self.plan.groups}):
            kept = self.plan.widths(kind)
            widths[kind] = round(sum(kept) / len(kept), 1) if len(set(kept)) > 1 else kept[0]
        values = {
            "widths": widths,
            "spread": self.spread,
            "removed": self.plan.ratio,
            "estimate": self.estimate,
            "divergence": self.divergence,
            "seconds": round(self.seconds, 3),
            "chosen": chosen,
        }
        return values if self.followed is None else {**values, "followed": self.followed}


def best_plan(
    model: Any,
    scores: Scores,
    choices: Choices,
    tokens: Tensor,
    *,
    effort: str,
    scored: int,
    ridge: float | None,
    passes: int = 0,
    follow: Follow | None = None,
) -> Plan:
    """The best of the plans that were tried; its record lists all of them as "search".

    Args:
        model: that the scores are of; it is left as it was. scores: whose estimates are recorded beside.
        choices: what there is to choose from; where that is one plan, it is given back untried.
        tokens: int64 `[samples, length]` of the calibration text, as `shared_out` takes them.
        effort: of EFFORTS. scored: how many of the first samples the scores have read.
        ridge: of the refit; None: plans are judged masked, as where no reconstruction follows.
        passes: in which that trains layers afterwards; so do trials, where they have the text for it.
        follow: what else follows, in short: it trains the model, masked to the plan, in place. The two best plans are
            judged again after it.

    Raises:
        HywiaError: a plan cannot be tried (see `Judge.divergence`). The model is as it was, also after other errors.
    """
    if len(choices) == 1:
        return choices.plan(choices.splits[0], choices.spreads[0])
    began = time.monotonic()
    how = EFFORTS[effort]
    device = model.get_input_embeddings().weight.device
    texts = shared_out(tokens, scored, how.refit_samples(model, device.type), how.judged)
    trained = passes if texts.refit.numel() >= LEAST_TRAINED_TOKENS else 0
    judge = Judge(model, texts, ridge, trained)
    ordered = sorted(choices.splits, key=lambda s: (0, 0) if s is None else (s.get("layers", 0), s.get("attention", 0)))
    tried: dict[tuple[int, float], _Trial] = {}

    def divergence(split: int, spread: float) -> float:
        started = time.monotonic()
        if (split, spread) not in tried:
            plan = choices.plan(ordered[split], spread)
            value = judge.divergence(plan)
            estimate = estimated_loss(scores, plan)
            tried[split, spread] = _Trial(split, spread, plan, estimate, value, time.monotonic() - started)
        return tried[split, spread].divergence

    usual = choices.spreads[-1]
    own = ordered.index(choices.splits[0])
    best = _best_split(lambda split: divergence(split, usual), ordered, own, how.splits)
    for spread in choices.spreads[:-1]:
        divergence(best, spread)
    ranked = sorted(tried.values(), key=lambda trial: trial.divergence)
    if follow is not None:
        for trial in ranked[:2]:
            started = time.monotonic()
            trial.followed = judge.after(trial.plan, follow)
            trial.seconds += time.monotonic() - started
        ranked[:2] = sorted(ranked[:2], key=lambda trial: trial.followed or 0.0)
    chosen = ranked[0]
    record = {
        "effort": effort,
        "refitted": None if ridge is None else len(texts.refit),
        "passes": trained,
        "judged": len(texts.judged),
        "fresh": texts.fresh,
        "tried": len(tried),
        "divergence": chosen.divergence if chosen.followed is None else chosen.followed,
        "candidates": [
            trial.record(trial is chosen) for trial in sorted(tried.values(), key=lambda t: (t.split, t.spread))
        ],
        "seconds": round(time.monotonic() - began, 3),
    }
    return dataclasses.replace(chosen.plan, record={**chosen.plan.record, "search": record})


def _best_split(judge: Callable[[int], float], splits: Sequence[Split | None], own: int, most: int) -> int:
    """The place of the best of the splits that are tried, at most `most`.

    All are tried where these are few. Otherwise some are, evenly spaced, with the estimate's own choice among them;
    then, one by one, those halfway between the best so far and its neighbours among the tried, the better one first.
    """
    if len(splits) <= most:
        return min(range(len(splits)), key=judge)
    places = _sensible(splits)
    coarse = max(2, most // 2)
    spaced = {places[round(i * (len(places) - 1) / (coarse - 1))] for i in range(coarse)}
    values = {place: judge(place) for place in sorted(spaced | {own})}
    while len(values) < most:
        best = min(values, key=lambda place: (values[place], place))
        below = max((p for p in values if p < best), default=best)
        above = min((p for p in values if p > best), default=best)
        near = sorted((below, above), key=lambda place: values[place])
        further = [(place + best) // 2 for place in near if abs(place - best) > 1]
        if not further:
            break
        values[further[0]] = judge(further[0])
    return min(values, key=lambda place: (values[place], place))


def _sensible(splits: Sequence[Split | None]) -> list[int]:
    """Places of the splits that leave enough of every kind, or of all where none does."""
    widest: dict[str, int] = {}
    for split in splits:
        for kind, width in (split or {}).items():
            widest[kind] = max(widest.get(kind, 0), width)
    enough = [
        place
        for place, split in enumerate(splits)
        if all(width >= math.ceil(_LEAST_SHARE * widest[kind]) for kind, width in (split or {}).items())
    ]
    return enough if len(enough) > 1 else list(range(len(splits)))
