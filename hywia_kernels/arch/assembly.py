"""Parts that hold, put together to an entry: with the numbers that modules keep of their units."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .configs import text_config
from .language import Architecture, Attention, Experts, Mlp
from .views import sizes_of

__all__ = ["assembled", "attributes_of"]

_HEAD_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads", "num_query_heads")
_KV_ATTRIBUTES = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
_WIDTH_ATTRIBUTES = ("embed_dim", "hidden_size", "all_head_size", "attn_dim", "q_size", "split_size", "inner_dim")


_NO_ATTENTION = Attention("", "", "", "", heads_field="num_attention_heads", free_head_dim=False)
_NO_MLP = Mlp((), (), "")


def attributes_of(
    model: Any, path: str, attention: Attention, mlp: Mlp, experts: Experts | None
) -> tuple[tuple[tuple[str, str, str], ...], tuple[str, ...]]:
    """Numbers that a layer's modules keep of their units, and modules whose forward reads them from the config."""
    layers: Any = model.get_submodule(path)
    modules: dict[str, Any] = {}
    for layer in layers:
        for name, module in layer.named_modules():
            modules.setdefault(name, module)
    found: list[tuple[str, str, str]] = []
    readers: list[str] = []
    config = text_config(model)
    if attention.output:
        heads, width = getattr(config, attention.heads_field), sizes_of(modules[attention.output])[1]
        named: list[tuple[Sequence[str], str, int]] = [
            (_HEAD_ATTRIBUTES, "heads", heads),
            (_WIDTH_ATTRIBUTES, "width", width),
            (_KV_ATTRIBUTES, "kv_heads", _kv_heads(config, attention, modules, width // heads)),
        ]
        fields = [attention.heads_field, attention.kv_heads_field, "head_dim"] if attention.kv_heads_field else []
        owners = [
            n for n in modules if n and (attention.output.startswith(f"{n}.") or attention.query.startswith(f"{n}."))
        ]
        for name in owners:
            for attributes, quantity, value in named:
                for attribute in attributes:
                    if vars(modules[name]).get(attribute) == value and type(value) is int:
                        found.append((name, attribute, quantity))
            if any(f"self.config.{f}" in _forward_text(modules[name]) for f in fields):
                readers.append(name)
    for name, module in modules.items():
        own = (mlp.columns and mlp.columns[0].startswith(f"{name}.")) or (
            experts is not None and experts.module == name
        )
        if own and name:
            for attribute in ("intermediate_size", "intermediate_dim", "ffn_dim"):
                if type(vars(module).get(attribute)) is int:
                    found.append((name, attribute, "channels"))
    if experts is not None and experts.router:
        found += [(n, "num_experts", "experts") for n in (experts.module, experts.router)]
    return tuple(found), tuple(readers)


def _kv_heads(config: Any, attention: Attention, modules: Mapping[str, Any], size: int) -> int:
    """How many key heads there are: by the config, or by the shapes where it does not say."""
    if attention.kv_heads_field:
        return getattr(config, attention.kv_heads_field)
    rows = sizes_of(modules[attention.value])[0]
    if attention.query == attention.value:
        return (rows - sizes_of(modules[attention.output])[1]) // (2 * size)
    return getattr(config, attention.heads_field) if attention.key == attention.value else rows // size


def _forward_text(module: nn.Module) -> str:
    try:
        return inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return ""


def assembled(
    model: Any, path: str, attention: Attention | None, mlps: tuple[Mlp, ...], experts: Experts | None
) -> Architecture:
    """The entry of these parts, for models of the copy's type."""
    attention = attention or _NO_ATTENTION
    own = next((m for m in mlps if experts is None or not _beside(m, experts)), _NO_MLP)
    attributes, readers = attributes_of(model, path, attention, own, experts)
    return Architecture(
        model_types=(model.config.model_type,),
        title=model.config.model_type,
        layers=path,
        mlp=own,
        attention=attention,
        experts=experts,
        branches=tuple(m for m in mlps if m is not own),
        partial=True,
        derived=True,
        attributes=attributes,
        whole_attributes=(("", "num_experts", "experts"),) if experts is not None and experts.router else (),
        config_readers=readers,
        logits=None,
    )


def _beside(mlp: Mlp, experts: Experts) -> bool:
    """Whether an MLP lies in a module of its own beside a layer's experts."""
    owner, of_experts = mlp.columns[0].rpartition(".")[0], experts.module.rpartition(".")[0]
    return owner != of_experts and (not of_experts or owner.startswith(f"{of_experts}."))
