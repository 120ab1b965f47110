"""The statistics while they grow, on the devices of the matrices they are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from ..ops.checks import ORDERS
from ..types import Group

__all__ = ["Results", "result_bytes"]

_ALIGN = 64  # float32 numbers: every piece starts on its own 256 bytes


def _sizes(group: Group, samples: int) -> tuple[int, int]:
    fine, coarse = len(ORDERS) * group.units, len(group.members) * samples * group.units
    return tuple(-(-n // _ALIGN) * _ALIGN for n in (fine, coarse))  # type: ignore[return-value]


def result_bytes(found: Sequence[Group], samples: int) -> int:
    return 4 * sum(sum(_sizes(group, samples)) for group in found)


class Results:
    """`fine[name]` float32 `[3, units]` (first, second, mixed) and `coarse[name]` `[members, samples, units]`, zero at
    first; of all groups of one device in one allocation."""

    def __init__(self, linears: Mapping[str, nn.Linear], found: Sequence[Group], samples: int) -> None:
        self.groups, self.samples = found, samples
        self.fine: dict[str, Tensor] = {}
        self.coarse: dict[str, Tensor] = {}
        self._pieces: dict[str, Tensor] = {}
        self._remaining = {group.name: len(group.members) for group in found}
        self._flat: list[Tensor] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._copies: dict[str, Future[Tensor]] = {}
        self._copier: ThreadPoolExecutor | None = None
        device_of = {g.name: linears[g.members[0].module].weight.device for g in found}
        for device in dict.fromkeys(device_of.values()):
            here = [g for g in found if device_of[g.name] == device]
            flat = torch.zeros(sum(sum(_sizes(g, samples)) for g in here), dtype=torch.float32, device=device)
            self._flat.append(flat)
            for group, piece in zip(here, flat.split([sum(_sizes(g, samples)) for g in here]), strict=True):
                self._pieces[group.name] = piece
                self.fine[group.name], self.coarse[group.name] = self._views(group, piece)

    def _views(self, group: Group, piece: Tensor) -> tuple[Tensor, Tensor]:
        start = _sizes(group, self.samples)[0]
        shape = (len(group.members), self.samples, group.units)
        fine = piece[: len(ORDERS) * group.units].view(len(ORDERS), group.units)
        return fine, piece[start : start + shape[0] * shape[1] * shape[2]].view(shape)

    def arrived(self, name: str) -> None:
        """One matrix of a group has been scored.

        After the last, on CUDA, the group is copied to the host by a thread and on a stream of their own, while the
        backward goes on with the groups before it: the copies and the pages they land on take longer than the
        backward's own use of the host leaves.
        """
        self._remaining[name] -= 1
        device = self._pieces[name].device
        if self._remaining[name] or device.type != "cuda":
            return
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(device))
        if self._copier is None:
            self._copier = ThreadPoolExecutor(1, "hywia-results")
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        self._copies[name] = self._copier.submit(self._copy, name, self._streams[device], ready)

    def _copy(self, name: str, stream: torch.cuda.Stream, ready: torch.cuda.Event) -> Tensor:
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            return self._pieces[name].cpu()

    def first_bad(self) -> str | None:
        """The module whose gradient was the first in the backward's order to be NaN or Inf; None when all is well.

        NaN and Inf survive every sum, so the results tell for the gradients; one wait a device where all is well.
        """
        if all(bool(torch.isfinite(flat.sum(dtype=torch.float64))) for flat in self._flat):
            return None
        sums = []
        for group in self.groups:
            per_member = self.coarse[group.name].sum((1, 2))
            sums.append(torch.cat([per_member, self.fine[group.name].sum()[None]]))
        home = sums[0].device
        bad = (~torch.isfinite(torch.cat([s.to(home, non_blocking=True) for s in sums]))).tolist()
        at = len(bad)
        for group in reversed(self.groups):
            at -= len(group.members) + 1
            members = bad[at : at + len(group.members)]
            if any(members):
                return max((i, m.module) for i, m in enumerate(group.members) if members[i])[1]
            if bad[at + len(group.members)]:  # finite gradients whose squares are not
                return group.members[-1].module
        return None

    def download(self, order: Tensor) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """`(fine, coarse)` of `Statistics`, on the CPU; sample `s` of the results becomes sample `order[s]`."""
        inverse = torch.argsort(order)
        straight = bool((inverse == torch.arange(len(order))).all())
        host = {
            group.name: self._copies[group.name].result()
            if group.name in self._copies
            else self._pieces[group.name].cpu()
            for group in self.groups
        }
        if self._copier is not None:
            self._copier.shutdown()
        fine, coarse = {}, {}
        for group in self.groups:
            three, signed = self._views(group, host[group.name])
            fine[group.name] = dict(zip(ORDERS, three, strict=True))
            coarse[group.name] = signed if straight else signed[:, inverse]
        return fine, coarse
