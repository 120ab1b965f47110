"""The table of architectures: which rows and columns of which modules form the units.

An architecture is an entry, not a class. Module names are relative to the decoder layer; widths are read from the
modules themselves, so a model that has been pruned already is described as it now is. See CONTRIBUTING.md for how to
add one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .errors import HywiaError
from .types import Group, Member

__all__ = ["TABLE", "Architecture", "Attention", "Gated", "Mlp", "architecture", "config_widths", "groups", "linears"]

Modules = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Gated:
    """`module` computes `columns[0](activation(rows[0](x)) * rows[1](x))` and nothing else."""

    module: str
    activation: str


@dataclass(frozen=True)
class Mlp:
    """Channels: row `j` of each of `rows` and column `j` of each of `columns`, with the rows' biases. `gated` lets
    calibration compute the product again instead of keeping it."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    width_field: str
    gated: Gated | None = None


@dataclass(frozen=True)
class Attention:
    """KV groups: one key and one value head with all their query heads, which are consecutive; a head when each KV
    head serves one query head. `rotary` names the function, in the Python module that defines the attention, that
    returns queries and keys `[batch, heads, tokens, head_dim]` rotated by `(cos, sin)`, the halves of a head paired."""

    query: str
    key: str
    value: str
    output: str
    heads_field: str
    kv_heads_field: str
    rotary: str = ""


@dataclass(frozen=True)
class Architecture:
    """One family.

    Attributes:
        model_types: values of `config.model_type` it serves.
        layers: path of the decoder's list of layers.
        mlp, attention: the units' structure inside one layer.
        norms, final_norm: modules of a layer, and of the whole model, that compute `weight · x / rms(x)`, rounding
            `x / rms(x)` to `x`'s dtype, with `variance_epsilon` or `eps` under the root: calibration does not keep
            their outputs.
        residual: matrix of `mlp.columns` whose output is only added to what leaves the layer, so that calibration need
            not multiply by it when it runs a layer again for backward (None: there is none).
        blocks: full names of layer classes that compute `h = x + attention(norms[0](x))`, `y = h + mlp(norms[1](h))`
            and pass every argument but `x` to the attention, whose matrices are `attention`'s and whose `forward`
            ends with the output's: calibration runs such a layer as one node.
        stand_in: model type whose stock config holds the same mathematics where this family's own config refuses a
            width (None: there is none).
        stand_in_needs: config fields that must have these values for the stand-in to be exact.
        stand_in_sets: config fields the stand-in needs besides those both share.
    """

    model_types: tuple[str, ...]
    layers: str
    mlp: Mlp
    attention: Attention
    norms: tuple[str, ...] = ()
    final_norm: str | None = None
    residual: str | None = None
    blocks: tuple[str, ...] = ()
    stand_in: str | None = None
    stand_in_needs: Mapping[str, Any] = field(default_factory=dict)
    stand_in_sets: Mapping[str, Any] = field(default_factory=dict)


TABLE: tuple[Architecture, ...] = (
    # LLaMA 1, 2, 3, Vicuna, SmolLM2, TinyLlama; Mistral has the same modules, and is what a pruned LLaMA is saved as
    # when its head count no longer divides the hidden size.
    Architecture(
        model_types=("llama", "mistral"),
        layers="model.layers",
        mlp=Mlp(
            rows=("mlp.gate_proj", "mlp.up_proj"),
            columns=("mlp.down_proj",),
            width_field="intermediate_size",
            gated=Gated(module="mlp", activation="mlp.act_fn"),
        ),
        attention=Attention(
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            value="self_attn.v_proj",
            output="self_attn.o_proj",
            heads_field="num_attention_heads",
            kv_heads_field="num_key_value_heads",
            rotary="apply_rotary_pos_emb",
        ),
        norms=("input_layernorm", "post_attention_layernorm"),
        final_norm="model.norm",
        residual="mlp.down_proj",
        blocks=(
            "transformers.models.llama.modeling_llama.LlamaDecoderLayer",
            "transformers.models.mistral.modeling_mistral.MistralDecoderLayer",
        ),
        stand_in="mistral",
        stand_in_needs={"attention_bias": False, "mlp_bias": False},
        stand_in_sets={"sliding_window": None},
    ),
)


