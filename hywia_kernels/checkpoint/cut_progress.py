"""What a cut from files to files that was stopped goes on from: which tensors are written, and what comes next.

Beside the directory that is being written, in its target's workspace, `progress-INODE` says of the directory of that
inode what it holds already: `state.json`, and in `hidden-00031.safetensors` the hidden states that enter layer 31.
Both are renamed into place once the weights that they speak of are on the disk, so a state that is there is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import HywiaError
from . import disk
from .workspace import STATE, Claim, progress_of

__all__ = ["CutProgress"]

_SHARE = 0.1  # of the time, at the most, that goes into states


class CutProgress:
    """The states of one cut.

    Args:
        held: the target, which this process has taken. request: whatever must be the same for a cut to go on; JSON.
        every: seconds between two states, or more where a state takes long. Shorter cuts write none. 0: whenever one
            can be kept.

    Attributes:
        state: that a stopped cut left; empty where there is none.
    """

    def __init__(self, held: Claim, request: Mapping[str, Any], every: float) -> None:
        self.every = every
        self._request = hashlib.sha256(json.dumps(dict(request), sort_keys=True).encode()).hexdigest()
        self._last, self._cost, self._kept = time.monotonic(), 0.0, False
        self._held, self._folder, self._directory = held, held.workspace, held.new
        self.state: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            self._folder = progress_of(held, held.kept)
            state = json.loads((self._folder / STATE).read_text(encoding="utf-8"))
            if state.pop("request") == self._request:
                self.state, self._kept = state, True

    def begin(self, folder: Path) -> None:
        """The directory is there, empty or as the stopped cut left it."""
        self._directory, self._folder = folder, progress_of(self._held, folder)

    def due(self) -> bool:
        """Whether it is time for another state."""
        pause = max(self.every, self._cost / _SHARE) if self.every else 0.0
        return time.monotonic() - self._last >= pause

    def keep(self, facts: Mapping[str, Any], hidden: Mapping[str, Tensor] | None = None, layer: int = 0) -> None:
        """Keeps a state.

        Args:
            facts: what a later cut must know; JSON. hidden: states that enter `layer`.

        Raises:
            OSError: the disk refuses; the state before is still there.
        """
        began = time.monotonic()
        for file in self._directory.glob("*.safetensors"):
            disk.sync_file(file)
        self._folder.mkdir(exist_ok=True)
        name = _hidden(layer)
        if hidden is not None:
            beside = self._folder / f".{name}.partial"
            with disk.refusals(f"output: cannot write {beside}"):
                save_file(dict(hidden), beside)
            disk.sync_file(beside)
            os.replace(beside, self._folder / name)
        beside = self._folder / f".{STATE}.partial"
        beside.write_text(json.dumps({**facts, "request": self._request}), encoding="utf-8")
        disk.sync_file(beside)
        os.replace(beside, self._folder / STATE)
        for old in self._folder.glob("hidden-*"):
            if hidden is None or old.name != name:
                old.unlink(missing_ok=True)
        self._kept = True
        self._last = time.monotonic()
        self._cost = self._last - began

    def hidden(self, layer: int) -> dict[str, Tensor]:
        """The hidden states that enter a layer, as they were kept."""
        file = self._folder / _hidden(layer)
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise HywiaError(f"output: {file} is damaged ({error}); remove {self._held.workspace}") from error

    def forget(self) -> None:
        """What is written is of no use to a later cut."""
        self._kept = False
        disk.remove(self._folder / STATE)

    def told(self, error: HywiaError) -> HywiaError:
        """The error that ended the cut, with what is left to go on from."""
        if not self._kept or self._held.is_written():
            return error
        return HywiaError(
            f"{error}; what was finished is kept in {self._held.workspace}, and the same command goes on from there"
        )


def _hidden(layer: int) -> str:
    return f"hidden-{layer:05d}.safetensors"
