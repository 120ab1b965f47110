"""From a model and its table entry to groups and config fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import HywiaError
from ..types import Group, Member
from .configs import stock_head_counts, text_config
from .language import Architecture, Mlp
from .members import linear_of, on_inputs, on_outputs, unit_parameters
from .parts import attention_group, expert_groups, headwise_group
from .table import TABLE
from .views import Modules, sizes_of

__all__ = [
    "adopt",
    "architecture",
    "config_widths",
    "decoder",
    "groups",
    "head_dim",
    "is_known",
    "layers_of",
    "left_alone",
]


_ADOPTED = "_hywia_entry"  # attribute of a model: the entry that was derived for it, and has proven itself


def adopt(model: nn.Module, entry: Architecture | None) -> None:
    """Let a model be described by an entry that is not the table's, or no longer."""
    if entry is None:
        model.__dict__.pop(_ADOPTED, None)
    else:
        model.__dict__[_ADOPTED] = entry


def is_known(model: nn.Module) -> bool:
    """Whether a model's type is in the table."""
    config = getattr(model, "config", None)
    model_type = getattr(config, "base_model_type", None) or getattr(config, "model_type", None)
    return any(model_type in entry.model_types for entry in TABLE)


def architecture(model: nn.Module) -> Architecture:
    """The table's entry for a model, or the one that the model was given by `adopt`.

    Raises:
        HywiaError: the model type is not in the table (the message lists those that are), or a config field has a
            value that the entry does not hold for.
    """
    adopted: Any = model.__dict__.get(_ADOPTED)
    if adopted is not None:
        return adopted
    config = getattr(model, "config", None)
    # A checkpoint whose layers differ in width names its family beside its own type.
    model_type = getattr(config, "base_model_type", None) or getattr(config, "model_type", None)
    entries = [entry for entry in TABLE if model_type in entry.model_types]
    for entry in entries[:-1]:  # the last one's requirements are those that a message names
        if not _unmet(model, entry):
            return entry
    if entries:
        _check_requirements(model, entries[-1])
        return entries[-1]
    known = ", ".join(sorted({t for entry in TABLE for t in entry.model_types}))
    raise HywiaError(
        f"model: expected one of the known model types ({known}), got {model_type!r}; hk.prove(model) derives an entry "
        "from the model's structure, and CONTRIBUTING.md says how to add one to the table"
    )


def _unmet(model: nn.Module, entry: Architecture) -> list[str]:
    """Config fields of an entry's requirements that have another value."""
    config = text_config(model)
    return [name for name, wanted in entry.requires.items() if getattr(config, name, wanted) != wanted]


def _check_requirements(model: nn.Module, entry: Architecture) -> None:
    for name in _unmet(model, entry):
        raise HywiaError(
            f"model: expected {name}={entry.requires[name]!r} in the config of a {entry.model_types[0]} model, got "
            f"{getattr(text_config(model), name)!r}; its layers compute something the table's entry does not describe"
        )


def head_dim(model: nn.Module, layer: int | None = None) -> int:
    """Features of one attention head: of a layer, or of the layer whose heads are largest."""
    entry = architecture(model)
    config, names = text_config(model), entry.attention
    if not names.output:
        return 1  # no head is described
    if names.size_attribute:
        layers: Any = layers_of(model)
        sizes = [getattr(one.get_submodule(names.module), names.size_attribute) for one in layers]
        return max(sizes) if layer is None else sizes[layer]
    if names.size_field:
        return getattr(config, names.size_field)
    return getattr(config, "head_dim", None) or config.hidden_size // getattr(config, names.heads_field)


def decoder(model: Any) -> Any:
    """The part of a model that makes final hidden states of embedded tokens."""
    found, entry = model.get_decoder(), architecture(model)
    if entry.derived:  # some families have something else under the name by which their class looks for it
        layers = model.get_submodule(entry.layers)
        if found is model or not any(m is layers for m in found.modules()):
            return model.get_submodule(entry.layers.partition(".")[0])
    return found


def _mlp_group(modules: Modules, mlp: Mlp, prefix: str, layer: int, called: str = "mlp") -> Group:
    rows = [f"{prefix}.{name}" for name in mlp.rows]
    columns = [f"{prefix}.{name}" for name in mlp.columns]
    sizes: dict[str, int] = {}
    for name in rows:
        outputs, count = sizes_of(linear_of(modules, name))[0], rows.count(name)
        if outputs % count:
            raise HywiaError(f"{name}: expected the rows of {count} matrices of one width, got {outputs}")
        sizes[name] = outputs // count
    sizes |= {name: sizes_of(linear_of(modules, name))[1] for name in columns}
    if len(set(sizes.values())) != 1:
        raise HywiaError(f"{prefix}: expected coupled matrices of one width, got {sizes}")
    units = next(iter(sizes.values()))
    members = tuple(on_outputs(modules, name, 1, units * rows[:i].count(name)) for i, name in enumerate(rows))
    members += tuple(on_inputs(modules, name, 1) for name in columns)
    return Group(
        f"{prefix}.{called}",
        "mlp",
        layer,
        units,
        "channel",
        members,
        unit_parameters(modules, members),
        width_field=mlp.width_field,
    )


