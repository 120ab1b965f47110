"""What every command does around its work: progress, the output held, the model loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import arch, ops, progress
from ..checkpoint import atomic_directory, originals
from ..checkpoint.loaded_weights import dequantised
from ..checkpoint.loading import device_named, load
from ..checkpoint.replaceable import check_report
from ..checkpoint.weight_files import weight_bytes_loaded
from ..engine.memory import free_bytes
from ..errors import HywiaError, UsageError
from ..evaluation import Evaluation
from ..method.derivation import prove
from ..method.reading import documents, is_local
from ..recipe import Recipe
from ..scale.launch import launched_ranks
from . import console

__all__ = [
    "begin",
    "check_room",
    "check_scoring",
    "claimed",
    "evaluation_of",
    "load_model",
    "missing_room",
    "proven",
]


def begin(arguments: argparse.Namespace) -> None:
    """Progress on, other people's bars and notices off where nobody watches; refuse a report that has no place."""
    import transformers

    progress.enable(launched_ranks()[0] == 0)
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    check_report("json", arguments.json, inputs=originals.inputs(arguments))


@contextmanager
def claimed(arguments: argparse.Namespace, *, in_place: bool = False, least: int = 0) -> Iterator[None]:
    """Hold the output from before the work to its end; refuses what cannot be written at that end."""
    output, given = Path(arguments.output), originals.inputs(arguments)
    check_report("json", arguments.json, outputs=(output,), inputs=given)
    if arguments.command not in ("prune", "recover"):  # only what these make may take its own model's place
        given = tuple(i._replace(what="model that is read") if i.what == "model" else i for i in given)
    with atomic_directory.claim(output, overwrite=arguments.overwrite, in_place=in_place, inputs=given, need=least):
        yield


def check_scoring(arguments: argparse.Namespace, recipe: Recipe, text_is_read: bool) -> None:
    """What can be refused before a model is loaded and is no matter of the recipe alone.

    Raises:
        UsageError: engine and memory, or a backend, that do not go together. HywiaError: the text cannot be read.
    """
    for name in ("engine", "memory", "weights"):
        if recipe.criterion != "hywia" and getattr(arguments, name) != "auto":
            raise UsageError(f"{name}: goes with --criterion hywia, got --criterion {recipe.criterion}")
    if arguments.engine == "autograd" and arguments.memory == "layerwise":
        raise UsageError("memory: expected auto, fast or lean with --engine autograd, got layerwise")
    if arguments.backend is not None:
        ops.require(arguments.backend)
    if text_is_read and recipe.calibration is not None and is_local(recipe.calibration):
        documents(recipe.calibration, field=recipe.text_field)


def evaluation_of(arguments: argparse.Namespace) -> Evaluation:
    """What the evaluation's arguments ask for; its text is read now.

    Raises:
        UsageError, HywiaError: as `Evaluation.content`.
    """
    evaluation = Evaluation(
        text=arguments.text,
        field=getattr(arguments, "text_field", "text"),
        block=arguments.block,
        max_blocks=arguments.max_blocks,
        bos=getattr(arguments, "bos", None),
        prompt=getattr(arguments, "prompt", None),
    )
    assert evaluation.content
    return evaluation


def missing_room(name: str, dtype: str, device: Any) -> str | None:
    """Why a model of this name cannot be in a device's memory, as a clause; None where it can, or where what it takes
    is not known yet.

    Args:
        name: the model's. dtype: as `load` takes it. device: a torch device.
    """
    folder = originals.source_of(name)
    if folder is None or not folder.is_dir():
        return None
    with suppress(HywiaError):  # loading says what is wrong with it
        need, free = weight_bytes_loaded(folder, dtype), free_bytes(device)
        if need > free:
            return f"its weights take {need / 1e9:,.2f} GB, and {device} has {free / 1e9:,.2f} GB free"
    return None


def check_room(arguments: argparse.Namespace, name: str, what: str) -> None:
    """Raise HywiaError where a model does not fit in the memory that `what` (work, in words) needs it in."""
    missing = missing_room(name, arguments.dtype, device_named(arguments.device))
    if missing is not None:
        raise HywiaError(
            f"model: {what} needs all of {name} in memory: {missing}; use a device that holds it (--device), or half "
            "the bytes where it is stored in float32 (--dtype bfloat16)"
        )


def load_model(arguments: argparse.Namespace, *, quantised: bool = False) -> tuple[Any, Any]:
    """`(model, tokenizer)`; says what is left alone of a model with vision."""
    console.say(f"loading {arguments.model}")
    model, tokenizer = load(
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
        quantised=quantised,
        revision=arguments.revision,
    )
    method = dequantised(model)
    if method not in (None, "gguf"):
        console.say(f"the checkpoint is quantised ({method}); dequantised to {_dtype(model)}, in which it is written")
    if not quantised and arch.is_known(model):
        _say_left_alone(model)
    return model, tokenizer


def _dtype(model: Any) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _say_left_alone(model: Any) -> None:
    others = arch.left_alone(model)
    if others:
        console.say(f"left alone, being no part of the language decoder: {', '.join(others)}")


def proven(model: Any) -> Any:
    """The model; where the table of architectures lacks its type, what is derived of it is proven and printed first."""
    proof = prove(model)
    if proof is not None:
        console.print_proof(proof)
        _say_left_alone(model)
    return model
