"""Layers that the processes of a host hold together: each keeps a part of every layer, and all of them gather it.

A part is read from the files once and stays in the host's memory, pinned where the device is CUDA's. So a host holds
the weights once, every link to a device carries a part of them, and they go from device to device within the host;
nothing of them crosses to another host.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .ranks import Ranks
from .slots import lent, parts_of
from .stored import Source, flat_offsets
from .weights import Table

__all__ = ["Shards"]


class Shards:
    """Weights that a host's processes gather layer by layer, one layer ahead of the work.

    All processes sweep, whether they have runs or not, and in the same order. The device's memory is twice the largest
    layer, and twice a part.

    Args:
        source: of the layers, each of which it is asked for once.
    """

    place, together = "host", True

    def __init__(self, tables: Sequence[Table], source: Source, device: torch.device, ranks: Ranks) -> None:
        self.tables, self.device, self.ranks = tables, device, ranks
        self.moved, self.waited = 0, 0.0
        self._group = ranks.host_group()
        self._flat = [flat_offsets(table) for table in tables]
        mates, me = len(ranks.mates), ranks.mates.index(ranks.rank)
        self._sizes = [-(-size // mates) for _, size in self._flat]  # bytes of a part
        self._cuda = device.type == "cuda"
        self._parts = []
        for at, (table, size) in enumerate(zip(tables, self._sizes, strict=True)):
            if at + 1 < len(tables):
                source.coming(tables[at + 1])
            part = torch.zeros(size, dtype=torch.uint8, pin_memory=self._cuda)
            _cut(part, me * size, source.tensors(table), self._flat[at][0])
            self._parts.append(part)
        source.close()
        largest = max(self._sizes)
        self._slots = [torch.empty(largest * mates, dtype=torch.uint8, device=device) for _ in range(2)]
        self._here = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None
        self._used: list[Any] = [None, None]  # events: the device is through with a slot

    def sweep(self, order: Sequence[int]) -> Generator[int, None, None]:
        if not order:
            return
        coming = self._gather(order[0], 0)
        for at, i in enumerate(order):
            slot = at % 2
            began = time.monotonic()
            self.ranks.wait(coming)
            if self._cuda:
                torch.cuda.current_stream(self.device).wait_stream(self._stream)
            self.waited += time.monotonic() - began
            if at + 1 < len(order):
                coming = self._gather(order[at + 1], 1 - slot)
            parts = parts_of(self._slots[slot], self.tables[i], self._flat[i][0])
            with lent(self.tables[i], parts, self._used, slot):
                yield i

    def _gather(self, layer: int, slot: int) -> Any:
        """Begins to put a layer together in a slot."""
        size, mates = self._sizes[layer], len(self.ranks.mates)
        with torch.cuda.stream(self._stream) if self._cuda else nullcontext():
            if self._used[slot] is not None:
                self._stream.wait_event(self._used[slot])
            part = self._here[slot][:size].copy_(self._parts[layer], non_blocking=True)
            self.moved += size
            self.ranks.meet(f"the weights of layer {layer}")
            return self.ranks.gather(self._slots[slot][: size * mates], part, self._group)

    def close(self) -> None:
        self._parts = []
        self.ranks.give_back(self._group)
        self._group = None


def _cut(part: Tensor, begin: int, tensors: Sequence[Tensor], offsets: Sequence[int]) -> None:
    """Fills a part of a layer's bytes, which begins at `begin`, from the layer's tensors, which begin at `offsets`."""
    end = begin + part.numel()
    for tensor, offset in zip(tensors, offsets, strict=True):
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        first, last = max(begin, offset), min(end, offset + data.numel())
        if first < last:
            part[first - begin : last - begin].copy_(data[first - offset : last - offset])
