"""`hywia eval`: perplexity, size and speed of a model."""

from __future__ import annotations

import argparse

from . import console, session

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Checks, then the evaluation."""
    session.begin(arguments)
    evaluation = session.evaluation_of(arguments)
    session.check_room(arguments, arguments.model, "an evaluation")
    model, tokenizer = session.load_model(arguments, quantised=True)
    evaluation.check(model, tokenizer)
    measured = evaluation.measure(model, tokenizer, arguments.model)
    console.print_evaluation(measured)
    console.write_json(arguments.json, measured)
