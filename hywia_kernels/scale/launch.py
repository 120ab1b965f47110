"""Which of torchrun's processes this is, as the environment says. Imports nothing heavy."""

from __future__ import annotations

import os

from ..errors import UsageError

__all__ = ["launched_ranks"]


def launched_ranks() -> tuple[int, int, int]:
    """`(rank, ranks, rank on this host)` as torchrun's environment says; `(0, 1, 0)` without it.

    Raises:
        UsageError: the environment says something that is no number.
    """
    numbers = []
    for name, usual in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        value = os.environ.get(name, str(usual))
        if not value.isdigit():
            raise UsageError(f"{name}: expected a number in the environment, as torchrun sets it, got {value!r}")
        numbers.append(int(value))
    return numbers[0], numbers[1], numbers[2]
