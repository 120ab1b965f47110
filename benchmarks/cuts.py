"""Models as a criterion, a setting and a calibration seed leave them; `quality` lists the criteria."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import hywia_kernels as hk
from hywia_kernels.settings import FUSIONS, SAMPLES

from . import peers
from .memory import Spent, spending
from .settings import Setting, shares_of_widths, widths_of_split

# Criterion -> the fields of a recipe with these settings that differ from the defaults.
RECIPES: dict[str, dict[str, Any]] = {
    "recipe": {},
    "recipe-uniform": {"layout": "uniform"},
    "recipe-adaptive": {"layout": "adaptive"},
    "recipe-unrefitted": {"layout": "uniform", "reconstruct": False},
    "learned": {"layout": "uniform", "reconstruct": False, "fusion": "learned"},
}
# The recipe, all of it, with another fusion than the fine grain alone.
ABLATION = {f"recipe-{fusion}": {"fusion": fusion} for fusion in ("attention", "coarse", "mean", "product", "learned")}
ALONE = {"layout": "uniform", "reconstruct": False}  # a grain, a blend or a baseline without the rest of the recipe
ALL = (
    "random",
    "magnitude",
    *(f"lp:{t}" for t in peers.LLM_PRUNER),
    "wanda-sp",
    "flap",
    "fine",
    "coarse",
    "attention",
    *RECIPES,
)
DEFAULT_SAMPLES = {"wanda-sp": 128, "flap": 1024, **dict.fromkeys((*RECIPES, *ABLATION), SAMPLES)}
TEXT = 1024  # samples that are always drawn, as many as a GPU's reconstruction reads; scoring takes the first of them


def split(criterion: str) -> tuple[str, int]:
    """`name[@samples]` with the name's usual number of samples.

    Raises:
        ValueError: an unknown criterion.
    """
    name, at, count = criterion.partition("@")
    base, colon, order = name.partition(":")
    known = (base == "lp" and order in peers.LLM_PRUNER) or (
        base in FUSIONS and (not colon or order in ("first", "second", "mixed"))
    )
    if not known and name not in (*ALL, *ABLATION):
        raise ValueError(f"expected criteria out of {', '.join((*ALL, *ABLATION))}, got {name!r}")
    return name, int(count) if at else DEFAULT_SAMPLES.get(name, 10)


@dataclass(frozen=True)
class Cut:
    """A model that was cut, its plan, and what it took from text to cut, scoring included; memory is all that is there,
    the dense model too."""

    model: Any
    plan: hk.Plan
    spent: Spent


class _Planned(Exception):
    """Raised to end a run once its plan is known."""


class Bench:
    """A model, its calibration samples `(seed, count)` -> int64 `[count, length]`, and its measurements, which criteria
    of the same seed and number of samples share.

    Args:
        layers: of settings by shares of units that name none; those by a share of all parameters take every layer.
        align: channel widths are multiples of it; None: what the target likes (peers: any).
        text: samples that are drawn at least.
    """

    def __init__(
        self,
        model: Any,
        samples: Callable[[int, int], Tensor],
        layers: range,
        align: int | None = 1,
        text: int = TEXT,
    ) -> None:
        self.model, self.samples, self.layers, self.align, self.text = model, samples, layers, align, text
        self.device = model.get_input_embeddings().weight.device
        self._measured: dict[tuple[int, int], tuple[hk.Measured, Spent]] = {}
        self._widths: dict[tuple[Setting, int], dict[str, int]] = {}

    def measured(self, seed: int, count: int) -> hk.Measured:
        return self.scoring(seed, count)[0]

    def scoring(self, seed: int, count: int) -> tuple[hk.Measured, Spent]:
        """The measurement, and what it took, once for all criteria that it serves."""
        key = (seed, count)
        if key not in self._measured:
            tokens = self.samples(seed, max(count, self.text))
            with spending(self.device) as spent:
                measured = hk.measure(self.model, None, hk.Recipe(samples=count, seed=seed), tokens=tokens)
            self._measured[key] = (measured, spent)
        return self._measured[key]

    def statistics(self, seed: int, count: int) -> hk.Statistics:
        statistics = self.measured(seed, count).statistics
        assert statistics is not None
        return statistics

    def layers_of(self, setting: Setting) -> range:
        """The layers that a setting cuts."""
        if setting.shares is None:
            return range(1 + max(g.layer for g in hk.groups(self.model)))
        return self.layers if setting.layers is None else setting.layers

    def recipe(self, criterion: str, count: int, setting: Setting, seed: int) -> hk.Recipe:
        """The recipe of one of this package's criteria."""
        name, _, order = criterion.partition(":")
        if name in ("random", "magnitude"):
            change: dict[str, Any] = {**ALONE, "criterion": name}
        elif name in RECIPES or name in ABLATION:
            change = (RECIPES | ABLATION)[name]
        else:
            change = {**ALONE, "fusion": name, "order": order or "second"}
        common: dict[str, Any] = {"align": self.align, "samples": count, "seed": seed}
        if setting.shares is not None:
            layers = self.layers_of(setting)
            span = (layers.start, layers.stop)
            return hk.Recipe(group_ratio=dict(setting.shares), layers=span, **common, **change)
        if setting.kv_groups is None:
            return hk.Recipe(ratio=setting.ratio, **common, **change)
        shares = shares_of_widths(self.model, self.widths(setting, seed))
        return hk.Recipe(group_ratio=shares, **{**common, "layout": "uniform", **change})

    def widths(self, setting: Setting, seed: int) -> dict[str, int]:
        """Kind -> units that stay in every layer under a share of all parameters: those of the setting's split, or
        those that the recipe's plan chooses, for every criterion of the seed."""
        assert setting.ratio is not None
        key = (setting, seed)
        if key not in self._widths and setting.kv_groups is not None:
            self._widths[key] = widths_of_split(self.model, setting.ratio, setting.kv_groups, self.align or 1)
        elif key not in self._widths:
            plan = self._planned(self.recipe("recipe", DEFAULT_SAMPLES["recipe"], setting, seed), seed)
            self._widths[key] = {kind: plan.widths(kind)[0] for kind in ("attention", "mlp")}
        return self._widths[key]

    def _planned(self, recipe: hk.Recipe, seed: int) -> hk.Plan:
        """The plan of a recipe, without what follows it."""
        found: list[hk.Plan] = []

        def stop(plan: hk.Plan) -> None:
            found.append(plan)
            raise _Planned

        measured = self.measured(seed, recipe.samples)
        with suppress(_Planned):
            hk.compress(self.model, None, recipe, measured=measured, when_planned=stop)
        return found[0]

    @contextmanager
    def pruned(self, criterion: str, count: int, setting: Setting, seed: int) -> Iterator[Cut]:
        """A copy of the model as the criterion cuts it. FLAP's biases are added by hooks while the block runs."""
        if criterion in ("wanda-sp", "flap") or criterion.startswith("lp:"):
            with self._peer(criterion, count, setting, seed) as cut:
                yield cut
            return
        recipe = self.recipe(criterion, count, setting, seed)
        measured, scoring = self.scoring(seed, count) if recipe.criterion == "hywia" else (None, Spent())
        model = copy.deepcopy(self.model)
        with spending(self.device) as spent:
            plan = hk.compress(model, None, recipe, measured=measured).plan
        yield Cut(model, plan, scoring + spent)

    @contextmanager
    def _peer(self, criterion: str, count: int, setting: Setting, seed: int) -> Iterator[Cut]:
        """Under a share of all parameters other methods keep as many heads and channels as this package's plan does."""
        layers = self.layers_of(setting)
        if setting.shares is not None:
            shares = setting.shares
        else:
            shares = shares_of_widths(self.model, self.widths(setting, seed))
        samples, statistics, scoring = self.samples(seed, count), None, Spent()
        if criterion.startswith("lp:"):
            statistics, scoring = self.statistics(seed, count), self.scoring(seed, count)[1]
        model = copy.deepcopy(self.model)
        masked = copy.deepcopy(self.model) if criterion == "wanda-sp" else None
        with spending(self.device) as spent:
            biases: dict[str, Tensor] = {}
            if statistics is not None:
                scores = peers.llm_pruner(statistics, criterion.partition(":")[2])
                span = (layers.start, layers.stop)
                plan = hk.plan(scores, group_ratio=shares, layers=span, align=self.align or 1)
            elif masked is not None:
                plan = peers.wanda_sp(masked, samples, shares, layers)
            else:
                result = peers.flap(self.model, samples, shares, layers)
                plan, biases = result.plan, result.biases
            hk.prune(model, plan)
        del masked
        with peers.biased(model, biases):
            yield Cut(model, plan, scoring + spent)


def shape(plan: hk.Plan) -> dict[str, float]:
    """Columns of a row: KV groups and channels that stay, on average over the layers."""
    found = {}
    for column, kind in (("kv_groups", "attention"), ("channels", "mlp")):
        widths = plan.widths(kind)
        if widths:
            found[column] = sum(widths) / len(widths)
    return found
