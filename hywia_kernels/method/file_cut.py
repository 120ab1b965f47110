"""A cut from files to files that is under way: parameters are read, cut and written a few at a time."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
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
from ..checkpoint.replaceable import Input
from ..checkpoint.stored_model import StoredModel
from ..checkpoint.stored_parameters import Bundle, read_ahead
from ..types import Group, Plan
from .compaction import ParameterCuts
from .derivation import prove
from .surgery import cut_structure

__all__ = ["FileCut", "opened"]

_WORKERS = 4  # tensors that are read, cut and written at once, at the most


class FileCut:
    """A cut from files to files that is under way.

    Attributes:
        directory: that is written. groups: that stay. checksums: of the parameters read so far, before the cut.
    """

    def __init__(
        self, stored: StoredModel, directory: CutDirectory, groups: Sequence[Group], cuts: ParameterCuts
    ) -> None:
        self.stored, self.directory, self.groups, self.cuts = stored, directory, groups, cuts
        self.checksums: dict[str, int] = {}

    def write(self, bundles: Sequence[Bundle], what: str) -> None:
        """Read, cut and write bundles, some at a time."""
        workers = min(_WORKERS, os.cpu_count() or 1)
        read_ahead(bundles[:workers])
        with ThreadPoolExecutor(workers) as pool:
            waiting = [pool.submit(self._one, b, bundles[i + workers :][:1]) for i, b in enumerate(bundles)]
            try:
                for future in progress.track(waiting, what):
                    self.checksums |= future.result()
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
    stored: StoredModel, plan: Plan, path: str | Path, *, overwrite: bool, in_place: bool, backend: str | None
) -> Iterator[FileCut]:
    """The cut of a model into the directory `path`, which appears when the block ends.

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
        "need": weight_bytes(cut),
    }
    with atomic_directory.claim(path, **given), atomic_directory.directory(path, **given) as folder:
        directory = CutDirectory(stored, cut, _renaming(stored.model, plan), folder, stored.bundles)
        yield FileCut(
            stored, directory, groups, ParameterCuts(arch.architecture(stored.model), groups, plan.keep, backend)
        )


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
