"""`hywia prune`: write a smaller model."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from ..checkpoint import history, originals, saving
from ..checkpoint.scores_file import load_measured
from ..compression import Measured, Result, compress, with_resolved_recovery, with_text
from ..deploy.estimate import estimate
from ..errors import UsageError
from ..evaluation import stored_bytes
from ..method.recovery.work import beside
from ..recipe import Recipe
from ..settings import LEARNED
from ..types import Plan
from . import arguments as shared
from . import console, launched, session, streaming
from .dry_run import dry_run
from .prune_files import cut_from_files, is_cut_from_files
from .recover import finish

__all__ = ["run"]

# What a scores directory has decided: the rest of a recipe comes after it.
_SCORING = ("calibration", "samples", "seq_len", "seed", "bos", "text_field", "criterion", "fusion", "order")
_OF_TEXT = ("samples", "seq_len", "seed", "bos", "text_field")


def run(arguments: argparse.Namespace) -> None:
    """Checks, then the work with the output held."""
    session.begin(arguments)
    if arguments.output is None and not arguments.dry_run:
        raise UsageError("output: expected a directory to write (-o DIR), or --dry-run, got neither")
    if arguments.scores:
        _check_with_scores(arguments)
    measured = Measured(*load_measured(arguments.scores)) if arguments.scores else None
    recipe = _recipe(arguments, measured)
    recipe.check()
    session.check_scoring(arguments, recipe, text_is_read=measured is None or "calibration" in vars(arguments))
    evaluation = None if arguments.no_eval else session.evaluation_of(arguments)
    if arguments.dry_run:
        dry_run(arguments, recipe, None if measured is None else measured.scores)
        return
    if is_cut_from_files(arguments, recipe, measured):
        assert measured is not None
        _from_files(arguments, recipe, measured)
        return
    share = streaming.sharing(arguments, recipe) if measured is None else None
    if share is not None:
        share.refuse_to_cut()
    with ExitStack() as stack:
        if launched.is_first():
            least = _least_bytes(arguments, recipe)
            stack.enter_context(session.claimed(arguments, in_place=arguments.in_place, least=least))
        if share is None:
            model, tokenizer = session.load_model(arguments)
            session.proven(model)
        else:
            with share.joined() as ranks:
                model, tokenizer = share.load(arguments)
                measured = share.measured(arguments, model, tokenizer, recipe, ranks)
            if not launched.is_first():
                return  # the rest is the first process's
            launched.go_on_alone()
            console.print_streaming(measured.scores.record)
        if measured is not None and "calibration" in vars(arguments):
            measured = with_text(measured, model, tokenizer, recipe)
        steps: list[dict[str, Any]] = []
        device = model.get_input_embeddings().weight.device
        recipe = with_resolved_recovery(model, recipe, device)
        if recipe.recover is not None:
            takes = estimate(model, samples=0, recover=recipe.recover, ratio=recipe.ratio or 0.0)
            console.print_recovery_plan(recipe.recover, takes, device.type)

        def when_planned(plan: Plan) -> None:
            steps.extend(history.history(arguments.model, plan))
            console.print_search(plan)
            console.print_plan(plan)
            console.print_history(steps, plan)

        def when_cut(result: Result) -> None:
            console.print_text(result.record)
            console.print_reconstruction(result.plan)
            given = {k: v for k, v in vars(arguments).items() if k != "command"}
            record = {**result.record, "arguments": given, "history": steps}
            where = {"overwrite": arguments.overwrite, "in_place": arguments.in_place}
            saving.save(model, tokenizer, arguments.output, plan=result.plan, record=record, **where)
            if recipe.recover is not None:
                console.say(
                    f"wrote {arguments.output} without its recovery, which comes now; should it be stopped, "
                    f"'hywia recover {arguments.output}' goes on with it"
                )

        def when_recovered(result: Result) -> None:
            console.print_recovery(result.record)
            finish(model, tokenizer, arguments.output, result.record["recovery"])

        result = compress(
            model,
            tokenizer,
            recipe,
            measured=measured,
            evaluation=evaluation,
            when_planned=when_planned,
            when_cut=when_cut,
            when_recovered=when_recovered,
            work=beside(arguments.output),
            backend=arguments.backend,
            engine=arguments.engine,
            memory=arguments.memory,
        )
        if share is not None:
            share.written(arguments)
        before, after = _on_disk(result, arguments)
        console.print_comparison(before, after)
        if "evaluation" in result.record:
            sides = {**result.record["evaluation"], "before": before, "after": after}
            saving.add_to_record(arguments.output, {"evaluation": sides})
        console.say(f"wrote {arguments.output}")
    _report(arguments, result, **({} if before is None else {"before": before, "after": after}))


def _from_files(arguments: argparse.Namespace, recipe: Recipe, measured: Measured) -> None:
    steps: list[dict[str, Any]] = []

    def when_planned(plan: Plan) -> None:
        steps.extend(history.history(arguments.model, plan))
        console.print_plan(plan)
        console.print_history(steps, plan)

    with session.claimed(arguments, in_place=arguments.in_place, least=_least_bytes(arguments, recipe)):
        result = cut_from_files(arguments, recipe, measured, when_planned, steps)
        console.say(f"wrote {arguments.output}")
    _report(arguments, result)


def _report(arguments: argparse.Namespace, result: Result, **sides: Any) -> None:
    plan = saving.plan_record(result.plan)
    content = {"output": arguments.output, "plan": plan, "recipe": result.recipe.to_dict(), **sides}
    console.write_json(arguments.json, content)


def _on_disk(result: Result, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Both measurements, with the bytes that the models take on the disk."""
    if result.before is None or result.after is None:
        return None, None
    sides = []
    for side, source in ((result.before, arguments.model), (result.after, arguments.output)):
        stored = stored_bytes(source)
        sides.append({**side, "bytes": stored} if stored else dict(side))
    return sides[0], sides[1]


