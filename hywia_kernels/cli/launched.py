"""What several processes of one command print: the first one speaks for all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

from ..errors import UsageError
from ..scale.launch import launched_ranks

__all__ = ["first_speaks", "go_on_alone", "is_first", "is_told", "refuse_several"]

_OF_TORCHRUN = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)
_PATIENCE = 3.0  # seconds after which a process tells an error that the first one did not have


@contextmanager
def first_speaks(*, errors: bool = False) -> Iterator[None]:
    """Nothing is printed by any but the first of torchrun's processes; with `errors` no usage either."""
    with ExitStack() as stack:
        if launched_ranks()[0] > 0:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            if errors:
                stack.enter_context(redirect_stderr(nowhere))
        yield


def is_told(error: BaseException) -> bool:
    """Whether another process tells the user of an error.

    One that is met before the processes know each other is met by all of them; then torchrun ends those that wait here
    for the first to tell it.
    """
    if getattr(error, "told_by_another", None) is not None:
        return bool(error.told_by_another)  # type: ignore[attr-defined]
    if launched_ranks()[0] == 0:
        return False
    if not isinstance(error, Exception):
        return True  # a signal, which the first process gets too
    time.sleep(_PATIENCE)
    return False


def is_first() -> bool:
    """Whether this process is the only one, or the first of torchrun's."""
    return launched_ranks()[0] == 0


def go_on_alone() -> None:
    """Takes torchrun out of the environment of the first process, once the others are through: what reads it there
    would wait for them."""
    for name in list(os.environ):
        if name in _OF_TORCHRUN or name.startswith("TORCHELASTIC_"):
            del os.environ[name]


def refuse_several(command: str) -> None:
    """Raise UsageError for a command that several processes cannot share."""
    _, size, _ = launched_ranks()
    if size > 1 and command not in ("score", "prune"):
        raise UsageError(f"{command}: expected one process, got {size}; torchrun goes with score and prune")
