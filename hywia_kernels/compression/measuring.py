"""What is known of a model before anything is decided: text, statistics and scores."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..arch import architecture
from ..arch.facts import count_parameters
from ..checkpoint.stored_model import StoredModel
from ..errors import HywiaError, UsageError
from ..method.calibration_data import calibration
from ..method.criteria import score, unscored
from ..method.derivation import prove
from ..method.scores import fuse
from ..method.statistics import calibrate
from ..method.tokens import digest, prefix
from ..recipe import Recipe
from ..scale.job import calibrate_streamed
from ..scale.place import Streaming
from ..settings import BLEND, LEARNED, ORDERS
from ..types import Scores, Statistics

__all__ = ["Clock", "Measured", "device_of", "first_samples", "fused", "measure", "measured_with", "with_text"]


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


class Clock:
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


def _network(model: Any) -> Any:
    """The modules of a loaded or a stored model."""
    return model.model if isinstance(model, StoredModel) else model


def device_of(model: Any) -> torch.device:
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
    origin = recipe.calibration or "written by the model"
    facts = {"calib": origin, "seed": recipe.seed, "bos": bool(prefix(tokenizer, recipe.bos)), "samples": len(tokens)}
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
    streaming: Streaming | None = None,
) -> Measured:
    """Text, statistics and scores of a model as a recipe asks for them; the model is left as it was.

    Args:
        model, tokenizer: as `load` gives them; with `streaming`, the model may be what `open_stored` gave.
        recipe: what is not about scoring may be missing from it.
        tokens: int64 `[samples, seq_len]`, text at hand already, instead of the recipe's.
        backend, engine, memory: see `calibrate`; they change time and memory, not the meaning.
        streaming: score with one layer's weights at a time, and share that among processes, as `calibrate_streamed`
            does; engine and memory are not read then.

    Raises:
        UsageError: the recipe contradicts itself. HywiaError: the text is too short, or as `calibrate`.
    """
    recipe.check(scoring_only=True)
    prove(_network(model))
    device = device_of(model) if streaming is None else streaming.device
    asked, recipe = recipe.reconstruct_samples, fitted(_network(model), recipe, device)
    return measured_with(model, tokenizer, recipe, asked, tokens, Clock(device), backend, engine, memory, streaming)


def fitted(model: Any, recipe: Recipe, device: torch.device) -> Recipe:
    """The resolved recipe, by the model's size, by where it will run, and by what can be done to it: of some models no
    layer runs by itself (`Architecture.together`).

    Raises:
        UsageError: it asks for what runs layers one at a time.
    """
    parameters = count_parameters(model)
    if not architecture(model).together:
        return recipe.resolved(device.type, parameters)
    alone: dict[str, Any] = {"reconstruct": False, "search": "none", "head_ranking": "scores"}
    for name, value in alone.items():
        if getattr(recipe, name) not in (None, value):
            raise UsageError(
                f"{name}: expected {value!r} for a model whose layers hand on more than hidden states, so that none of "
                f"them runs by itself, got {getattr(recipe, name)!r}; leave it out"
            )
    return replace(recipe, **alone).resolved(device.type, parameters)


def measured_with(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    asked: int | None,
    tokens: Tensor | None,
    clock: Clock,
    backend: str | None,
    engine: str,
    memory: str,
    streaming: Streaming | None = None,
    orders: Sequence[str] = ORDERS,
) -> Measured:
    text: dict[str, Any] = {}
    with clock.time("text"):
        if tokens is None:
            tokens, text = _read(_network(model), tokenizer, recipe, asked)
    record: dict[str, Any] = {"recipe": recipe.to_dict(), "text": text}
    with clock.time("scoring"):
        if recipe.criterion != "hywia":
            scores = score(model, criterion=recipe.criterion, seed=recipe.seed, backend=backend)
            return Measured(scores, None, tokens, record)
        assert tokens is not None
        if not recipe.scored_samples():
            return Measured(unscored(_network(model)), None, tokens, record)
        scored = first_samples(tokens, recipe.samples, "scoring")
        if streaming is None:
            statistics = calibrate(model, scored, backend=backend, engine=engine, memory=memory, orders=orders)
        else:
            statistics = _streamed(model, scored, recipe, streaming, backend)
    origin = {k: text[k] for k in ("calib", "seed", "bos") if k in text} | {"tokens": scored.numel()}
    statistics = replace(statistics, record={**statistics.record, **origin}, known_finite=True)
    return Measured(fused(statistics, recipe), statistics, tokens, record)


def _streamed(model: Any, scored: Tensor, recipe: Recipe, streaming: Streaming, backend: str | None) -> Statistics:
    return calibrate_streamed(
        model,
        scored,
        orders=(recipe.order,),
        device=streaming.device,
        weights=streaming.weights,
        ranks=streaming.ranks,
        backend=backend,
        work=streaming.work,
        keep_work=True,
        asked={f"recipe: {name}": json.dumps(value) for name, value in recipe.to_dict().items()},
    )


def fused(statistics: Statistics, recipe: Recipe) -> Scores:
    """Mask learning starts from attention's scores."""
    return fuse(statistics, BLEND if recipe.fusion == LEARNED else recipe.fusion, recipe.order)


def first_samples(tokens: Tensor | None, samples: int, what: str) -> Tensor:
    held = 0 if tokens is None else len(tokens)
    if tokens is None or held < samples:
        raise HywiaError(
            f"text: {what} needs {samples} samples, {held} are at hand; score again with more text, or name the text "
            "(--calib)"
        )
    return tokens[:samples]


def with_text(
    measured: Measured, model: Any, tokenizer: Any, recipe: Recipe, device: torch.device | None = None
) -> Measured:
    """The same scores with the recipe's text for what comes after scoring.

    Args:
        device: where the model will run; None: where it is.

    Raises:
        HywiaError: as `measure`.
    """
    asked, recipe = recipe.reconstruct_samples, fitted(model, recipe, device or device_of(model))
    tokens, text = _read(model, tokenizer, recipe, asked)
    return replace(measured, tokens=tokens, record={**measured.record, "text": text})
