"""The whole job: text, scores, plan, reconstruction and cut, as a recipe says, without printing anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import progress
from .arch import groups, layer_parameters
from .arch.facts import fingerprint
from .checkpoint.run_record import score_summary
from .deploy import planning
from .deploy.hardware import threaded_device_name
from .errors import HywiaError
from .evaluation import Evaluation
from .method import selection, surgery
from .method.calibration_data import calibration
from .method.criteria import score, unscored
from .method.depth import most_gone, rank_layers
from .method.head_residual import head_residuals, rank_heads
from .method.layer_influence import layer_influence
from .method.layer_masks import check_transparent
from .method.mask_learning import learn_masks
from .method.reconstruction import reconstruct
from .method.scores import fuse
from .method.statistics import calibrate
from .method.tokens import check_length, digest, prefix
from .method.writing import opening
from .recipe import Recipe
from .settings import LEARNED
from .types import Plan, Scores, Statistics

__all__ = ["Measured", "Result", "compress", "measure"]


@dataclass(frozen=True, eq=False)
class Measured:
    """What is known of a model before anything is decided; `hywia score` keeps it on disk.

    Attributes:
        scores: of every unit; zeros where only whole layers may go, which are scored once the request is known.
        statistics: that the scores were made from; None for a criterion that needs no text, or where only layers go.
        tokens: int64 `[samples, seq_len]`, as much of the text as the recipe may read; the first ones were scored. None
            where no text was needed.
        record: the resolved recipe that asked for it, and what the text is.
    """

    scores: Scores
    statistics: Statistics | None = None
    tokens: Tensor | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Result:
    """What `compress` did.

    Attributes:
        recipe: resolved, with the numbers of samples that were really used.
        plan: the units that stayed. scores: that decided.
        record: JSON-serialisable: recipe, text, plan, quantiles of the scores, seconds, evaluation; `save` writes it.
        before, after: what `Evaluation.measure` gave, or None.
    """

    recipe: Recipe
    plan: Plan
    scores: Scores
    record: Mapping[str, Any]
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None


class _Clock:
    """Seconds of each part of the work, the device's included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[part] = round(self.seconds.get(part, 0.0) + time.monotonic() - began, 3)


def _device(model: Any) -> torch.device:
    return model.get_input_embeddings().weight.device


def _read(model: Any, tokenizer: Any, recipe: Recipe, asked: int | None) -> tuple[Tensor | None, dict[str, Any]]:
    """The text that a resolved recipe reads, drawn once, and what it is.

    `asked` samples to reconstruct on were asked for: a text that holds fewer is refused then, while the usual number
    is only the most that is taken.
    """
    wanted = recipe.text_samples()
    if wanted == 0:
        return None, {}
    tokens = calibration(
        model,
        tokenizer,
        recipe.calibration,
        samples=wanted,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        fewer=True,
        bos=recipe.bos,
        field=recipe.text_field,
    )
    scored = max(recipe.scored_samples(), recipe.layer_samples(), 1)
    solved = asked or 1 if recipe.reconstruct else 1
    for needed, option in ((scored, "--samples"), (solved, "--reconstruct-samples")):
        if len(tokens) < needed:
            raise HywiaError(
                f"calib: the text holds {len(tokens)} samples of {recipe.seq_len} tokens, {needed} were asked for; "
                f"give more text, or {option} {len(tokens)}, or a shorter --seq-len"
            )
    begin = (opening if recipe.calibration is None else prefix)(tokenizer, recipe.bos)
    origin = recipe.calibration or "written by the model"
    facts = {"calib": origin, "seed": recipe.seed, "bos": bool(begin), "samples": len(tokens)}
    return tokens, {**facts, "tokens": tokens.numel(), "sha256": digest(tokens)}


