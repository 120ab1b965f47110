"""Where layers' weights are read from: the host's memory, or a checkpoint's files, where they lie."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoint.file_kinds import read_header
from ..checkpoint.weight_files import Stored, read_ahead
from .weights import Table

__all__ = ["Pinned", "Place", "Source", "StoredWeights", "Views", "flat_offsets", "places_of"]

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


@dataclass(frozen=True)
class Place:
    """A tensor of a safetensors file.

    Attributes:
        file: its path. name: in the file. start, end: of its bytes in the file.
    """

    file: Path
    name: str
    start: int
    end: int


def places_of(tensors: Mapping[str, Stored], names: Iterable[str]) -> dict[str, Place]:
    """Where stored tensors lie in their files, by the files' headers."""
    headers: dict[Path, tuple[int, dict[str, Any]]] = {}
    places = {}
    for name in names:
        file = tensors[name].file
        if file not in headers:
            with file.open("rb") as handle:
                begin = 8 + int.from_bytes(handle.read(8), "little")
            headers[file] = begin, read_header(file)
        begin, header = headers[file]
        start, end = header[name]["data_offsets"]
        places[name] = Place(file, name, begin + start, begin + end)
    return places


class StoredWeights:
    """A checkpoint's tensors by the model's names of its parameters, read where they lie: a tensor is a view of the
    mapped file, whose pages are the system's to keep or to drop.

    Args:
        places: parameter -> the tensors that it is made of, stacked where there are several along a new first axis, and
            joined along rows where `joined` says how many make one of the stack.
        joined: parameter -> how many consecutive places are one matrix's rows.
    """

    pinned = False

    def __init__(self, places: Mapping[str, Sequence[Place]], joined: Mapping[str, int] | None = None) -> None:
        self.places, self.joined = dict(places), dict(joined or {})

    def tensors(self, table: Table) -> Sequence[Tensor]:
        with ExitStack() as files:
            handles: dict[Path, Any] = {}
            made = []
            for name, p in zip(table.names, table.originals, strict=True):
                made.append(self._read(name, files, handles).to(p.dtype))
            return made

    def tensor(self, name: str) -> Tensor:
        """One parameter."""
        with ExitStack() as files:
            return self._read(name, files, {})

    def _read(self, name: str, files: ExitStack, handles: dict[Path, Any]) -> Tensor:
        from safetensors import safe_open

        parts = []
        for place in self.places[name]:
            if place.file not in handles:
                handles[place.file] = files.enter_context(safe_open(str(place.file), "pt"))
            parts.append(handles[place.file].get_tensor(place.name))
        if name not in self.joined:
            return parts[0]
        rows = self.joined[name]
        return torch.stack([torch.cat(parts[i : i + rows]) for i in range(0, len(parts), rows)])

    def close(self) -> None:
        pass

    def coming(self, table: Table) -> None:
        """Asks the system to read a layer's pages ahead."""
        places = (place for name in table.names for place in self.places[name])
        read_ahead((place.file, place.start, place.end - place.start) for place in places)


class Views:
    """Weights that the CPU works on where they lie in their files: nothing is copied."""

    place = "files"

    def __init__(self, tables: Sequence[Table], source: StoredWeights) -> None:
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
