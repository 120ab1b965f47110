"""From a model and its table entry to groups and config fields."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import HywiaError
from ..types import Group, Member
from .configs import stock_head_counts, text_config
from .language import Architecture, Experts
from .table import TABLE
from .views import Modules, is_transposed, parameter_of, sizes_of

__all__ = ["architecture", "config_widths", "groups", "head_dim", "layers_of", "left_alone"]


def architecture(model: nn.Module) -> Architecture:
    """The table's entry for a model.

    Raises:
        HywiaError: the model type is not in the table (the message lists those that are), or a config field has a
            value that the entry does not hold for.
    """
    config = getattr(model, "config", None)
    # A checkpoint whose layers differ in width names its family beside its own type.
    model_type = getattr(config, "base_model_type", None) or getattr(config, "model_type", None)
    for entry in TABLE:
        if model_type in entry.model_types:
            _check_requirements(model, entry)
            return entry
    known = ", ".join(sorted(t for entry in TABLE for t in entry.model_types))
    raise HywiaError(
        f"model: expected one of the known model types ({known}), got {model_type!r}; "
        "CONTRIBUTING.md says how to add an architecture to the table"
    )


def _check_requirements(model: nn.Module, entry: Architecture) -> None:
    config = text_config(model)
    for name, wanted in entry.requires.items():
        found = getattr(config, name, wanted)
        if found != wanted:
            raise HywiaError(
                f"model: expected {name}={wanted!r} in the config of a {entry.model_types[0]} model, got {found!r}; "
                "its layers compute something the table's entry does not describe"
            )


def head_dim(model: nn.Module) -> int:
    """Features of one attention head."""
    config = text_config(model)
    return getattr(config, "head_dim", None) or config.hidden_size // getattr(
        config, architecture(model).attention.heads_field
    )


def _linear(modules: Modules, name: str) -> Any:
    module = modules.get(name)
    if module is None:
        raise HywiaError(f"model: expected a module {name!r}, found none; its structure is not the table's")
    if type(module) is not nn.Linear and not is_transposed(module):
        raise HywiaError(
            f"{name}: expected torch.nn.Linear or transformers' Conv1D, got {type(module).__name__}; "
            "load the model without quantisation or adapters"
        )
    return module


def _outputs(modules: Modules, name: str, group_size: int, start: int = 0) -> Member:
    """Units on a linear layer's outputs, with their biases."""
    module = _linear(modules, name)
    bias = None if parameter_of(module, "bias") is None else "bias"
    return Member(name, 1 if is_transposed(module) else 0, group_size, start, bias=bias)


def _inputs(modules: Modules, name: str, group_size: int) -> Member:
    return Member(name, 0 if is_transposed(_linear(modules, name)) else 1, group_size)


def _unit_parameters(modules: Modules, members: Sequence[Member], vectors: Sequence[Member] = ()) -> int:
    total = sum(vector.group_size for vector in vectors)
    for member in members:
        shape = list(parameter_of(modules[member.module], member.parameter).shape)
        if member.index is not None:
            del shape[0]
        del shape[member.axis]
        total += member.group_size * (math.prod(shape) + (member.bias is not None))
    return total


def _mlp_group(modules: Modules, entry: Architecture, prefix: str, layer: int) -> Group:
    rows = [f"{prefix}.{name}" for name in entry.mlp.rows]
    columns = [f"{prefix}.{name}" for name in entry.mlp.columns]
    sizes: dict[str, int] = {}
    for name in rows:
        outputs, count = sizes_of(_linear(modules, name))[0], rows.count(name)
        if outputs % count:
            raise HywiaError(f"{name}: expected the rows of {count} matrices of one width, got {outputs}")
        sizes[name] = outputs // count
    sizes |= {name: sizes_of(_linear(modules, name))[1] for name in columns}
    if len(set(sizes.values())) != 1:
        raise HywiaError(f"{prefix}: expected coupled matrices of one width, got {sizes}")
    units = next(iter(sizes.values()))
    members = tuple(_outputs(modules, name, 1, units * rows[:i].count(name)) for i, name in enumerate(rows))
    members += tuple(_inputs(modules, name, 1) for name in columns)
    return Group(
        f"{prefix}.mlp",
        "mlp",
        layer,
        units,
        "channel",
        members,
        _unit_parameters(modules, members),
        width_field=entry.mlp.width_field,
    )


