"""The statistics while they grow, on the devices of the matrices they are about."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..settings import ORDERS
from ..types import Group, Member

__all__ = ["Results", "result_bytes"]

T = TypeVar("T")

_ALIGN = 64  # float32 numbers: every piece starts on its own 256 bytes


def _sizes(group: Group, samples: int, orders: int) -> tuple[int, int]:
    fine, coarse = orders * group.units, len(group.members) * samples * group.units
    return tuple(-(-n // _ALIGN) * _ALIGN for n in (fine, coarse))  # type: ignore[return-value]


def _pieces(groups: Sequence[Group], samples: int, orders: int) -> list[int]:
    return [sum(_sizes(group, samples, orders)) for group in groups]


def result_bytes(groups: Sequence[Group], samples: int) -> int:
    """Bytes of the statistics of `groups` over so many samples."""
    return 4 * sum(_pieces(groups, samples, len(ORDERS)))


class _Beside(Generic[T]):
    """A function that runs in a thread beside the caller; `take` waits for its result, or raises what it raised."""

    def __init__(self, function: Callable[..., T], *arguments: Any) -> None:
        self._future: Future[T] = Future()
        threading.Thread(target=self._run, args=(function, arguments), daemon=True).start()

    def _run(self, function: Callable[..., T], arguments: tuple) -> None:
        try:
            self._future.set_result(function(*arguments))
        except BaseException as error:
            self._future.set_exception(error)

    def take(self) -> T:
        return self._future.result()


class Results:
    """The sums of every group: `fine[name]` float32 `[orders, units]` and `coarse[name]` float32 `[members, samples,
    units]`, zero at first. Those of one device share one allocation.

    `orders` are all of ORDERS, or one of them, which takes less time where the backend can do with less. `downloaded`
    says that `download` will be asked for.
    """

    def __init__(
        self,
        modules: Mapping[str, Any],
        groups: Sequence[Group],
        samples: int,
        orders: Sequence[str] = ORDERS,
        *,
        downloaded: bool = True,
    ) -> None:
        self.groups, self.samples, self.orders = groups, samples, tuple(orders)
        self.fine: dict[str, Tensor] = {}
        self.coarse: dict[str, Tensor] = {}
        self._flat: list[tuple[Tensor, list[Group]]] = []
        device_of = {g.name: modules[m.module]._parameters[m.parameter].device for g in groups for m in g.members[:1]}
        for device in dict.fromkeys(device_of.values()):
            here = [g for g in groups if device_of[g.name] == device]
            flat = torch.zeros(sum(self._pieces(here)), dtype=torch.float32, device=device)
            self._flat.append((flat, here))
            for group, piece in zip(here, flat.split(self._pieces(here)), strict=True):
                self.fine[group.name], self.coarse[group.name] = self._views(group, piece)
        self._owner = {(m.module, m.axis, m.start): g.name for g in groups for m in g.members}
        self._missing = {g.name: len(g.members) for g in groups}
        self._ready: dict[str, torch.cuda.Event] = {}
        # Host memory for the copies, allocated and touched by a thread beside the pass: faulting its pages in takes
        # longer than the copies themselves.
        cuda = [flat for flat, _ in self._flat if flat.device.type == "cuda" and downloaded]
        self._pages = {flat.device: _Beside(torch.zeros, flat.numel()) for flat in cuda}
        self._copies: dict[torch.device, _Beside[dict[str, Tensor]]] = {}

    @property
    def order(self) -> str:
        """What the ops are asked for."""
        return "all" if len(self.orders) > 1 else self.orders[0]

    def sums(self, name: str) -> Tensor:
        """A group's fine sums in the shape in which the ops add to them: `[3, units]` for "all", else `[units]`."""
        return self.fine[name] if len(self.orders) > 1 else self.fine[name][0]

    def clear(self) -> None:
        """Makes all sums zero again, for another run of samples."""
        for flat, _ in self._flat:
            flat.zero_()

    def _pieces(self, groups: Sequence[Group]) -> list[int]:
        return _pieces(groups, self.samples, len(self.orders))

    def scored(self, member: Member) -> None:
        """Notes that this matrix's scores are on the current stream. Once a group has all of its matrices, it can be
        downloaded from that point of the stream on."""
        name = self._owner[member.module, member.axis, member.start]
        self._missing[name] -= 1
        fine = self.fine[name]
        if not self._missing[name] and fine.device.type == "cuda":
            self._ready[name] = torch.cuda.Event()
            self._ready[name].record(torch.cuda.current_stream(fine.device))

    def _views(self, group: Group, piece: Tensor) -> tuple[Tensor, Tensor]:
        orders = len(self.orders)
        start = _sizes(group, self.samples, orders)[0]
        shape = (len(group.members), self.samples, group.units)
        fine = piece[: orders * group.units].view(orders, group.units)
        return fine, piece[start : start + shape[0] * shape[1] * shape[2]].view(shape)

    def first_bad(self) -> str | None:
        """The module whose gradient was the first in the backward's order to be NaN or Inf; None when all are finite.

        NaN and Inf survive every sum, so looking at the results is enough. Where all are finite the host waits once a
        device.
        """
        if all(bool(torch.isfinite(flat.sum(dtype=torch.float64))) for flat, _ in self._flat):
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

    def fetch(self) -> None:
        """Starts to copy what is on CUDA devices to the host, beside what the caller does next. To be called once all
        of the backward is launched: a thread that copies earlier holds up its launches."""
        for flat, here in self._flat:
            if flat.device.type == "cuda":
                stream = torch.cuda.current_stream(flat.device)
                self._copies[flat.device] = _Beside(self._copied, flat, here, stream)

    def download(self, order: Tensor) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """`(fine, coarse)` of `Statistics`, on the CPU. Row `s` of the results becomes sample `order[s]`."""
        inverse = torch.argsort(order)
        straight = bool((inverse == torch.arange(len(order))).all())
        host: dict[str, Tensor] = {}
        for flat, here in self._flat:
            host |= self._on_host(flat, here)
        fine, coarse = {}, {}
        for group in self.groups:
            by_order, signed = self._views(group, host[group.name])
            fine[group.name] = dict(zip(self.orders, by_order, strict=True))
            coarse[group.name] = signed if straight else signed[:, inverse]
        return fine, coarse

    def _on_host(self, flat: Tensor, here: Sequence[Group]) -> dict[str, Tensor]:
        """Group name -> the part of one device's allocation that is its own, on the host."""
        if flat.device in self._copies:
            return self._copies.pop(flat.device).take()
        return dict(zip([g.name for g in here], flat.cpu().split(self._pieces(here)), strict=True))

    def _copied(self, flat: Tensor, here: Sequence[Group], scoring: torch.cuda.Stream) -> dict[str, Tensor]:
        """Copies a CUDA device's results to the host, by group: each as soon as it is complete, on a stream of its own,
        while backward still runs, or all at once where backward is over."""
        sizes, names = self._pieces(here), [g.name for g in here]
        host = self._pages[flat.device].take()
        copies = dict(zip(names, host.split(sizes), strict=True))
        copying = torch.cuda.Stream(flat.device)
        with torch.cuda.stream(copying):
            if scoring.query():
                host.copy_(flat)
                return copies
            pieces = dict(zip(names, flat.split(sizes), strict=True))
            for name in (n for n in self._ready if n in pieces):
                copying.wait_event(self._ready[name])
                copies[name].copy_(pieces[name])
            copying.wait_stream(scoring)
            for name in (n for n in names if n not in self._ready):
                copies[name].copy_(pieces[name])
        return copies
