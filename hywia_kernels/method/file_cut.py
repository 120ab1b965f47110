"""A cut from files to files that is under way: parameters are read, cut and written a few at a time."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import arch, progress
from ..arch.facts import weight_bytes
from ..checkpoint import atomic_directory
from ..checkpoint.cut_directory import CutDirectory
from ..checkpoint.cut_progress import CutProgress
from ..checkpoint.replaceable import Input
from ..checkpoint.stored_model import StoredModel
from ..checkpoint.stored_parameters import Bundle, read_ahead
from ..errors import HywiaError
from ..types import Group, Plan
from ..versions import versions
from .compaction import ParameterCuts
from .derivation import prove
from .surgery import check_fingerprint, cut_structure

__all__ = ["FileCut", "opened"]

_WORKERS = 4  # tensors that are read, cut and written at once, at the most


class FileCut:
    """A cut from files to files that is under way.

    Attributes:
        directory: that is written. groups: that stay. progress: what a stopped cut goes on from.
        checksums: of the parameters of bundles that are written, before the cut.
        facts: of a reconstruction, for a later cut to go on from; JSON.
    """

    def __init__(
        self,
        stored: StoredModel,
        directory: CutDirectory,
        groups: Sequence[Group],
        cuts: ParameterCuts,
        progress: CutProgress,
    ) -> None:
        self.stored, self.directory, self.groups, self.cuts = stored, directory, groups, cuts
        self.progress = progress
        self.checksums: dict[str, int] = dict(progress.state.get("checksums", {}))
        self.facts: dict[str, Any] = {}

    def keep(self, hidden: Mapping[str, Tensor] | None = None, layer: int = 0) -> None:
        """Keep what is written, and the hidden states that enter `layer`, for a later cut to go on from."""
        facts = {"written": self.directory.written, "checksums": self.checksums, **self.facts}
        self.progress.keep(facts, hidden, layer)

    def check(self, plan: Plan, checksums: Mapping[str, int]) -> None:
        """Raise HywiaError, and keep nothing, where the files are not those that the plan was made for.

        Args:
            checksums: of all parameters.
        """
        try:
            check_fingerprint(plan, self.stored.fingerprint(checksums))
        except HywiaError:
            self.progress.forget()
            raise

    def _is_written(self, bundle: Bundle) -> bool:
        names = self.stored.names
        return all(names[name] in self.checksums for name in bundle.targets if name in names)

    def write(self, bundles: Sequence[Bundle], what: str) -> None:
        """Read, cut and write bundles, some at a time; those that an earlier cut has written are left out."""
        bundles = [bundle for bundle in bundles if not self._is_written(bundle)]
        workers = min(_WORKERS, os.cpu_count() or 1)
        read_ahead(bundles[:workers])
        with ThreadPoolExecutor(workers) as pool:
            waiting = [pool.submit(self._one, b, bundles[i + workers :][:1]) for i, b in enumerate(bundles)]
            try:
                for future in progress.track(waiting, what):
                    self.checksums |= future.result()
                    if self.progress.due():
                        self.keep()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    @torch.no_grad()
    def _one(self, bundle: Bundle, later: Sequence[Bundle]) -> dict[str, int]:
        read_ahead(later)
        values = self.stored.read(bundle)
        sums = self.stored.checksums(values)
        self.write_values(values)
        return sums

    @torch.no_grad()
    def write_values(self, values: dict[str, Tensor]) -> None:
        """Cut and write the parameters of a bundle, which is emptied.

        Args:
            values: name -> values before the cut.
        """
        self.directory.write({name: self.cuts.of(name, values.pop(name)) for name in list(values)})


@contextmanager
def opened(
    stored: StoredModel,
    plan: Plan,
    path: str | Path,
    *,
    overwrite: bool,
    in_place: bool,
    backend: str | None,
    request: Mapping[str, Any],
    every: float,
) -> Iterator[FileCut]:
    """The cut of a model into the directory `path`, which appears when the block ends. A cut that is stopped and was
    asked for the same goes on from its last state.

    Args:
        request: whatever decides what is written, beside the model's files and the plan; JSON.
        every: seconds between two states.

    Raises:
        UsageError, HywiaError: the plan is not for a model of this structure, or the directory cannot be written.
    """
    prove(stored.model)
    cut = copy.deepcopy(stored.model)
    groups = cut_structure(cut, plan)
    given: dict[str, Any] = {
        "overwrite": overwrite,
        "in_place": in_place,
        "inputs": (Input("model", stored.folder),),
        "need": max(0, weight_bytes(cut) - atomic_directory.kept_bytes(path)),
    }
    cuts = ParameterCuts(arch.architecture(stored.model), groups, plan.keep, backend)
    renamed = _renaming(stored.model, plan)
    with atomic_directory.claim(path, **given) as held:
        states = CutProgress(held, {**request, "backend": backend, **_asked(stored, plan)}, every)
        try:
            with atomic_directory.directory(path, **given, goes_on=bool(states.state)) as folder:
                states.begin(folder)
                written = states.state.get("written")
                directory = CutDirectory(stored, cut, renamed, folder, stored.bundles, written)
                yield FileCut(stored, directory, groups, cuts, states)
        except HywiaError as error:
            told = states.told(error)
            if told is error:
                raise
            raise told from error


def _asked(stored: StoredModel, plan: Plan) -> dict[str, Any]:
    """What of the model's files and the plan decides what is written."""
    kept = hashlib.sha256()
    for name, units in sorted(plan.keep.items()):
        kept.update(f"{name} {units.tolist()}".encode())
    files = {source.file for bundle in stored.bundles for source in bundle.sources.values()}
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return {
        "files": states,
        "dtype": str(stored.model.dtype),
        "plan": [kept.hexdigest(), plan.fingerprint, None if plan.depth is None else list(plan.depth.keep)],
        "versions": versions(),
    }


def _renaming(model: Any, plan: Plan) -> Callable[[str], str | None]:
    """Name of a parameter -> its name once layers have gone; None for those of such layers."""
    if plan.depth is None:
        return lambda name: name
    path = f"{arch.architecture(model).layers}."
    places = {old: new for new, old in enumerate(plan.depth.keep)}

    def renamed(name: str) -> str | None:
        if not name.startswith(path):
            return name
        layer, _, rest = name.removeprefix(path).partition(".")
        return f"{path}{places[int(layer)]}.{rest}" if int(layer) in places else None

    return renamed
