"""The whole job: text, scores, plan, reconstruction, cut and recovery, as a recipe says, without printing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import progress
from ..checkpoint.loaded_weights import dequantised
from ..checkpoint.run_record import score_summary
from ..deploy import planning
from ..deploy.hardware import threaded_device_name
from ..evaluation import Evaluation, speeds
from ..method import surgery
from ..method.derivation import proven
from ..method.reconstruction import reconstruct
from ..method.recovery.job import Dense, ask
from ..recipe import Recipe
from ..types import Plan, Scores
from .checking import check, check_text, with_real_samples
from .deciding import decided
from .measuring import Clock, Measured, device_of, first_samples, measured_with

__all__ = ["Result", "compress"]


@dataclass(frozen=True, eq=False)
class Result:
    """What `compress` did.

    Attributes:
        recipe: resolved, with the numbers of samples that were really used.
        plan: the units that stayed. scores: that decided.
        record: JSON-serialisable: recipe, text, plan, quantiles of the scores, seconds, recovery, evaluation; `save`
            writes it.
        before, after: what `Evaluation.measure` gave, or None.
    """

    recipe: Recipe
    plan: Plan
    scores: Scores
    record: Mapping[str, Any]
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None


def compress(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    *,
    measured: Measured | None = None,
    tokens: Tensor | None = None,
    evaluation: Evaluation | None = None,
    when_planned: Callable[[Plan], None] | None = None,
    when_cut: Callable[[Result], None] | None = None,
    when_recovered: Callable[[Result], None] | None = None,
    work: str | Path | None = None,
    on_progress: progress.Callback | None = None,
    backend: str | None = None,
    engine: str = "auto",
    memory: str = "auto",
) -> Result:
    """Make a model smaller, in place, as `hywia prune` does.

    Args:
        model, tokenizer: as `load` gives them. recipe: the request.
        measured: of the same model, to use instead of scoring again; its statistics are fused as the recipe says.
        tokens: int64 `[samples, seq_len]`, text at hand already, instead of the recipe's.
        evaluation: what to measure before and after; None: nothing.
        when_planned: called with the plan before the model is changed.
        when_cut: called with the result when the model is cut, and before it is recovered or measured again: the place
            to save it. when_recovered: the same once more after a recovery, where the recipe asks for one.
        work: folder in which a recovery keeps what it needs to go on after a stop, see `recover`.
        on_progress: called with the name of the work, steps done and their number (None: unknown).
        backend, engine, memory: see `calibrate`.

    Raises:
        UsageError, HywiaError: as `check` and `measure`, and what the steps raise. The model is as it was, unless the
            error says otherwise.
    """
    asked = recipe.reconstruct_samples
    recipe = check(model, tokenizer, recipe, measured)
    if evaluation is not None:
        evaluation.check(model, tokenizer)
    clock = Clock(device_of(model))
    with progress.reporting(on_progress):
        if measured is None:
            how: dict[str, Any] = {"backend": backend, "engine": engine, "memory": memory, "orders": (recipe.order,)}
            measured = measured_with(model, tokenizer, recipe, asked, tokens, clock, **how)
            recipe = with_real_samples(recipe, asked, measured.tokens)
            check_text(recipe, measured.tokens)
        with _dense(model, tokenizer, recipe, work, clock) as dense:
            scores, plan = decided(model, recipe, measured, clock, dense)
            plan = planning.with_prediction(plan, model, recipe.target, recipe.serve)
            if when_planned is not None:
                when_planned(plan)
            before = None if evaluation is None else evaluation.measure(model, tokenizer)
            if recipe.reconstruct:
                text = first_samples(measured.tokens, recipe.reconstruct_samples or 1, "the reconstruction")
                with clock.time("reconstruction"):
                    plan = reconstruct(model, plan, text, ridge=recipe.ridge, passes=recipe.layer_passes or 0)
            with clock.time("cut"):
                surgery.prune(model, plan, backend=backend)
            record: dict[str, Any] = {
                "recipe": recipe.to_dict(),
                "text": dict(measured.record.get("text", {})),
                "seconds": clock.seconds,
                "scores_summary": score_summary(scores, plan),
            }
            if dequantised(model) is not None:
                record["dequantised"] = dequantised(model)
            proof = proven(model)
            if proof is not None:
                record["proof"] = proof.to_dict()
            result = Result(recipe, plan, scores, record, before)
            if when_cut is not None:
                when_cut(result)
            if dense is not None:
                with clock.time("recovery"):
                    recovered = dense.recover(model)
                result = replace(result, record={**record, "recovery": recovered.record})
                if when_recovered is not None:
                    when_recovered(result)
            if evaluation is None or before is None:
                return result
            after = evaluation.measure(model, tokenizer)
            if dense is not None and dense.model is not None:
                fast = speeds([dense.model, model])
                before, after = (
                    {**side, "tokens_per_second": s} for side, s in zip((before, after), fast, strict=True)
                )
    sides = {"text": before["text"], "device": threaded_device_name(device_of(model)), "before": before, "after": after}
    return replace(result, record={**result.record, "evaluation": sides}, before=before, after=after)


@contextmanager
def _dense(model: Any, tokenizer: Any, recipe: Recipe, work: str | Path | None, clock: Clock) -> Iterator[Dense | None]:
    """The dense model's side of the recovery that the recipe asks for, made before the model is changed."""
    if recipe.recover is None:
        yield None
        return
    with ExitStack() as stack:
        with clock.time("recovery"):
            how: dict[str, Any] = {"bos": recipe.bos, "field": recipe.text_field, "copied": True}
            dense = stack.enter_context(ask(model, tokenizer, recipe.recover, work=work, **how))
        yield dense
