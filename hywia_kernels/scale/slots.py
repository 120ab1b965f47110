"""Layers on their way to a device: two buffers there, of which one is worked on while the other is filled."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .stored import Source, flat_offsets
from .weights import Table

__all__ = ["Slots", "lent", "parts_of"]


_COPIERS = 4
_PIECE = 64 << 20  # bytes of a tensor that one thread copies at a time


def _pieces(into: Sequence[Tensor], tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of tensors, the large ones in pieces along their first axis."""
    for target, source in zip(into, tensors, strict=True):
        pieces = min(-(-target.numel() * target.element_size() // _PIECE), len(target)) if target.dim() > 1 else 1
        yield from zip(target.chunk(max(1, pieces)), source.chunk(max(1, pieces)), strict=True)


class Slots:
    """Weights that are copied to a device layer by layer, by a thread and on a stream of their own.

    The device's memory is twice the largest layer's, whatever the host runs ahead: a buffer is filled again only when
    the device is through with what it held. A source that is not pinned goes through two pinned buffers of the host,
    since a copy from pageable memory would hold up the device; several threads fill these, so that many pages of files
    are asked for at a time.
    """

    together = False

    def __init__(self, tables: Sequence[Table], source: Source, device: torch.device, place: str) -> None:
        self.tables, self.source, self.device, self.place = tables, source, device, place
        self.moved, self.waited = 0, 0.0
        self._flat = [flat_offsets(table) for table in tables]
        largest = max(size for _, size in self._flat)
        self._cuda = device.type == "cuda"
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        staging = 0 if source.pinned else 2
        self._staging = [torch.empty(largest, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(staging)]
        self._copiers = ThreadPoolExecutor(_COPIERS, thread_name_prefix="hywia-copies")
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None
        self._used: list[Any] = [None, None]  # events: the device is through with a slot
        self._filled: list[Any] = [None, None]  # events: a slot is filled, and its staging buffer free again

    def sweep(self, order: Sequence[int]) -> Generator[int, None, None]:
        if not order:
            return
        with ThreadPoolExecutor(1, thread_name_prefix="hywia-weights") as reader:
            coming: Future[list[Tensor]] = reader.submit(self._fill, order[0], 0)
            for at, i in enumerate(order):
                slot = at % 2
                began = time.monotonic()
                tensors = coming.result()
                if self._cuda:
                    torch.cuda.current_stream(self.device).wait_event(self._filled[slot])
                self.waited += time.monotonic() - began
                if at + 1 < len(order):
                    coming = reader.submit(self._fill, order[at + 1], 1 - slot)
                if at + 2 < len(order):
                    reader.submit(self.source.coming, self.tables[order[at + 2]])
                with lent(self.tables[i], tensors, self._used, slot):
                    yield i

    def _fill(self, layer: int, slot: int) -> list[Tensor]:
        """Copies a layer into a slot; the views of it that are the layer's parameters. Runs in the reader's thread."""
        table, (offsets, _) = self.tables[layer], self._flat[layer]
        with torch.no_grad(), torch.cuda.stream(self._stream) if self._cuda else nullcontext():
            if self._cuda and self._used[slot] is not None:
                self._stream.wait_event(self._used[slot])
            into = parts_of(self._slots[slot], table, offsets)
            held = self.source.tensors(table)
            if self._staging:
                if self._filled[slot] is not None:
                    self._filled[slot].synchronize()
                staged = parts_of(self._staging[slot], table, offsets)
                list(self._copiers.map(lambda pair: pair[0].copy_(pair[1]), _pieces(staged, held)))
                held = staged
            for tensor, part in zip(held, into, strict=True):
                part.copy_(tensor, non_blocking=True)
            if self._cuda:
                self._filled[slot] = torch.cuda.Event()
                self._filled[slot].record(self._stream)
        self.moved += table.bytes
        return into

    def close(self) -> None:
        self._copiers.shutdown()
        self.source.close()


@contextmanager
def lent(table: Table, parts: Sequence[Tensor], used: list[Any], slot: int) -> Iterator[None]:
    """Within the context a layer's parameters are these parts of a slot; then `used[slot]` is the event after which
    the device is through with them, where they are on a GPU."""
    table.put(parts)
    try:
        yield
    finally:
        table.put_back()
        if parts and parts[0].is_cuda:
            used[slot] = torch.cuda.Event()
            used[slot].record(torch.cuda.current_stream(parts[0].device))


def parts_of(flat: Tensor, table: Table, offsets: Sequence[int]) -> list[Tensor]:
    """A layer's parameters as views of one buffer of bytes, in which they begin at `offsets`."""
    return [
        flat[offset : offset + p.numel() * p.element_size()].view(p.dtype).view(p.shape)
        for offset, p in zip(offsets, table.originals, strict=True)
    ]
