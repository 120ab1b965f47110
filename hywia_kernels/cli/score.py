"""`hywia score`: measure a model once, and keep what was measured."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from ..checkpoint.scores_file import save_scores
from ..compression import measure
from ..scale.ranks import Ranks
from . import arguments as shared
from . import console, session, streaming

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Checks, then the work with the output held."""
    session.begin(arguments)
    recipe = shared.recipe_of(arguments)
    recipe.check(scoring_only=True)
    session.check_scoring(arguments, recipe, text_is_read=True)
    output, share = Path(arguments.output), streaming.sharing(arguments, recipe)
    with ExitStack() as stack:
        ranks = Ranks() if share is None else stack.enter_context(share.joined())
        if ranks.speaks:
            stack.enter_context(session.claimed(arguments))
        if share is None:
            model, tokenizer = session.load_model(arguments)
            session.proven(model)
            measured = measure(
                model, tokenizer, recipe, backend=arguments.backend, engine=arguments.engine, memory=arguments.memory
            )
        else:
            model, tokenizer = share.load(arguments)
            measured = share.measured(arguments, model, tokenizer, recipe, ranks)
        if not ranks.speaks:
            return
        console.print_text(measured.record)
        save_scores(
            output,
            measured.scores,
            measured.statistics,
            tokens=measured.tokens,
            record=measured.record,
            overwrite=arguments.overwrite,
        )
        if share is not None:
            share.written(arguments)
    scores = measured.scores
    console.say(f"wrote {output}: {len(scores.groups)} groups, {sum(g.units for g in scores.groups)} units")
    console.print_streaming(scores.record)
    console.write_json(arguments.json, {"output": str(output), "scores": dict(scores.record), **measured.record})
