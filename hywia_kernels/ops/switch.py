"""Settings of the whole process that several holders may turn at once, and leave in any order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Held", "Switch"]

_UNREAD: Any = object()


class Switch:
    """The first holder turns the setting, the last one to leave puts back what was there before the first.

    If each holder remembered the setting for itself, a thread could remember another holder's setting and put that back
    for good.

    Args:
        read: gives what `restore` takes.
        turn: sets what holders want; may be called again while they hold.
        restore: puts back what `read` gave.
    """

    def __init__(self, read: Callable[[], Any], turn: Callable[[], None], restore: Callable[[Any], None]) -> None:
        self._read, self._turn, self._restore = read, turn, restore
        self._lock = threading.RLock()  # a holder may be freed, and so let go, in the middle of another's call
        self._holders: set[int] = set()
        self._before = _UNREAD

    def held(self) -> Held:
        return Held(self)

    def holders(self) -> frozenset[int]:
        return frozenset(self._holders)

    def hold(self, holder: int) -> None:
        with self._lock:
            if self._before is _UNREAD:  # read before anything is turned: an interrupt in between loses nothing
                self._before = self._read()
            if not self._holders:
                self._turn()
            self._holders.add(holder)

    def release(self, holder: int) -> None:
        with self._lock:
            self._holders.discard(holder)
            self._settle()

    def settle(self, holders: frozenset[int]) -> None:
        """Removes all holders but these, so that a holder that an interrupt kept from leaving leaves now."""
        with self._lock:
            self._holders &= holders
            self._settle()

    def _settle(self) -> None:
        if not self._holders and self._before is not _UNREAD:
            self._restore(self._before)
            self._before = _UNREAD


class Held:
    """Context manager of one holder. A holder that could not leave does so when it is freed."""

    _switch: Switch | None = None

    def __init__(self, switch: Switch) -> None:
        self._switch = switch

    def __enter__(self) -> None:
        assert self._switch is not None
        self._switch.hold(id(self))

    def __exit__(self, *error: object) -> None:
        assert self._switch is not None
        self._switch.release(id(self))

    def __del__(self) -> None:
        if self._switch is not None and id(self) in self._switch.holders():
            self._switch.release(id(self))
