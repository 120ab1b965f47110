"""`hywia prune` of a model that stays in its files: whether it is to, and the work."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint.loading import device_named
from ..checkpoint.stored_model import open_stored
from ..compression import Measured, Result, compress_files, in_memory_only, with_text
from ..compression.from_files import said
from ..errors import HywiaError, UsageError
from ..recipe import Recipe
from ..types import Plan
from . import console, session

__all__ = ["cut_from_files", "is_cut_from_files"]


def is_cut_from_files(arguments: argparse.Namespace, recipe: Recipe, measured: Measured | None) -> bool:
    """Whether the plan is to be carried out from file to file: if that was asked for, or the model does not fit.

    Raises:
        UsageError: files were asked for without scores, or with what needs the model in memory. HywiaError: the model
            does not fit, and something needs it in memory; the message says how to leave that out.
    """
    if arguments.cut == "memory":
        return False
    if measured is None:
        if arguments.cut == "files":
            raise UsageError("cut: files goes with --scores, which 'hywia score' writes")
        return False
    device = device_named(arguments.device)
    does_not_fit = session.missing_room(arguments.model, arguments.dtype, device)
    if arguments.cut == "auto" and does_not_fit is None:
        return False
    needs = in_memory_only(recipe.resolved(device.type), measured)
    if not arguments.no_eval:
        needs["the evaluation"] = "--no-eval; 'hywia eval' measures each model where it fits"
    if needs and arguments.cut == "files":
        raise UsageError(f"cut: expected memory, or nothing that needs the model there, got files and {said(needs)}")
    if needs:
        raise HywiaError(
            f"model: {does_not_fit}; it can be cut from its files, which these cannot be done from: {said(needs)}"
        )
    return True


def cut_from_files(
    arguments: argparse.Namespace,
    recipe: Recipe,
    measured: Measured,
    when_planned: Callable[[Plan], None],
    steps: list[dict[str, Any]],
) -> Result:
    """The work, with the output held.

    Args:
        when_planned: called with the plan. steps: the cuts that came before, which it fills.
    """
    device = device_named(arguments.device)
    console.say(f"cutting {arguments.model} from its files")
    stored = open_stored(
        arguments.model,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
        revision=arguments.revision,
    )
    session.proven(stored.model)
    if "calibration" in vars(arguments):
        measured = with_text(measured, stored.model, stored.tokenizer, recipe, device)
    given = {k: v for k, v in vars(arguments).items() if k != "command"}
    result = compress_files(
        stored,
        recipe,
        Path(arguments.output),
        measured=measured,
        more={"arguments": given, "history": steps},
        when_planned=when_planned,
        device=arguments.device,
        overwrite=arguments.overwrite,
        in_place=arguments.in_place,
        backend=arguments.backend,
    )
    console.print_text(result.record)
    console.print_reconstruction(result.plan)
    return result