def _recipe(arguments: argparse.Namespace, measured: Measured | None) -> Recipe:
    """From the arguments, on top of a recipe file or of what the scores were measured with.

    Raises:
        UsageError: an argument that would have to change what was measured already.
    """
    base = Recipe.read(arguments.recipe) if arguments.recipe else None
    if measured is None:
        return shared.recipe_of(arguments, base)
    given = shared.given_fields(arguments)
    if measured.statistics is None and {"fusion", "order"} & given.keys():
        raise UsageError(
            f"scores: {arguments.scores} holds no statistics (criterion {measured.scores.record.get('criterion')}), "
            "so --fusion and --order cannot be applied"
        )
    known = dict(measured.record.get("recipe", {})) or dict(measured.scores.record)
    scored = {name: known[name] for name in _SCORING if known.get(name) is not None}
    if scored.get("fusion") == LEARNED:
        del scored["fusion"]
    return shared.recipe_of(arguments, dataclasses.replace(base or Recipe(), **scored))


def _check_with_scores(arguments: argparse.Namespace) -> None:
    """Refuse what would have to change the scores; a text for what comes after them may be another."""
    given = shared.given_fields(arguments)
    refused = {"criterion", *(() if "calibration" in given else _OF_TEXT)} & given.keys()
    refused |= {name for name in ("engine", "memory", "weights") if getattr(arguments, name) != "auto"}
    for name in sorted(refused):
        raise UsageError(f"{name}: does not go with --scores, which holds the outcome of an earlier scoring")


def _least_bytes(arguments: argparse.Namespace, recipe: Recipe) -> int:
    """Bytes that the pruned model takes at least, as far as is known before it is loaded."""
    by_kind = recipe.group_ratio
    shares = list(by_kind.values()) if isinstance(by_kind, Mapping) else [recipe.ratio or by_kind or 0.0]
    narrowed = arguments.dtype in ("bfloat16", "float16")
    return originals.least_bytes(originals.inputs(arguments), max(shares), narrowed)
