"""Whether a model can meet a recipe, found out before any of the work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..arch import groups
from ..arch.facts import fingerprint
from ..deploy import planning
from ..errors import HywiaError
from ..method.derivation import prove
from ..method.layer_masks import check_transparent
from ..method.recovery.job import resolved
from ..method.tokens import check_length, prefix
from ..recipe import Recipe
from ..settings import LEARNED
from .measuring import Measured, device_of, first_samples, fitted

__all__ = ["check", "check_text", "with_real_samples", "with_resolved_recovery"]


def check(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    measured: Measured | None = None,
    *,
    stored_for: torch.device | None = None,
) -> Recipe:
    """The resolved recipe, once it is sure that the model can meet it; no text is read.

    A model of a type that the table of architectures lacks has to prove what is derived of it first (`prove`).

    Args:
        stored_for: the model's weights are still in their files, so that `measured` cannot be held against them yet;
            its layers will run on this device.

    Raises:
        UsageError: the recipe contradicts itself, or the model cannot meet it: ratio, kinds, layers, servers' rules,
            positions. HywiaError: `measured` is another model's, or lacks text that the recipe needs.
    """
    recipe.check()
    prove(model)
    asked, searched = recipe.reconstruct_samples, recipe.search
    device = device_of(model) if stored_for is None else stored_for
    recipe = fitted(model, recipe, device)
    if searched is None and measured is not None and measured.tokens is None:
        recipe = replace(recipe, search="none")  # the usual search needs text; one that was asked for is refused below
    if measured is not None and stored_for is None and measured.scores.fingerprint != fingerprint(model):
        raise HywiaError(
            "scores: made for another model (the weights differ, or what the config says of them); score this one, "
            "in this dtype"
        )
    if measured is not None and measured.scores.groups != groups(model):
        raise HywiaError("scores: expected the groups of units that this model has, got others; score it again")
    scores = None if measured is None else measured.scores
    planning.check_reachable(model, scores, criterion=recipe.criterion, **recipe.plan_request())
    if "layers" in recipe.kinds and (recipe.reconstruct or recipe.search != "none"):
        check_transparent(model)
    if recipe.text_samples() and measured is None:
        check_length(model, recipe.seq_len, "seq_len")
        if tokenizer is not None:
            prefix(tokenizer, recipe.bos)
    if measured is not None:
        recipe = with_real_samples(recipe, asked, measured.tokens)
        check_text(recipe, measured.tokens)
    return with_resolved_recovery(model, recipe, device)


def with_resolved_recovery(model: Any, recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with nothing left open in the recovery that it may ask for.

    Args:
        model: the dense model, which may be on the meta device. device: where the run will be.

    Raises:
        UsageError: samples that are longer than the model's positions.
    """
    if recipe.recover is None:
        return recipe
    check_length(model, recipe.recover.seq_len, "recover: seq_len")
    return replace(recipe, recover=resolved(recipe.recover, model, device, seed=recipe.seed))


def with_real_samples(recipe: Recipe, asked: int | None, tokens: Tensor | None) -> Recipe:
    """The usual number of samples to reconstruct on is at most what there is; a number that was asked for stays."""
    if not recipe.reconstruct or asked is not None or tokens is None:
        return recipe
    return replace(recipe, reconstruct_samples=min(recipe.reconstruct_samples or 1, len(tokens)))


def check_text(recipe: Recipe, tokens: Tensor | None) -> None:
    if recipe.head_ranking == "residual" and "attention" in recipe.kinds:
        first_samples(tokens, recipe.samples, "ranking heads by what the others leave of them")
    if recipe.search != "none":
        first_samples(tokens, 1, "the search")
    if recipe.layer_samples():
        first_samples(tokens, recipe.layer_samples(), "ranking layers")
    if recipe.fusion == LEARNED:
        first_samples(tokens, 1, "mask learning")
    if recipe.reconstruct:
        first_samples(tokens, recipe.reconstruct_samples or 1, "the reconstruction")
