"""Sizes that the launchers of Triton's kernels share. Imports Triton: only what is imported after it was found may."""

from __future__ import annotations

import triton

__all__ = ["LONGEST_CHAIN", "TILE", "power_of_two"]

TILE = 2048  # elements of each operand a program holds: 16 a thread, 32 bytes of bf16 a load
LONGEST_CHAIN = 128  # float32 additions in a row, so that a sum keeps six digits


def power_of_two(n: int, most: int) -> int:
    """The least power of two that is at least `n`, and no more than `most`."""
    return min(triton.next_power_of_2(max(n, 1)), most)
