"""Where layers' weights are read from: the host's memory, or a checkpoint's files, where they lie."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoint.stored_model import StoredModel
from ..checkpoint.stored_parameters import Bundle, merged, read_ahead
from .weights import Table

__all__ = ["FileWeights", "Pinned", "Source", "Views", "flat_offsets"]

_ALIGN = 256  # bytes: where a tensor begins among a layer's
_LARGE = 1 << 20  # bytes of a tensor that has pages of its own
_MOST = 0.9  # of the weights' bytes, from which on copies need no pinned buffer of their own


class Source(Protocol):
    """Layers' weights as tensors in the host's memory."""

    pinned: bool  # whether a CUDA device can copy from it while the host goes on

    def tensors(self, table: Table) -> Sequence[Tensor]:
        """A layer's, in the table's order."""
        ...

    def coming(self, table: Table) -> None:
        """Says that a layer will be asked for soon."""
        ...

    def close(self) -> None:
        """Gives back what was taken to read them."""
        ...


def flat_offsets(table: Table) -> tuple[list[int], int]:
    """Where each of a layer's parameters begins in one buffer, in bytes, and the buffer's size."""
    offsets, end = [], 0
    for p in table.originals:
        offsets.append(end)
        end += -(-p.numel() * p.element_size() // _ALIGN) * _ALIGN
    return offsets, end


class Pinned:
    """A loaded model's layers where they are in the host's memory, pinned there where the device is CUDA's and the
    system allows it: their memory is neither moved nor rounded up, as torch's own pinned allocator would."""

    def __init__(self, tables: Sequence[Table], device: torch.device) -> None:
        self._registered: list[int] = []
        self.pinned = True
        if device.type != "cuda":
            return
        whole = registered = 0
        failed = False
        register: Any = torch.cuda.cudart().cudaHostRegister
        for p in (p for table in tables for p in table.originals):
            size = p.numel() * p.element_size()
            whole += size
            if size < _LARGE:  # shares its pages with others, which cannot be pinned twice
                continue
            if int(register(p.data_ptr(), size, 0)) == 0:
                self._registered.append(p.data_ptr())
                registered += size
            else:
                failed = True
        if failed:
            with suppress(RuntimeError):  # CUDA keeps the refusal for whoever asks next
                torch.zeros(1, device=device)
        self.pinned = registered >= _MOST * whole

    def close(self) -> None:
        for pointer in self._registered:
            torch.cuda.cudart().cudaHostUnregister(pointer)
        self._registered = []

    def tensors(self, table: Table) -> Sequence[Tensor]:
        return [p.detach() for p in table.originals]

    def coming(self, table: Table) -> None:
        pass


class FileWeights:
    """A stored model's layers, read where they lie: a tensor is a view of the mapped file, whose pages are the system's
    to keep or to drop, unless loading converts it (stacked experts, another dtype)."""

    pinned = False

    def __init__(self, model: StoredModel) -> None:
        self._model = model
        self._bundles = {model.names[t]: bundle for bundle in model.bundles for t in bundle.targets if t in model.names}
        self._of: dict[tuple[str, ...], Bundle] = {}

    def _bundle(self, table: Table) -> Bundle:
        if table.names not in self._of:
            found = {id(bundle): bundle for bundle in (self._bundles[self._model.names[n]] for n in table.names)}
            self._of[table.names] = merged(found.values())
        return self._of[table.names]

    def tensors(self, table: Table) -> Sequence[Tensor]:
        read = self._model.read(self._bundle(table))
        return [read[self._model.names[name]] for name in table.names]

    def coming(self, table: Table) -> None:
        read_ahead([self._bundle(table)])

    def close(self) -> None:
        pass


class Views:
    """Weights that the CPU works on where they lie in their files: nothing is copied."""

    place, together = "files", False

    def __init__(self, tables: Sequence[Table], source: FileWeights) -> None:
        self.tables, self.source = tables, source
        self.moved, self.waited = 0, 0.0

    def sweep(self, order: Sequence[int]) -> Generator[int, None, None]:
        for at, i in enumerate(order):
            table = self.tables[i]
            if at + 1 < len(order):
                self.source.coming(self.tables[order[at + 1]])
            began = time.monotonic()
            table.put(self.source.tensors(table))
            self.waited += time.monotonic() - began
            self.moved += table.bytes
            try:
                yield i
            finally:
                table.put_back()

    def close(self) -> None:
        pass