def architecture(model: nn.Module) -> Architecture:
    """The table's entry for a model.

    Raises:
        HywiaError: the model type is not in the table; the message lists those that are.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for entry in TABLE:
        if model_type in entry.model_types:
            return entry
    known = ", ".join(sorted(t for entry in TABLE for t in entry.model_types))
    raise HywiaError(
        f"model: expected one of the known model types ({known}), got {model_type!r}; "
        "CONTRIBUTING.md says how to add an architecture to the table"
    )


def _linear(modules: Modules, name: str) -> nn.Linear:
    module = modules.get(name)
    if module is None:
        raise HywiaError(f"model: expected a module {name!r}, found none; its structure is not the table's")
    if type(module) is not nn.Linear:
        raise HywiaError(
            f"{name}: expected torch.nn.Linear, got {type(module).__name__}; "
            "load the model without quantisation or adapters"
        )
    return module


def _unit_parameters(modules: Modules, members: tuple[Member, ...]) -> int:
    total = 0
    for member in members:
        linear = _linear(modules, member.module)
        total += member.group_size * linear.weight.shape[1 - member.axis]
        if member.axis == 0 and linear.bias is not None:
            total += member.group_size
    return total


def _mlp_group(modules: Modules, entry: Architecture, prefix: str, layer: int) -> Group:
    members = tuple(Member(f"{prefix}.{name}", 0, 1) for name in entry.mlp.rows)
    members += tuple(Member(f"{prefix}.{name}", 1, 1) for name in entry.mlp.columns)
    sizes = {m.module: _linear(modules, m.module).weight.shape[m.axis] for m in members}
    if len(set(sizes.values())) != 1:
        raise HywiaError(f"{prefix}: expected coupled matrices of one width, got {sizes}")
    units = next(iter(sizes.values()))
    return Group(f"{prefix}.mlp", "mlp", layer, units, "channel", members, _unit_parameters(modules, members))


def _stock_head_counts(model: nn.Module, entry: Architecture, kv_heads: int, rep: int) -> tuple[int, ...]:
    config: Any = model.config
    if entry.stand_in is not None and all(getattr(config, k, v) == v for k, v in entry.stand_in_needs.items()):
        return ()
    return tuple(n for n in range(1, kv_heads + 1) if config.hidden_size % (n * rep) == 0)


def _attention_group(model: nn.Module, modules: Modules, entry: Architecture, prefix: str, layer: int) -> Group:
    names = entry.attention
    query, key, value, output = (
        _linear(modules, f"{prefix}.{n}") for n in (names.query, names.key, names.value, names.output)
    )
    config: Any = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // getattr(config, names.heads_field)
    heads, kv_heads = query.weight.shape[0] // head_dim, key.weight.shape[0] // head_dim
    shapes = (query.weight.shape[0], key.weight.shape[0], value.weight.shape[0], output.weight.shape[1])
    rep = heads // max(kv_heads, 1)
    if shapes != (kv_heads * rep * head_dim, kv_heads * head_dim, kv_heads * head_dim, kv_heads * rep * head_dim):
        raise HywiaError(
            f"{prefix}: expected q, k, v rows and o columns of whole heads of {head_dim}, "
            f"the same number of query heads for every KV head; got {shapes}"
        )
    members = (
        # A KV group's query heads are consecutive, so its q rows and o columns are one run of rep·head_dim.
        Member(f"{prefix}.{names.query}", 0, rep * head_dim),
        Member(f"{prefix}.{names.key}", 0, head_dim),
        Member(f"{prefix}.{names.value}", 0, head_dim),
        Member(f"{prefix}.{names.output}", 1, rep * head_dim),
    )
    return Group(
        f"{prefix}.attention",
        "attention",
        layer,
        kv_heads,
        "head" if rep == 1 else "kv_group",
        members,
        _unit_parameters(modules, members),
        _stock_head_counts(model, entry, kv_heads, rep),
    )


def groups(model: nn.Module) -> tuple[Group, ...]:
    """Every group of a model, by layer, attention before MLP as in the forward pass.

    Raises:
        HywiaError: an unknown model type, or modules that are not what the table says.
    """
    entry = architecture(model)
    layers = model.get_submodule(entry.layers)
    assert isinstance(layers, nn.ModuleList)
    modules = dict(model.named_modules())
    found: list[Group] = []
    for i in range(len(layers)):
        prefix = f"{entry.layers}.{i}"
        found.append(_attention_group(model, modules, entry, prefix, i))
        found.append(_mlp_group(modules, entry, prefix, i))
    return tuple(found)


def linears(model: nn.Module, found: Sequence[Group]) -> dict[str, nn.Linear]:
    """The matrices of groups, by name; one walk over the model."""
    modules = dict(model.named_modules())
    return {m.module: _linear(modules, m.module) for g in found for m in g.members}


def config_widths(model: nn.Module, found: tuple[Group, ...]) -> dict[str, list[int]]:
    """Config field -> width in each layer, as the modules now are."""
    entry = architecture(model)
    by_kind = {kind: [g for g in found if g.kind == kind] for kind in ("mlp", "attention")}
    rep = [g.members[0].group_size // g.members[1].group_size for g in by_kind["attention"]]
    kv_heads = [g.units for g in by_kind["attention"]]
    return {
        entry.mlp.width_field: [g.units for g in by_kind["mlp"]],
        entry.attention.heads_field: [n * r for n, r in zip(kv_heads, rep, strict=True)],
        entry.attention.kv_heads_field: kv_heads,
    }