def _attention_group(modules: Modules, entry: Architecture, prefix: str, layer: int, size: int) -> tuple[Group, int]:
    """A layer's group, and how many query heads each KV head serves."""
    names = entry.attention
    query, key, value, output = (f"{prefix}.{n}" for n in (names.query, names.key, names.value, names.output))
    width = sizes_of(linear_of(modules, output))[1]
    apart = names.size_field and query != key  # heads of another size than their queries and keys
    if (key == value and query != key) or names.wide_query > 1 or names.more or apart:
        return headwise_group(modules, entry, prefix, layer, size)
    rows = {name: sizes_of(linear_of(modules, name))[0] for name in (query, key, value)}
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
    if names.interleaved and rep != 1 and not entry.derived:
        raise HywiaError(f"{query}: expected as many key heads as query heads where they lie interleaved, got {shapes}")
    members: tuple[Member, ...]
    # A KV group's query heads are consecutive, so its q rows and o columns are one run of rep·head_dim.
    if names.interleaved:
        members = (on_outputs(modules, query, (rep + 2) * size),)
    else:
        starts = (0, width, width + kv_rows[0]) if query == key else (0, 0, 0)
        members = (
            on_outputs(modules, query, rep * size, starts[0]),
            on_outputs(modules, key, size, starts[1]),
            on_outputs(modules, value, size, starts[2]),
        )
    members += (on_inputs(modules, output, rep * size),)
    return attention_group(modules, entry, prefix, layer, kv_heads, rep, members), rep


def _has_heads(modules: Modules, entry: Architecture, prefix: str) -> bool:
    """Whether a layer has all of the entry's attention, and not another kind of it under some of the same names."""
    names = entry.attention
    made = [modules.get(f"{prefix}.{name}") for name in (names.query, names.key, names.value, names.output)]
    if not names.output or None in made:
        return False
    return not (names.kept and getattr(modules[f"{prefix}.{names.module}"], names.kept))


def _has_channels(modules: Modules, mlp: Mlp, prefix: str) -> bool:
    """Whether a layer has an MLP whose channels can go."""
    if not mlp.columns or f"{prefix}.{mlp.columns[0]}" not in modules:
        return False
    owner = f"{prefix}.{mlp.columns[0]}".rpartition(".")[0]
    return not (mlp.kept and getattr(modules[owner], mlp.kept))


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
    sizes = [head_dim(model, i) for i in range(len(layers_of(model)))]
    stock: dict[tuple[int, int], tuple[int, ...]] = {}
    found: list[Group] = []
    for i, size in enumerate(sizes):
        prefix = f"{entry.layers}.{i}"
        if not entry.partial or _has_heads(modules, entry, prefix):
            attention, rep = _attention_group(modules, entry, prefix, i, size)
            counts = (attention.units, rep)
            if counts not in stock:
                stock[counts] = stock_head_counts(model, entry, size, *counts)
            found.append(replace(attention, stock_counts=stock[counts]) if stock[counts] else attention)
        plain = entry.experts is None or f"{prefix}.{entry.experts.module}" not in modules
        if not plain:
            assert entry.experts is not None
            found += expert_groups(model, modules, entry.experts, prefix, i)
        elif not entry.partial or _has_channels(modules, entry.mlp, prefix):
            found.append(_mlp_group(modules, entry.mlp, prefix, i))
        for branch in entry.branches:
            if _has_channels(modules, branch, prefix) and not (plain and branch == entry.mlp):
                name = branch.columns[0].rpartition(".")[0] or branch.columns[0]
                found.append(_mlp_group(modules, branch, prefix, i, name))
    return tuple(found)


def config_widths(model: nn.Module, found: Sequence[Group]) -> dict[str, list[int]]:
    """Config field -> width in each layer that has one, as the modules now are. Fields the config does not have, or
    that mean more than a width to it (a head count that gives the heads' size), are left out."""
    entry = architecture(model)
    names = entry.attention
    aliases = getattr(type(text_config(model)), "attribute_map", None) or {}
    widths: dict[str, list[int]] = {}
    seen = set()
    for group in found:
        if group.tied_width and group.tied_width in seen:
            continue  # as wide as the first of its layer
        seen.add(group.tied_width)
        by_field = {group.width_field: group.units}
        if group.kind == "attention":
            heads = group.units * (group.members[-1].group_size // head_dim(model, group.layer))
            by_field = {names.heads_field: heads, names.kv_heads_field: group.units} if names.free_head_dim else {}
        for field, units in by_field.items():
            if field:
                widths.setdefault(aliases.get(field, field), []).append(units)
    if entry.mlp.width_alias and entry.mlp.width_field in widths:
        widths[entry.mlp.width_alias] = list(widths[entry.mlp.width_field])
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
