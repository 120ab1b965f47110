"""Progress of long work: a tqdm bar on a terminal, plain lines elsewhere, silence unless the caller switched it on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Callback = Callable[[str, int, "int | None"], None]  # what is done, steps done, and of how many

_enabled = False
_EVERY_SECONDS = 10.0
_callback: ContextVar[Callback | None] = ContextVar("hywia_progress", default=None)


def enable(on: bool = True) -> None:
    """Show progress (the command line does; a library call is silent by default)."""
    global _enabled
    _enabled = on


@contextmanager
def reporting(callback: Callback | None) -> Iterator[None]:
    """Have a callback told of the progress of all work inside, bars or none; None changes nothing."""
    if callback is None:
        yield
        return
    token = _callback.set(callback)
    try:
        yield
    finally:
        _callback.reset(token)


class Bar:
    """A counter of `total` steps; use as a context manager and call `step()`."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self._start = self._last = time.monotonic()
        self._bar = None
        self._callback = _callback.get()  # of the thread that began: autograd's own know no context
        self._tell()
        if _enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, file=sys.stderr, leave=True)
        elif _enabled:
            self._line("started")

    def _line(self, state: str) -> None:
        print(f"{self.what}: {state}", file=sys.stderr, flush=True)

    def _left(self) -> str:
        """The time that the rest takes at the pace so far, as minutes and seconds."""
        assert self.total
        seconds = round((time.monotonic() - self._start) * (self.total - self.done) / max(self.done, 1))
        minutes, seconds = divmod(max(seconds, 0), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

    def _tell(self) -> None:
        if self._callback is not None:
            self._callback(self.what, self.done, self.total)

    def step(self, n: int = 1) -> None:
        self.done += n
        self._tell()
        if self._bar is not None:
            self._bar.update(n)
        elif _enabled and time.monotonic() - self._last >= _EVERY_SECONDS:
            self._last = time.monotonic()
            self._line(f"{self.done}/{self.total}, {self._left()} left" if self.total else str(self.done))

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif _enabled and kind is None:
            self._line(f"done in {time.monotonic() - self._start:.1f} s")


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Bar(what, total) as bar:
        for item in items:
            yield item
            bar.step()