def _expert_groups(model: nn.Module, modules: Modules, names: Experts, prefix: str, layer: int) -> Iterator[Group]:
    """One of whole experts, then one of the channels of each."""
    module, router = f"{prefix}.{names.module}", f"{prefix}.{names.router}"
    for parameter in (*names.rows, *names.columns):
        stacked = getattr(modules[module], parameter, None)
        if not isinstance(stacked, nn.Parameter) or stacked.dim() != 3:
            raise HywiaError(
                f"{module}: expected a stacked parameter {parameter!r} [experts, out, in], got "
                f"{type(stacked).__name__}; transformers 5 stacks experts, older versions do not"
            )
    first: Any = getattr(modules[module], names.rows[0])
    count, width = first.shape[0], first.shape[1] // names.rows.count(names.rows[0])
    sizes = {p: getattr(modules[module], p).shape[1] // names.rows.count(p) for p in names.rows}
    sizes |= {p: getattr(modules[module], p).shape[2] for p in names.columns}
    gate: Any = modules.get(router)
    if set(sizes.values()) != {width} or not isinstance(getattr(gate, "weight", None), nn.Parameter):
        raise HywiaError(f"{module}: expected experts of one width and a router {router!r}, got widths {sizes}")
    if gate.weight.shape[0] != count or getattr(gate, "bias", None) is not None:
        raise HywiaError(f"{router}: expected one row of weights for each of {count} experts, and no bias")
    stacks = tuple(dict.fromkeys((*names.rows, *names.columns)))
    whole = (Member(router, 0, 1), *(Member(module, 0, 1, parameter=p) for p in stacks))
    parameters = _unit_parameters(modules, whole)
    least = getattr(text_config(model), names.chosen_field)
    yield Group(
        f"{prefix}.experts",
        "experts",
        layer,
        count,
        "expert",
        whole,
        parameters,
        min_units=least,
        width_field=names.count_field,
    )
    for e in range(count):
        members = tuple(
            Member(module, 0, 1, width * names.rows[:i].count(p), p, e) for i, p in enumerate(names.rows)
        ) + tuple(Member(module, 1, 1, 0, p, e) for p in names.columns)
        yield Group(
            f"{prefix}.mlp.{e}",
            "mlp",
            layer,
            width,
            "channel",
            members,
            _unit_parameters(modules, members),
            tied_width=f"{prefix}.mlp",
            width_field=names.width_field,
        )


def _attention_group(modules: Modules, entry: Architecture, prefix: str, layer: int, size: int) -> tuple[Group, int]:
    """A layer's group, and how many query heads each KV head serves."""
    names = entry.attention
    query, key, value, output = (f"{prefix}.{n}" for n in (names.query, names.key, names.value, names.output))
    width = sizes_of(_linear(modules, output))[1]
    rows = {name: sizes_of(_linear(modules, name))[0] for name in (query, key, value)}
    if query == key == value:
        of_kv = rows[query] - width
        kv_rows = (of_kv // 2, of_kv - of_kv // 2)
    else:
        kv_rows = (rows[key], rows[value])
    heads, kv_heads = width // size, kv_rows[0] // size
    rep = heads // max(kv_heads, 1)
    shapes = (rows[query] if query != key else width, *kv_rows, width)
    if shapes != (kv_heads * rep * size, kv_heads * size, kv_heads * size, kv_heads * rep * size) or not kv_heads:
        raise HywiaError(
            f"{prefix}: expected q, k, v rows and o columns of whole heads of {size}, "
            f"the same number of query heads for every KV head; got {shapes}"
        )
    if names.interleaved and rep != 1:
        raise HywiaError(f"{query}: expected as many key heads as query heads where they lie interleaved, got {shapes}")
    members: tuple[Member, ...]
    # A KV group's query heads are consecutive, so its q rows and o columns are one run of rep·head_dim.
    if names.interleaved:
        members = (_outputs(modules, query, 3 * size),)
    else:
        starts = (0, width, width + kv_rows[0]) if query == key else (0, 0, 0)
        members = (
            _outputs(modules, query, rep * size, starts[0]),
            _outputs(modules, key, size, starts[1]),
            _outputs(modules, value, size, starts[2]),
        )
    members += (_inputs(modules, output, rep * size),)
    vectors = tuple(_vector(modules, f"{prefix}.{name}", kv_heads) for name in names.vectors)
    group = Group(
        f"{prefix}.attention",
        "attention",
        layer,
        kv_heads,
        "head" if rep == 1 else "kv_group",
        members,
        _unit_parameters(modules, members, vectors),
        vectors=vectors,
        width_field=names.kv_heads_field or names.heads_field,
    )
    return group, rep


def _vector(modules: Modules, name: str, units: int) -> Member:
    module, _, parameter = name.rpartition(".")
    found = getattr(modules.get(module), parameter, None)
    if not isinstance(found, nn.Parameter) or found.dim() != 1 or found.numel() % units:
        raise HywiaError(f"{name}: expected a vector with as many entries for each of {units} units")
    return Member(module, 0, found.numel() // units, parameter=parameter)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers.

    Raises:
        HywiaError: an unknown architecture, or no list of layers where the table says.
    """
    entry = architecture(model)
    try:
        layers = model.get_submodule(entry.layers)
    except AttributeError:
        layers = None
    if not isinstance(layers, nn.ModuleList):
        raise HywiaError(f"model: expected a list of layers {entry.layers!r}, found none; wrap no part of the model")
    return layers


def groups(model: nn.Module, modules: Modules | None = None) -> tuple[Group, ...]:
    """Every group of a model, by layer, attention before MLP as in the forward pass.

    Args:
        modules: the model's by name, where the caller has them: walking a model takes milliseconds.

    Raises:
        HywiaError: an unknown model type, or modules that are not what the table says.
    """
    entry = architecture(model)
    modules = dict(model.named_modules()) if modules is None else modules
    size = head_dim(model)
    stock: dict[tuple[int, int], tuple[int, ...]] = {}
    found: list[Group] = []
    for i in range(len(layers_of(model))):
        prefix = f"{entry.layers}.{i}"
        attention, rep = _attention_group(modules, entry, prefix, i, size)
        counts = (attention.units, rep)
        if counts not in stock:
            stock[counts] = stock_head_counts(model, entry, size, *counts)
        found.append(replace(attention, stock_counts=stock[counts]) if stock[counts] else attention)
        if entry.experts is not None and f"{prefix}.{entry.experts.module}" in modules:
            found += _expert_groups(model, modules, entry.experts, prefix, i)
        else:
            found.append(_mlp_group(modules, entry, prefix, i))
    return tuple(found)


def config_widths(model: nn.Module, found: Sequence[Group]) -> dict[str, list[int]]:
    """Config field -> width in each layer that has one, as the modules now are. Fields the config does not have, or
    that mean more than a width to it (a head count that gives the heads' size), are left out."""
    entry = architecture(model)
    names, size = entry.attention, head_dim(model)
    aliases = getattr(type(text_config(model)), "attribute_map", None) or {}
    widths: dict[str, list[int]] = {}
    seen = set()
    for group in found:
        if group.tied_width and group.tied_width in seen:
            continue  # as wide as the first of its layer
        seen.add(group.tied_width)
        by_field = {group.width_field: group.units}
        if group.kind == "attention":
            heads = group.units * (group.members[-1].group_size // size)
            by_field = {names.heads_field: heads, names.kv_heads_field: group.units} if names.free_head_dim else {}
        for field, units in by_field.items():
            if field:
                widths.setdefault(aliases.get(field, field), []).append(units)
    return widths


def left_alone(model: nn.Module) -> list[str]:
    """Modules with parameters that are no part of the language decoder (vision towers, projectors): never measured or
    cut."""
    entry = architecture(model)
    heads = {id(m) for m in (model.get_output_embeddings(), model.get_input_embeddings())}  # type: ignore[operator]
    path = entry.layers.split(".")[:-1]
    module, prefix, others = model, "", []
    for step in path:
        for name, child in module.named_children():
            if name != step and id(child) not in heads and any(True for _ in child.parameters()):
                others.append(prefix + name)
        module, prefix = getattr(module, step), f"{prefix}{step}."
    return others
