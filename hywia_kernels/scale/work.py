"""What a stopped scoring goes on from: finished layers' sums, and the gradients that go on to the layer below.

A folder of one request: `layer-00031.safetensors` has a layer's sums over all samples;
`gradient-00031-00002.safetensors` the loss's gradient at what entered that layer, of run 2; `state.json` says from
where to go on. Each is renamed into place, in this order, so a state that is there is complete. Gradients are by run,
so another number of processes can go on with them; hosts that share the work must see the same folder.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoint import disk
from ..errors import HywiaError
from ..settings import STATE_SECONDS
from .ranks import Ranks

__all__ = ["Work", "beside"]

_STATE, _REQUEST = "state.json", "request.json"


def beside(output: str | Path) -> Path:
    """Where a scoring keeps its state: beside what it writes, hidden."""
    path = Path(output).absolute()
    return path.parent / f".{path.name}.hywia-scoring"


class Work:
    """The folder of one request, which all processes read and rank 0 alone changes, but for gradients. Without a folder
    that all of them see (`folder` is None then) nothing is kept.

    Args:
        request: whatever must be the same for a run to go on; JSON.
    """

    def __init__(
        self, folder: Path | None, request: Mapping[str, Any], ranks: Ranks, every: float = STATE_SECONDS
    ) -> None:
        self.folder, self.ranks, self.every = folder, ranks, every
        self._request = json.dumps(dict(request), sort_keys=True)
        self._began = self._last = time.monotonic()
        self.state: dict[str, Any] = {}
        if folder is None:
            return
        if ranks.speaks:
            with disk.refusals(f"work: cannot write {folder}"):
                self._open(folder)
        self.state = ranks.tell(self.state, "the work folder")[0]
        if not all(ranks.tell(self._is_seen(folder), "the look at the work folder")):
            if ranks.speaks:
                shutil.rmtree(folder, ignore_errors=True)
            self.folder, self.state = None, {}

    def _is_seen(self, folder: Path) -> bool:
        """Whether this process sees the folder that rank 0 has made."""
        try:
            return (folder / _REQUEST).read_text(encoding="utf-8") == self._request
        except OSError:
            return False

    def _open(self, folder: Path) -> None:
        try:
            before = (folder / _REQUEST).read_text(encoding="utf-8")
        except (OSError, ValueError):
            before = None
        if before != self._request:
            if before is not None:
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._write(_REQUEST, self._request)
        with suppress(OSError, ValueError):
            state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            layers = range(state["layer"], state["layers"])
            runs = range(state["runs"]) if state["layer"] else range(0)
            names = [*map(_layer, layers), *(_gradient(state["layer"], run) for run in runs)]
            if all((folder / name).is_file() for name in names):
                self.state = state

    def due(self, layer: int) -> bool:
        """Whether it is time for another state, now that a layer is finished. A run that is worth one has one of its
        end, too."""
        since = self._last if layer else self._began
        return self.folder is not None and time.monotonic() - since >= self.every

    def keep_layer(self, layer: int, total: Tensor) -> None:
        """Keeps the sums of a finished layer, float64 on the CPU."""
        if self.folder is not None and self.ranks.speaks:
            self._save(_layer(layer), {"sums": total})

    def keep_state(self, layer: int, gradients: Mapping[int, Tensor], facts: Mapping[str, Any]) -> None:
        """Keeps all that the layers below need; every process calls it.

        Args:
            layer: the last one that is finished. gradients: of this process's runs, by run, at what entered it.
            facts: what a later run must know.
        """
        assert self.folder is not None
        if layer:
            for run, gradient in gradients.items():
                self._save(_gradient(layer, run), {"gradient": gradient.detach().cpu().contiguous()})
        self.ranks.meet(f"the state after layer {layer}")
        if self.ranks.speaks:
            self._write(_STATE, json.dumps({**facts, "layer": layer}))
            for old in self.folder.glob("gradient-*"):
                if not old.name.startswith(f"gradient-{layer:05d}-"):
                    old.unlink(missing_ok=True)
        self._last = time.monotonic()

    def sums(self, layer: int) -> Tensor:
        """The sums of a finished layer."""
        return self._load(_layer(layer))["sums"]

    def gradient(self, layer: int, run: int, device: torch.device) -> Tensor:
        """What goes on to the layer below."""
        return self._load(_gradient(layer, run))["gradient"].to(device)

    def forget(self) -> None:
        """Begins anew."""
        self.state = {}
        self._last = time.monotonic()
        if self.folder is not None and self.ranks.speaks:
            (self.folder / _STATE).unlink(missing_ok=True)

    def done(self) -> None:
        """Removes the folder; what it was for is written."""
        if self.folder is not None and self.ranks.speaks:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, name: str, text: str) -> None:
        assert self.folder is not None
        beside = self.folder / f".{name}.partial"
        with disk.refusals(f"work: cannot write {self.folder}"):
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, self.folder / name)

    def _save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        assert self.folder is not None
        beside = self.folder / f".{name}.partial"
        with disk.refusals(f"work: cannot write {self.folder}"):
            try:
                save_file(dict(tensors), beside)
            except SafetensorError as error:  # which has the disk's words in its own
                raise OSError(str(error)) from error
            os.replace(beside, self.folder / name)

    def _load(self, name: str) -> Mapping[str, Tensor]:
        assert self.folder is not None
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError, KeyError) as error:
            raise HywiaError(f"work: {self.folder / name} is damaged ({error}); remove {self.folder}") from error


def _layer(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"


def _gradient(layer: int, run: int) -> str:
    return f"gradient-{layer:05d}-{run:05d}.safetensors"
