"""`hywia score` and `prune` of a model larger than its device, or by several processes that torchrun started."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..arch.facts import weight_bytes
from ..checkpoint.loading import load
from ..checkpoint.originals import source_of
from ..checkpoint.skeleton import skeleton
from ..checkpoint.sources import BUNDLED
from ..checkpoint.stored_model import open_stored
from ..compression import Measured, measure
from ..errors import HywiaError, UsageError
from ..evaluation import stored_bytes
from ..recipe import Recipe
from ..scale.launch import launched_ranks
from ..scale.place import Streaming, device_of_rank, place_for
from ..scale.ranks import Ranks, joined
from ..scale.work import beside
from ..settings import STREAMED
from . import console, session

__all__ = ["Sharing", "sharing"]

_WHERE = {"device": "on the device", "host": "in the host's memory", "files": "in their files"}


@dataclass(frozen=True)
class Sharing:
    """How a command's scoring is streamed.

    Attributes:
        device: this process's. place: where the weights stay. shared: a host's processes hold them there together.
        timeout: seconds that processes wait for each other.
    """

    device: torch.device
    place: str
    shared: bool
    timeout: float

    @contextmanager
    def joined(self) -> Iterator[Ranks]:
        """The processes that share the scoring."""
        with joined(self.device, self.timeout) as ranks:
            yield ranks

    def refuse_to_cut(self) -> None:
        """Raise UsageError where the model is not in memory to be cut after it was scored."""
        if self.place != "device":
            raise UsageError(
                f"weights: 'hywia prune' changes a model that is on {self.device}, got weights that stay "
                f"{_WHERE[self.place]}; score it first ('hywia score ... -o SCORES'), then prune it with --scores "
                "SCORES from its files (--cut files), or on a device that holds it (--device cpu)"
            )

    def load(self, arguments: argparse.Namespace) -> tuple[Any, Any]:
        """`(model, tokenizer)`, the weights where they are to stay: loaded, or stored."""
        console.say(f"loading {arguments.model}; its layers' weights stay {_WHERE[self.place]}")
        given: dict[str, Any] = {name: getattr(arguments, name) for name in ("dtype", "trust_remote_code", "revision")}
        if self.place == "files" or self.shared:
            stored = open_stored(arguments.model, **given)
            session.proven(stored.model)
            return stored, stored.tokenizer
        where = str(self.device) if self.place == "device" else "cpu"
        model, tokenizer = load(arguments.model, device=where, **given)
        return session.proven(model), tokenizer

    def measured(
        self, arguments: argparse.Namespace, model: Any, tokenizer: Any, recipe: Recipe, ranks: Ranks
    ) -> Measured:
        """Scores of the model, the same on every process."""
        work = beside(arguments.output) if arguments.output else None
        streaming = Streaming(ranks, self.device, self.place, work)
        return measure(model, tokenizer, recipe, backend=arguments.backend, streaming=streaming)

    def written(self, arguments: argparse.Namespace) -> None:
        """Removes what a stopped run would have gone on from, now that its outcome is written."""
        shutil.rmtree(beside(arguments.output), ignore_errors=True)


def _weight_bytes(arguments: argparse.Namespace) -> int | None:
    """Bytes of a model's weights, by its files or, of a hub model that is not here yet, by its config; None where
    neither says."""
    source = source_of(arguments.model)
    known = None if source is None else stored_bytes(source)
    if known is not None or arguments.model in BUNDLED or (source is not None and source.is_file()):
        return known
    try:
        return weight_bytes(skeleton(arguments.model, revision=arguments.revision))
    except HywiaError:
        return None  # loading says what is wrong


def sharing(arguments: argparse.Namespace, recipe: Recipe) -> Sharing | None:
    """How the scoring that the arguments ask for is streamed; None where it is not: where one process has a device that
    holds the model, and nothing else was asked for.

    Raises:
        UsageError: arguments that do not go together.
    """
    _, size, _ = launched_ranks()
    asked = arguments.memory == STREAMED or arguments.weights != "auto" or size > 1
    if recipe.criterion != "hywia" or not recipe.scored_samples():
        if asked:
            raise UsageError(
                "memory: a streamed or shared scoring goes with --criterion hywia and units inside layers; start this "
                "command in one process, without --memory streamed and --weights"
            )
        return None
    if asked and arguments.memory not in ("auto", STREAMED):
        why = f"{size} processes" if size > 1 else f"--weights {arguments.weights}"
        raise UsageError(f"memory: expected auto or {STREAMED} for {why}, got {arguments.memory}")
    # What works on a model in memory, or in a way of its own, is not changed without being asked.
    plain = arguments.command == "score" and (arguments.memory, arguments.engine, arguments.dtype) == ("auto",) * 3
    if not asked and not plain:
        return None
    device = device_of_rank(arguments.device)
    source = source_of(arguments.model)
    packed = arguments.model in BUNDLED or (source is not None and source.is_file())  # GGUF, which each process loads
    fitting = place_for(_weight_bytes(arguments), device, shared=size > 1 and not packed)
    if not asked and fitting == "device":
        return None
    place = fitting if arguments.weights == "auto" else arguments.weights
    if arguments.engine == "autograd":
        raise UsageError("engine: expected auto or fused for a streamed scoring, got autograd")
    if place != "device" and recipe.calibration is None:
        raise UsageError(
            f"calib: expected a text for a model that does not stay on {device}, which would take too long to write "
            "one; name a file or data set (--calib)"
        )
    return Sharing(device, place, place == "host" and size > 1 and not packed, arguments.rank_timeout)
