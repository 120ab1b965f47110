"""The processes that share one scoring: what they agree on, what they add up, and which of them is missing.

torchrun starts the processes and torch.distributed connects them. What could hang goes through the store first: a
process that waits for others looks once a second whether one of them has failed or is gone, so that the run ends with
one message that names it, and not with a collective's timeout.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import HywiaError
from ..settings import RANK_TIMEOUT
from .launch import launched_ranks

__all__ = ["Ranks", "joined"]

_LOOK = 1.0  # seconds between two looks at the others
_SOON = 5.0  # seconds within which a process whose connections are gone is gone itself, or has said why
_SHORTEST, _LONGEST = 2e-4, 2e-2  # seconds between two questions to the store; its own wait prints warnings


class _Process(NamedTuple):
    """A process: its host's name, what tells where its number holds, and its number there."""

    host: str
    place: str
    pid: int


def _place() -> str:
    """What only processes have in common that see each other's numbers: hosts may share a name."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


class Ranks:
    """The processes of one scoring. A world of one has no store, and asks nobody.

    Attributes:
        rank, size: this process among all. mates: those on this host. here: how many.
        speaks: whether this process writes, and prints for all of them.
        received: bytes that `exchange` has brought from others so far.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, *, store: Any = None, group: Any = None, timeout: float = RANK_TIMEOUT
    ) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self._store, self._group, self._met, self.received = store, group, 0, 0
        own = _Process(socket.gethostname(), _place(), os.getpid())
        self._processes = [own]
        if size > 1:
            self._processes = [_Process(*told) for told in self.tell(list(own), "the beginning")]
        self.mates = [r for r, process in enumerate(self._processes) if process.place == own.place]
        self.here = len(self.mates)

    @property
    def speaks(self) -> bool:
        return self.rank == 0

    def meet(self, what: str) -> None:
        """Waits until every process has come here.

        Args:
            what: what they come to, for messages ("layer 17").

        Raises:
            HywiaError: one has failed, is gone, or has not come within the timeout; the message names it.
        """
        if self.size == 1:
            return
        self._met += 1
        at = f"meet/{self._met}"
        with self._stored():
            self._store.set(f"{at}/{self.rank}", "")
            if self._store.add(f"{at}/count", 1) == self.size:
                self._store.set(f"{at}/all", "")
        began = looked = time.monotonic()
        pause = _SHORTEST
        while not self._known(f"{at}/all"):
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
            if time.monotonic() - looked < _LOOK:
                continue
            looked = time.monotonic()
            self._look()
            missing = [r for r in range(self.size) if not self._known(f"{at}/{r}")]
            gone = [r for r in missing if self._gone(r)]
            if gone:
                self._look()  # once more: what it said, it said before it ended
                raise HywiaError(f"{self._named(gone)} ended before {what}, without a message of its own")
            if missing and time.monotonic() - began > self.timeout:
                raise HywiaError(
                    f"{self._named(missing)} did not come to {what} within {self.timeout:g} s of the others; it hangs, "
                    "or its host is gone (--rank-timeout says how long to wait)"
                )

    def tell(self, value: Any, what: str) -> list[Any]:
        """Every process's value, by rank; JSON. `what` as in `meet`, which this is too."""
        if self.size == 1:
            return [value]
        at = f"tell/{self._met}"
        with self._stored():
            self._store.set(f"{at}/{self.rank}", json.dumps(value))
        self.meet(what)
        with self._stored():
            return [json.loads(self._store.get(f"{at}/{r}")) for r in range(self.size)]

    def agree(self, facts: Mapping[str, str], what: str) -> None:
        """Makes sure that all processes have the same facts, name -> value.

        Raises:
            HywiaError: they differ; the message names the fact, both values and the ranks. The same on all.
        """
        told = self.tell(dict(facts), what)
        for name in facts:
            values = [other.get(name) for other in told]
            odd = [r for r, value in enumerate(values) if value != values[0]]
            if odd:
                raise HywiaError(
                    f"{name}: expected the same on all ranks, got {values[0]} on rank 0 and {values[odd[0]]} on "
                    f"{'rank' if len(odd) == 1 else 'ranks'} {', '.join(map(str, odd))}; start all of them with the "
                    "same command, files and versions"
                )

    def add_up(self, values: Tensor) -> Tensor:
        """Adds the processes' tensors, in place. Where all but one of the addends are zero nothing is rounded."""
        if self.size > 1:
            with self._together():
                dist.all_reduce(values, group=self._group)
        return values

    def host_group(self) -> Any:
        """The processes of this host, for `gather`; None where this one is alone. Called by all processes that torchrun
        started, since each must know of every host's."""
        if self.size == 1:
            return None
        places = [process.place for process in self._processes]
        hosts = [[r for r, place in enumerate(places) if place == host] for host in dict.fromkeys(places)]
        groups = [dist.new_group(host) for host in hosts]
        return groups[hosts.index(self.mates)]

    def give_back(self, group: Any) -> None:
        """Ends a group of `host_group`."""
        if group is not None:
            with suppress(RuntimeError):  # others are gone
                dist.destroy_process_group(group)

    def gather(self, into: Tensor, part: Tensor, group: Any) -> Any:
        """Begins to put the parts of a host's processes one behind the other; `wait` for what is returned. Bytes."""
        if group is None:
            into.copy_(part)
            return None
        with self._together():
            return dist.all_gather_into_tensor(into, part, group=group, async_op=True)

    def wait(self, begun: Any) -> None:
        """Until what was gathered is there, for what the device does next."""
        if begun is not None:
            with self._together():
                begun.wait()

    def exchange(self, parts: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """Sends each process its part; returns what came from all of them, one below the other, bit for bit.

        Args:
            parts: for each process `[own rows, columns that it takes]`, of one dtype. rows: that each process has.

        Returns:
            `[all rows, own columns]`.
        """
        own = parts[self.rank]
        size, columns = own.element_size(), own.shape[1]
        got = own.new_empty((sum(rows), columns))
        sent = torch.cat([part.reshape(-1) for part in parts])
        come, go = [n * columns * size for n in rows], [part.numel() * size for part in parts]
        with self._together():
            into = got.view(-1).view(torch.uint8)  # every backend has bytes
            dist.all_to_all_single(into, sent.view(torch.uint8), come, go, group=self._group)
        self.received += sum(come) - come[self.rank]
        return got

    @contextmanager
    def _together(self) -> Iterator[None]:
        """While all processes are in one call of torch.distributed."""
        try:
            yield
        except RuntimeError as error:  # a process that ended between two looks
            lost = HywiaError(f"the ranks lost each other: {str(error).splitlines()[0]}")
            raise self._cause_soon() or lost from error

    def fail(self, error: BaseException) -> bool:
        """Lets the others know of an error. Returns whether this process is the one to tell it to the user, as the
        first one that is still there."""
        if self.size == 1:
            return True
        if not isinstance(error, _Elsewhere):
            content = json.dumps([self.rank, f"{error}" or type(error).__name__])
            with suppress(RuntimeError):
                self._store.compare_set("failed", "", content)
        first = min((r for r in range(self.size) if not self._gone(r)), default=self.rank)
        try:
            return self.rank == first and self._store.add("told", 1) == 1
        except RuntimeError:  # the store is gone, and with it whoever started the processes
            return self.rank == first

    def _cause_soon(self) -> HywiaError | None:
        """`cause`, of what has just been felt: a process that is killed loses its connections before it is gone."""
        began = time.monotonic()
        while (found := self.cause()) is None and time.monotonic() - began < _SOON:
            time.sleep(_LONGEST)
        return found

    def cause(self) -> HywiaError | None:
        """Why somebody ended this process: what another one failed with, or that one of this host is gone."""
        try:
            self._look()
        except HywiaError as error:
            return error
        gone = [r for r in range(self.size) if self._gone(r)]
        return HywiaError(f"{self._named(gone)} ended, without a message of its own") if gone else None

    def _look(self) -> None:
        """Raises what another process has failed with."""
        if not self._known("failed"):
            return
        with self._stored():
            rank, message = json.loads(self._store.get("failed"))
        if rank != self.rank:
            raise _Elsewhere(f"rank {rank}: {message}")

    def _known(self, key: str) -> bool:
        with self._stored():
            return bool(self._store.check([key]))

    @contextmanager
    def _stored(self) -> Iterator[None]:
        try:
            yield
        except dist.DistNetworkError:
            raise HywiaError("the ranks' store is gone: the process that started them has ended") from None

    def _gone(self, rank: int) -> bool:
        """Whether a process of this host is no more; nothing is known of those of other hosts."""
        if rank == self.rank or rank >= len(self._processes) or self._processes[rank].place != _place():
            return False
        try:
            with open(f"/proc/{self._processes[rank].pid}/stat", encoding="utf-8") as file:
                return file.read().rpartition(")")[2].split()[0] in ("Z", "X")
        except FileNotFoundError:
            return os.path.isdir("/proc/self")
        except OSError:
            return False

    def _named(self, ranks: list[int]) -> str:
        names = []
        for r in ranks:
            known = self._processes[r] if r < len(self._processes) else None
            names.append(f"rank {r}" if known is None else f"rank {r} (process {known.pid} on {known.host})")
        return " and ".join(names)


class _Elsewhere(HywiaError):
    """What another process has failed with."""


@contextmanager
def joined(device: torch.device, timeout: float = RANK_TIMEOUT) -> Iterator[Ranks]:
    """The processes that torchrun started, connected by NCCL on CUDA devices and by gloo on CPUs; a world of one where
    it started none.

    An error inside is told to the others. One that is to be told by another process carries `told_by_another`.

    Args:
        device: this process's. timeout: seconds that ranks wait for each other.
    """
    rank, size, _ = launched_ranks()
    if size == 1:
        yield Ranks()
        return
    wait = timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=wait))
    store.set_timeout(wait)
    options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    # Nobody enters a collective before all have come to it, so what it waits for is the device's work.
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=wait + timedelta(seconds=60),
        **options,
    )
    ranks = None
    try:
        ranks = Ranks(rank, size, store=dist.PrefixStore("hywia", store), timeout=timeout)
        yield ranks
    except BaseException as error:
        raised = _told(ranks, error)
        if raised is error:
            raise
        raise raised from error
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _told(ranks: Ranks | None, error: BaseException) -> BaseException:
    """The error to raise: that a process is lost, where this one was only ended in consequence."""
    if ranks is None:
        return error
    if not isinstance(error, Exception):
        error = ranks.cause() or error
    error.told_by_another = not ranks.fail(error)  # type: ignore[attr-defined]
    return error