def measure(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    *,
    tokens: Tensor | None = None,
    backend: str | None = None,
    engine: str = "auto",
    memory: str = "auto",
) -> Measured:
    """Text, statistics and scores of a model as a recipe asks for them; the model is left as it was.

    Args:
        model, tokenizer: as `load` gives them. recipe: what is not about scoring may be missing from it.
        tokens: int64 `[samples, seq_len]`, text at hand already, instead of the recipe's.
        backend, engine, memory: see `calibrate`; they change time and memory, not the meaning.

    Raises:
        UsageError: the recipe contradicts itself. HywiaError: the text is too short, or as `calibrate`.
    """
    recipe.check(scoring_only=True)
    asked, recipe = recipe.reconstruct_samples, recipe.resolved(_device(model).type)
    return _measure(model, tokenizer, recipe, asked, tokens, _Clock(_device(model)), backend, engine, memory)


def _measure(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    asked: int | None,
    tokens: Tensor | None,
    clock: _Clock,
    backend: str | None,
    engine: str,
    memory: str,
) -> Measured:
    text: dict[str, Any] = {}
    with clock.time("text"):
        if tokens is None:
            tokens, text = _read(model, tokenizer, recipe, asked)
    record: dict[str, Any] = {"recipe": recipe.to_dict(), "text": text}
    with clock.time("scoring"):
        if recipe.criterion != "hywia":
            scores = score(model, criterion=recipe.criterion, seed=recipe.seed, backend=backend)
            return Measured(scores, None, tokens, record)
        assert tokens is not None
        if not recipe.scored_samples():
            return Measured(unscored(model), None, tokens, record)
        scored = _first(tokens, recipe.samples, "scoring")
        statistics = calibrate(model, scored, backend=backend, engine=engine, memory=memory)
    origin = {k: text[k] for k in ("calib", "seed", "bos") if k in text} | {"tokens": scored.numel()}
    statistics = replace(statistics, record={**statistics.record, **origin}, known_finite=True)
    return Measured(_fused(statistics, recipe), statistics, tokens, record)


def _fused(statistics: Statistics, recipe: Recipe) -> Scores:
    """Mask learning starts from attention's scores."""
    return fuse(statistics, "attention" if recipe.fusion == LEARNED else recipe.fusion, recipe.order)


def _first(tokens: Tensor | None, samples: int, what: str) -> Tensor:
    held = 0 if tokens is None else len(tokens)
    if tokens is None or held < samples:
        raise HywiaError(
            f"text: {what} needs {samples} samples, {held} are at hand; score again with more text, or name the text "
            "(--calib)"
        )
    return tokens[:samples]


def with_text(measured: Measured, model: Any, tokenizer: Any, recipe: Recipe) -> Measured:
    """The same scores with the recipe's text for what comes after scoring.

    Raises:
        HywiaError: as `measure`.
    """
    asked, recipe = recipe.reconstruct_samples, recipe.resolved(_device(model).type)
    tokens, text = _read(model, tokenizer, recipe, asked)
    return replace(measured, tokens=tokens, record={**measured.record, "text": text})


def check(model: Any, tokenizer: Any, recipe: Recipe, measured: Measured | None = None) -> Recipe:
    """The resolved recipe, once it is sure that the model can meet it; no text is read.

    Raises:
        UsageError: the recipe contradicts itself, or the model cannot meet it: ratio, kinds, layers, servers' rules,
            positions. HywiaError: `measured` is another model's, or lacks text that the recipe needs.
    """
    recipe.check()
    asked, recipe = recipe.reconstruct_samples, recipe.resolved(_device(model).type)
    if measured is not None and measured.scores.fingerprint != fingerprint(model):
        raise HywiaError(
            "scores: made for another model (the weights differ, or what the config says of them); score this one, "
            "in this dtype"
        )
    if measured is not None and measured.scores.groups != groups(model):
        raise HywiaError("scores: expected the groups of units that this model has, got others; score it again")
    scores = None if measured is None else measured.scores
    planning.check_reachable(model, scores, criterion=recipe.criterion, **recipe.plan_request())
    if "layers" in recipe.kinds and recipe.reconstruct:
        check_transparent(model)
    if recipe.text_samples() and measured is None:
        check_length(model, recipe.seq_len, "seq_len")
        if tokenizer is not None:
            prefix(tokenizer, recipe.bos)
    if measured is not None:
        recipe = _with_real_samples(recipe, asked, measured.tokens)
        _check_text(recipe, measured.tokens)
    return recipe


