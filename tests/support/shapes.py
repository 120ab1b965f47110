"""Which families stand for the others: one of each shape of entry is cut in every way, and the rest in two."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hywia_kernels import arch

from .cuts import CUTS


def shape(family) -> arch.Architecture:
    """The entry of a `families.Family` without what says nothing about how it is cut."""
    entry = next(e for e in arch.TABLE if family.name.partition("-")[0] in e.model_types)
    return dataclasses.replace(entry, model_types=(), title="", blocks=(), norms=(), final_norm=None, logits=())


def distinct(families: Sequence) -> list:
    """The first family of each shape and of each set of cuts that stock configs describe."""
    keys = [(shape(family), family.stock) for family in families]
    return [family for i, family in enumerate(families) if keys[i] not in keys[:i]]


def saved_cuts(family, families: Sequence) -> tuple[str, ...]:
    """The cuts of a family: all where it stands for others; else of both kinds at once, in equal and unequal layers.

    Entries of one shape give one code the same names to cut; what is the model's own shows in every cut.
    """
    if family not in distinct(families):
        return "both", "adaptive"
    return (*CUTS, "experts", "all") if family.experts else CUTS


def all_cuts(family, families: Sequence) -> tuple[str, ...]:
    """`saved_cuts`, and of a family that stands for others those of unequal layers by kind."""
    kinds = ("adaptive-mlp", "adaptive-attention") if family in distinct(families) else ()
    return (*saved_cuts(family, families), *kinds)
