"""Groups of parts that not every family has: stacked experts, and heads whose matrices differ in their rows a head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import HywiaError
from ..types import Group, Member
from .configs import text_config
from .language import Architecture, Experts
from .members import linear_of, on_inputs, on_outputs, unit_parameters, vector_of
from .views import Modules, sizes_of

__all__ = ["attention_group", "expert_groups", "headwise_group"]


def expert_groups(model: nn.Module, modules: Modules, names: Experts, prefix: str, layer: int) -> Iterator[Group]:
    """One of whole experts, then one of the channels of each."""
    module = f"{prefix}.{names.module}"
    for parameter in (*names.rows, *names.columns):
        stacked = getattr(modules[module], parameter, None)
        if not isinstance(stacked, nn.Parameter) or stacked.dim() != 3:
            raise HywiaError(
                f"{module}: expected a stacked parameter {parameter!r} [experts, out, in], got "
                f"{type(stacked).__name__}; transformers 5 stacks experts, older versions do not"
            )
    out, into = (2, 1) if names.transposed else (1, 2)  # axes of a stack
    first: Any = getattr(modules[module], names.rows[0])
    each = names.alternating
    count, width = first.shape[0], first.shape[out] // names.rows.count(names.rows[0]) // each
    sizes = {p: getattr(modules[module], p).shape[out] // names.rows.count(p) // each for p in names.rows}
    sizes |= {p: getattr(modules[module], p).shape[into] for p in names.columns}
    if set(sizes.values()) != {width}:
        raise HywiaError(f"{module}: expected experts of one width, got widths {sizes}")
    if names.router:
        yield _whole_experts(model, modules, names, prefix, layer, count)
    for e in range(count):
        members = tuple(
            Member(module, out - 1, each, width * each * names.rows[:i].count(p), p, e)
            for i, p in enumerate(names.rows)
        ) + tuple(Member(module, into - 1, 1, 0, p, e) for p in names.columns)
        vectors = tuple(
            Member(module, 0, each, m.start, f"{m.parameter}_bias", e) for m in members[:-1] if names.biased
        )
        yield Group(
            f"{prefix}.mlp.{e}",
            "mlp",
            layer,
            width,
            "channel",
            members,
            unit_parameters(modules, members, vectors),
            vectors=vectors,
            tied_width=f"{prefix}.mlp",
            width_field=names.width_field,
        )


def _whole_experts(model: nn.Module, modules: Modules, names: Experts, prefix: str, layer: int, count: int) -> Group:
    module, router = f"{prefix}.{names.module}", f"{prefix}.{names.router}"
    gate: Any = modules.get(router)
    if not isinstance(getattr(gate, "weight", None), nn.Parameter):
        raise HywiaError(f"{module}: expected a router {router!r}, found none")
    if gate.weight.shape[0] != count or getattr(gate, "bias", None) is not None:
        raise HywiaError(f"{router}: expected one row of weights for each of {count} experts, and no bias")
    stacks = tuple(dict.fromkeys((*names.rows, *names.columns)))
    whole = (Member(router, 0, 1), *(Member(module, 0, 1, parameter=p) for p in stacks))
    return Group(
        f"{prefix}.experts",
        "experts",
        layer,
        count,
        "expert",
        whole,
        unit_parameters(modules, whole),
        min_units=getattr(text_config(model), names.chosen_field),
        width_field=names.count_field,
    )


def _vectors_of(modules: Modules, entry: Architecture, prefix: str, units: int) -> tuple[Member, ...]:
    """A layer's vectors with entries per head; where layers may differ, those that it has."""
    names = [f"{prefix}.{name}" for name in entry.attention.vectors]
    if entry.partial:
        names = [n for n in names if getattr(modules.get(n.rpartition(".")[0]), n.rpartition(".")[2], None) is not None]
    return tuple(vector_of(modules, name, units) for name in names)


def attention_group(
    modules: Modules, entry: Architecture, prefix: str, layer: int, units: int, rep: int, members: tuple[Member, ...]
) -> Group:
    """The group of a layer's heads, or KV groups of `rep` query heads, of these members and the layer's vectors."""
    vectors = _vectors_of(modules, entry, prefix, units)
    return Group(
        f"{prefix}.attention",
        "attention",
        layer,
        units,
        "head" if rep == 1 else "kv_group",
        members,
        unit_parameters(modules, members, vectors),
        vectors=vectors,
        width_field=entry.attention.kv_heads_field or entry.attention.heads_field,
    )


def headwise_group(modules: Modules, entry: Architecture, prefix: str, layer: int, size: int) -> tuple[Group, int]:
    """The group of a layer's heads where each matrix has as many rows for every KV group,
    whatever they are; and how many query heads each KV group has."""
    names = entry.attention
    output = f"{prefix}.{names.output}"
    width = sizes_of(linear_of(modules, output))[1]
    heads = width // size
    together = names.key == names.value
    units = heads if together else sizes_of(linear_of(modules, f"{prefix}.{names.value}"))[0] // size
    made = tuple(dict.fromkeys(f"{prefix}.{n}" for n in (names.query, names.key, names.value, *names.more)))
    rows = {name: sizes_of(linear_of(modules, name))[0] for name in made}
    whole = units > 0 and heads * size == width and heads % units == 0
    if not whole or any(count % units for count in rows.values()):
        raise HywiaError(f"{prefix}: expected rows {rows} and {width} columns of whole heads of {size}, got others")
    rep = heads // units
    if not together:
        each = rows[f"{prefix}.{names.key}"] // units  # of a head's query and key, which values may not share
        if rows[f"{prefix}.{names.value}"] != units * size or rows[made[0]] != names.wide_query * heads * each:
            raise HywiaError(f"{prefix}: expected q, k and v rows of whole heads of {size}, got {rows}")
    members = (
        *(on_outputs(modules, name, rows[name] // units) for name in made),
        on_inputs(modules, output, rep * size),
    )
    return attention_group(modules, entry, prefix, layer, units, rep, members), rep