def _with_real_samples(recipe: Recipe, asked: int | None, tokens: Tensor | None) -> Recipe:
    """The usual number of samples to reconstruct on is at most what there is; a number that was asked for stays."""
    if not recipe.reconstruct or asked is not None or tokens is None:
        return recipe
    return replace(recipe, reconstruct_samples=min(recipe.reconstruct_samples or 1, len(tokens)))


def _check_text(recipe: Recipe, tokens: Tensor | None) -> None:
    if recipe.head_ranking == "residual" and "attention" in recipe.kinds:
        _first(tokens, recipe.samples, "ranking heads by what the others leave of them")
    if recipe.layer_samples():
        _first(tokens, recipe.layer_samples(), "ranking layers")
    if recipe.fusion == LEARNED:
        _first(tokens, 1, "mask learning")
    if recipe.reconstruct:
        _first(tokens, recipe.reconstruct_samples or 1, "the reconstruction")


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
        when_cut: called with the result when the model is cut and before it is measured again: the place to save it.
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
    clock = _Clock(_device(model))
    with progress.reporting(on_progress):
        if measured is None:
            measured = _measure(model, tokenizer, recipe, asked, tokens, clock, backend, engine, memory)
            recipe = _with_real_samples(recipe, asked, measured.tokens)
            _check_text(recipe, measured.tokens)
        scores, plan = _decided(model, recipe, measured, clock)
        plan = planning.with_prediction(plan, model, recipe.target, recipe.serve)
        if when_planned is not None:
            when_planned(plan)
        before = None if evaluation is None else evaluation.measure(model, tokenizer)
        if recipe.reconstruct:
            text = _first(measured.tokens, recipe.reconstruct_samples or 1, "the reconstruction")
            with clock.time("reconstruction"):
                plan = reconstruct(model, plan, text, ridge=recipe.ridge)
        with clock.time("cut"):
            surgery.prune(model, plan, backend=backend)
        record = {
            "recipe": recipe.to_dict(),
            "text": dict(measured.record.get("text", {})),
            "seconds": clock.seconds,
            "scores_summary": score_summary(scores, plan),
        }
        result = Result(recipe, plan, scores, record, before)
        if when_cut is not None:
            when_cut(result)
        if evaluation is None or before is None:
            return result
        after = evaluation.measure(model, tokenizer)
    sides = {"text": before["text"], "device": threaded_device_name(_device(model)), "before": before, "after": after}
    return replace(result, record={**record, "evaluation": sides}, after=after)


def _decided(model: Any, recipe: Recipe, measured: Measured, clock: _Clock) -> tuple[Scores, Plan]:
    """The scores that decide, heads ranked and masks learned where the recipe says so, and the plan they make."""
    with clock.time("fusion"):
        scores = measured.scores if measured.statistics is None else _fused(measured.statistics, recipe)
    if recipe.head_ranking == "residual" and "attention" in recipe.kinds:
        text = _first(measured.tokens, recipe.samples, "ranking heads by what the others leave of them")
        with clock.time("head ranking"):
            layers = None if recipe.layers is None else range(*recipe.layers)
            scores = rank_heads(scores, head_residuals(model, text, layers=layers))
    if recipe.layer_samples() and scores.layers is None:
        text = _first(measured.tokens, recipe.layer_samples(), "ranking layers")
        priced = 0
        if set(recipe.kinds) != {"layers"}:  # they compete with other units
            priced = most_gone(layer_parameters(model), scores.parameters, **recipe.plan_request())
        with clock.time("layer ranking"):
            scores = rank_layers(scores, layer_influence(model, text, priced=priced, layers=recipe.layers))
    with clock.time("planning"):
        plan = planning.plan_for(scores, **recipe.plan_request())
    if recipe.fusion == LEARNED:
        assert measured.tokens is not None
        with clock.time("mask learning"):
            scores = learn_masks(model, scores, plan, measured.tokens[: recipe.learning_samples()], steps=recipe.steps)
            plan = selection.ranked_again(plan, scores)
    return scores, plan
