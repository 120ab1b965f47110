"""Sizes that the launchers of Triton's kernels share. Only modules that need Triton anyway may import this one."""

from __future__ import annotations

import triton

__all__ = ["LONGEST_CHAIN", "TILE", "power_of_two"]

TILE = 2048  # elements of each operand a program holds: 16 a thread, 32 bytes of bf16 a load
LONGEST_CHAIN = 128  # float32 additions one after the other, so that a sum keeps six digits


def power_of_two(n: int, most: int) -> int:
    """The smallest power of two that is at least `n`, but no more than `most`."""
    return min(triton.next_power_of_2(max(n, 1)), most)
