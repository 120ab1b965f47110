"""Bytes and FLOPs of known cases, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from . import cases
from .cases import CompactCase, LinearCase, TaylorCase


@pytest.mark.parametrize(
    ("case", "name", "size"),
    [
        (TaylorCase(3, 5, 0, "first"), "3x5 bf16 rows first", 15 * 2 * 2 + 2 * 3 * 4),
        (
            TaylorCase(4, 6, 1, "mixed", torch.float16, torch.float32, 3),
            "4x6 fp16+fp32 cols/3 mixed",
            24 * (2 + 4 + 4) + 2 * 2 * 4,
        ),
        (CompactCase(8, 10, 1, torch.float32, 0.5), "8x10 fp32 cols keep 50%", 2 * 8 * 5 * 4 + 8 * 5),
        # Output gradients 6x8, inputs 6x4, weight 8x4; fine and one row of coarse.
        (
            LinearCase(8, 4, 0, "first", False, torch.bfloat16, 2, 3),
            "8x4 bf16 rows 2x3 first mean",
            2 * (48 + 24 + 32) + 4 * 8 * (1 + 1),
        ),
        # Three orders of fine, a row of coarse per sample, units of two columns.
        (
            LinearCase(8, 4, 1, "all", True, torch.float32, 2, 3, 2),
            "8x4 fp32 cols/2 2x3 all",
            4 * (48 + 24 + 32) + 4 * 2 * (3 + 2),
        ),
        # What is mapped is a third activation, 6x8.
        (
            LinearCase(8, 4, 0, "all", True, torch.bfloat16, 2, 3, mapped=True),
            "8x4 bf16 rows 2x3 all mapped",
            2 * (48 + 24 + 48 + 32) + 4 * 8 * (3 + 2),
        ),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else None,
)
def test_name_and_bytes(case, name, size):
    assert (case.name, case.bytes) == (name, size)


def test_flops():
    assert LinearCase(8, 4, 0, "first", False, samples=2, length=3).flops == 2 * 6 * 8 * 4
    assert LinearCase(11008, 4096, 0, "all").flops == 2 * 1280 * 11008 * 4096 == 115_427_246_080


def test_linear_cases_are_distinct_and_cover_the_natural_axes():
    names = [case.name for case in cases.LINEAR_CUDA]
    assert len(names) == len(set(names)) == 3 * (6 + 5) + 2 + 3 * 9 + 2 * (4 + 3)
    for shape in ("11008x4096 bf16 rows", "4096x11008 bf16 cols", "28672x8192 bf16 rows", "8192x28672 bf16 cols"):
        orders = ("first mean", "first", "all", "second", "all mapped", "first mapped")
        assert {f"{shape} 10x128 {order}" for order in orders} <= set(names)
    for shape in ("4096x4096 bf16 rows", "11008x4096 bf16 rows", "4096x11008 bf16 cols"):
        assert {f"{shape} {n}x128 {order}" for n in (128, 512) for order in ("second", "all mapped")} <= set(names)
