"""Which units go: scores, and the plan that they make."""

from __future__ import annotations

from typing import Any

from ..arch import layer_parameters
from ..deploy import planning
from ..method import selection
from ..method.depth import most_gone, rank_layers
from ..method.head_residual import head_residuals, rank_heads
from ..method.layer_influence import layer_influence
from ..method.mask_learning import learn_masks
from ..method.recovery.job import Dense
from ..method.search import best_plan
from ..recipe import Recipe
from ..settings import LEARNED
from ..types import Plan, Scores
from .measuring import Clock, Measured, first_samples, fused

__all__ = ["decided"]


def decided(
    model: Any, recipe: Recipe, measured: Measured, clock: Clock, dense: Dense | None = None
) -> tuple[Scores, Plan]:
    """The scores that decide, heads ranked and masks learned where the recipe says so, and the plan they make.

    Args:
        dense: the dense model's side of the recovery that follows; a search tries its best plans after a short one.
    """
    with clock.time("fusion"):
        scores = measured.scores if measured.statistics is None else fused(measured.statistics, recipe)
    if recipe.head_ranking == "residual" and "attention" in recipe.kinds:
        text = first_samples(measured.tokens, recipe.samples, "ranking heads by what the others leave of them")
        with clock.time("head ranking"):
            layers = None if recipe.layers is None else range(*recipe.layers)
            scores = rank_heads(scores, head_residuals(model, text, layers=layers))
    if recipe.layer_samples() and scores.layers is None:
        text = first_samples(measured.tokens, recipe.layer_samples(), "ranking layers")
        priced = 0
        if set(recipe.kinds) != {"layers"}:  # they compete with other units
            priced = most_gone(layer_parameters(model), scores.parameters, **recipe.plan_request())
        with clock.time("layer ranking"):
            scores = rank_layers(scores, layer_influence(model, text, priced=priced, layers=recipe.layers))
    with clock.time("planning"):
        plan = planning.plan_for(scores, **recipe.plan_request())
    if recipe.search != "none":
        with clock.time("search"):
            plan = _searched(model, recipe, measured, scores, dense)
    if recipe.fusion == LEARNED:
        assert measured.tokens is not None
        with clock.time("mask learning"):
            scores = learn_masks(model, scores, plan, measured.tokens[: recipe.learning_samples()], steps=recipe.steps)
            plan = selection.ranked_again(plan, scores)
    return scores, plan


def _searched(model: Any, recipe: Recipe, measured: Measured, scores: Scores, dense: Dense | None) -> Plan:
    """The plan that leaves most of the model's predictions, of those that meet the recipe."""
    assert recipe.search is not None
    assert measured.tokens is not None
    return best_plan(
        model,
        scores,
        planning.choices(scores, **recipe.plan_request()),
        measured.tokens,
        effort=recipe.search,
        scored=recipe.samples,
        ridge=recipe.ridge if recipe.reconstruct else None,
        passes=recipe.layer_passes or 0,
        follow=None if dense is None or not dense.brief_steps else lambda masked, _: dense.briefly(masked),
    )
