"""A model made smaller without reading it into memory, where scores of it are at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import progress
from ..checkpoint.loading import device_named
from ..checkpoint.run_record import score_summary
from ..checkpoint.stored_model import StoredModel, open_stored
from ..deploy import planning
from ..errors import HywiaError
from ..method.derivation import proven
from ..method.pruned_files import prune_files
from ..recipe import Recipe
from ..settings import LEARNED
from ..types import Plan
from .checking import check
from .deciding import decided
from .job import Result
from .measuring import Clock, Measured, first_samples

__all__ = ["compress_files", "in_memory_only"]


def in_memory_only(recipe: Recipe, measured: Measured) -> dict[str, str]:
    """What of a resolved recipe needs all of the model in memory: what it is -> how to leave it out."""
    needs = {}
    if recipe.search != "none":
        needs["the search for shares"] = "--search none"
    if recipe.head_ranking == "residual" and "attention" in recipe.kinds:
        needs["the ranking of heads by what the others leave of them"] = "--head-ranking scores"
    if recipe.layer_samples() and measured.scores.layers is None:
        needs["the ranking of whole layers"] = "--units without layers"
    if recipe.fusion == LEARNED:
        needs["mask learning"] = "another --fusion"
    if recipe.recover is not None:
        needs["recovery"] = "--no-recover; 'hywia recover' follows where the dense and the cut model fit"
    return needs


def compress_files(
    model: str | Path | StoredModel,
    recipe: Recipe,
    path: str | Path,
    *,
    measured: Measured,
    more: Mapping[str, Any] | None = None,
    when_planned: Callable[[Plan], None] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    in_place: bool = False,
    on_progress: progress.Callback | None = None,
    backend: str | None = None,
) -> Result:
    """`load`, `compress` and `save` from scores, in the same bytes, for a model that does not fit in memory.

    A reconstruction runs one layer at a time; without one, a few tensors are in memory. See `prune_files`.

    Args:
        model, device, dtype, trust_remote_code, revision: as `load` takes them; or what `open_stored` gave.
        recipe: the request. measured: of the same model. path, overwrite, in_place: as `save` takes them.
        more: to record, beside the result's record; read when the weights are written.
        when_planned: called with the plan before anything is written. on_progress, backend: as `compress` takes them.

    Raises:
        UsageError, HywiaError: as `compress`; HywiaError: the recipe asks for what needs the model in memory.
    """
    if not isinstance(model, StoredModel):
        model = open_stored(model, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision)
    where = device_named(device)
    recipe = check(model.model, model.tokenizer, recipe, measured, stored_for=where)
    needs = in_memory_only(recipe, measured)
    if needs:
        raise HywiaError(f"recipe: not from files, since it needs the model in memory: {said(needs)}")
    clock = Clock(where)
    with progress.reporting(on_progress):
        scores, plan = decided(model.model, recipe, measured, clock)
        plan = planning.with_prediction(plan, model.model, recipe.target, recipe.serve)
        if when_planned is not None:
            when_planned(plan)
        text = None
        if recipe.reconstruct:
            text = first_samples(measured.tokens, recipe.reconstruct_samples or 1, "the reconstruction")
        record: dict[str, Any] = {
            "recipe": recipe.to_dict(),
            "text": dict(measured.record.get("text", {})),
            "seconds": clock.seconds,
            "scores_summary": score_summary(scores, plan),
        }
        proof = proven(model.model)
        if proof is not None:
            record["proof"] = proof.to_dict()
        with clock.time("cut"):
            plan = prune_files(
                model,
                plan,
                path,
                refit=text,
                ridge=recipe.ridge,
                passes=recipe.layer_passes or 0,
                record={**record, **(more or {})},
                device=device,
                overwrite=overwrite,
                in_place=in_place,
                backend=backend,
            )
    return Result(recipe, plan, scores, record)


def said(needs: Mapping[str, str]) -> str:
    """What needs the model in memory and how each is left out, in words."""
    return "; ".join(f"{what} (leave it out: {option})" for what, option in needs.items())
