"""What the structure of a small copy of a model says its units may be: hypotheses, in the order to try them.

Linear layers are told by their shapes and, where shapes leave a choice, by names that families of transformers share.
Nothing here is believed: `method/derivation.py` keeps what holds on the copy.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .configs import differs_by_layer, text_config, value_of
from .language import Alibi, Attention, Experts, Gated, Mlp
from .views import is_linear, is_transposed, sizes_of

__all__ = ["Hypotheses", "hypotheses", "layers_of"]

_QUERY = {"q_proj", "query", "q_b_proj", "q_gate_proj", "wq", "Wq", "q_lin", "query_proj", "q"}
_KEY = {"k_proj", "key", "wk", "Wk", "k_lin", "key_proj", "k"}
_VALUE = {"v_proj", "value", "wv", "Wv", "v_lin", "value_proj", "v"}
_BOTH = {"kv_b_proj"}
_ALL = {"query_key_value", "qkv_proj", "Wqkv", "c_attn", "qkv", "W_pack", "wqkv", "in_proj"}
_OUTPUT = {"o_proj", "out_proj", "dense", "c_proj", "wo", "Wo", "out_lin", "proj", "o"}
_HANDS_ON = "store_full_length_kv"  # attribute of attentions whose keys and values later layers take
_SPARSE = "activation_sparsity"  # attribute of MLPs, positive where features are held against the mean of all
_GATES = {"gate_proj", "g_proj", "gate", "attn_gate"}
_GATE_OF_MLP = {"gate_proj", "w1", "gate", "linear_1"}
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_Named = Sequence[tuple[str, nn.Module]]  # modules of all layers, each by its name in its layer
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_query_groups")


@dataclass(frozen=True)
class Hypotheses:
    """What may be an entry's parts; of each list of alternatives the first that holds is to be taken.

    Attributes:
        layers: path of the list of decoder layers.
        attentions: alternatives.
        mlps: for each MLP of a layer its alternatives; the first MLP is the layer's own, others lie beside experts.
        experts: alternatives.
        alone: module of a layer -> why it has no hypothesis, in words.
    """

    layers: str
    attentions: tuple[Attention, ...] = ()
    mlps: tuple[tuple[Mlp, ...], ...] = ()
    experts: tuple[Experts, ...] = ()
    alone: Mapping[str, str] = field(default_factory=dict)


def layers_of(model: Any) -> str | None:
    """The path of the text decoder's list of layers: the list of as many modules as the config has layers, outside of
    any other list; of several the one with the most parameters."""
    config = text_config(model)
    counts = {getattr(config, n, None) for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")}
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists)}
    fitting = {n: m for n, m in outer.items() if len(m) in counts} or {n: m for n, m in outer.items() if len(m)}
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in fitting.items()}
    return max(sizes, key=sizes.__getitem__, default=None)


def hypotheses(model: Any) -> Hypotheses | None:
    """Of a small copy as `narrow` makes it; None where no list of decoder layers is found."""
    path = layers_of(model)
    if path is None:
        return None
    layers: Any = model.get_submodule(path)
    modules: dict[str, nn.Module] = {}
    for layer in layers:  # of kinds that differ; the first of a name stands for all
        for name, module in layer.named_modules():
            modules.setdefault(name, module)
    linears = {n: m for n, m in modules.items() if is_linear(m)}
    config = text_config(model)
    attentions: list[Attention] = []
    taken: set[str] = set()
    everywhere = [pair for layer in layers for pair in layer.named_modules()]
    for layer in layers:  # one kind of layer at a time, whose names are plain
        own = dict(layer.named_modules())
        several, owners = _attentions(own, {n: m for n, m in own.items() if is_linear(m)}, config, everywhere)
        attentions += [one for one in several if one not in attentions]
        taken |= owners
    experts = tuple(_experts(modules, config))
    inside = tuple(e.module for e in experts)
    others = tuple(f"{name}." for name in (*taken, *inside))
    rest = {n: m for n, m in linears.items() if not n.startswith(others)}
    return Hypotheses(path, tuple(attentions), tuple(_mlps(modules, rest, config)), experts)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _one(names: list[str], leaves: set[str]) -> str | None:
    """The only one of the names that ends in one of the leaves."""
    found = [n for n in names if _leaf(n) in leaves]
    return found[0] if len(found) == 1 else None


def _field(config: Any, names: tuple[str, ...]) -> str:
    return next((n for n in names if type(value_of(config, n)) is int), "")


def _attentions(
    modules: Mapping[str, Any], linears: Mapping[str, Any], config: Any, everywhere: _Named
) -> tuple[list[Attention], set[str]]:
    """Alternatives for the attention of a layer, and the modules whose linear layers are such ones'."""
    several: list[Attention] = []
    taken: set[str] = set()
    heads_field, kv_field = _field(config, _HEADS), _field(config, _KV_HEADS)
    owners = dict.fromkeys(n.partition(".")[0] for n in linears if "." in n)
    for owner in owners:
        names = [n for n in linears if n.startswith(f"{owner}.")]
        output, fused = _one(names, _OUTPUT), _one(names, _ALL)
        query, key, value = (_one(names, leaves) for leaves in (_QUERY, _KEY, _VALUE))
        both = _one(names, _BOTH)
        if output is None or not heads_field:
            continue
        if query and key and value:
            apart = (query, key, value)
        elif query and both:
            apart = (query, both, both)
        elif fused:
            apart = (fused, fused, fused)
        else:
            continue
        owner = _inmost(owner, (*apart, output))
        several += _of_heads(modules, linears, config, everywhere, owner, apart, output, heads_field, kv_field)
        taken.add(owner)
    return several, taken


def _inmost(owner: str, names: tuple[str, ...]) -> str:
    """The inmost module in `owner` that holds all of the names."""
    parts = [name.split(".")[:-1] for name in names]
    shared = [step[0] for step in itertools.takewhile(lambda step: len(set(step)) == 1, zip(*parts, strict=False))]
    return ".".join(shared) or owner


def _of_heads(
    modules: Mapping[str, Any],
    linears: Mapping[str, Any],
    config: Any,
    everywhere: _Named,
    owner: str,
    apart: tuple[str, str, str],
    output: str,
    heads_field: str,
    kv_field: str,
) -> Iterator[Attention]:
    heads, width = getattr(config, heads_field), sizes_of(linears[output])[1]
    if width % heads:
        return
    size, (query, key, value) = width // heads, apart
    kv_heads = heads if key == value != query else _kv_heads(linears, apart, width, size)
    if not kv_heads or heads % kv_heads:
        return
    if differs_by_layer(config, "head_dim"):
        return
    usual = value_of(config, "head_dim") or config.hidden_size // heads
    size_field = "" if usual == size else _size_field(config, size)
    if usual != size and not size_field:
        return
    wide = 1
    if query not in (key, value) and key != value:  # keys may be of another size than values
        wide = max(1, sizes_of(linears[query])[0] // (heads * sizes_of(linears[key])[0] // kv_heads))
    more = tuple(
        n
        for n in linears
        if n.startswith(f"{owner}.") and _leaf(n) in _GATES and sizes_of(linears[n])[0] in (width, heads)
    )
    # A norm beside the output's matrix alone is of the hidden states, which may be as wide as all heads.
    vectors, wide_norms = _vectors(everywhere, _inmost(owner, apart), apart, heads, kv_heads, size)
    base = Attention(
        query,
        key,
        value,
        output,
        heads_field=heads_field,
        kv_heads_field=kv_field if getattr(config, kv_field or "", None) == kv_heads else "",
        free_head_dim=bool(size_field) or config.to_dict().get("head_dim") is not None,
        vectors=vectors,
        size_field=size_field,
        wide_query=wide,
        more=more,
        kept=_HANDS_ON if type(getattr(modules[owner], _HANDS_ON, None)) is bool else "",
    )
    interleavings = (False, True) if query == key else (False,)
    for interleaved, norms, alibi in itertools.product(
        interleavings, (wide_norms, {}) if wide_norms else ({},), _alibis(modules[owner])
    ):
        yield replace(base, interleaved=interleaved, wide_norms=norms, alibi=alibi)


def _alibis(attention: nn.Module) -> tuple[Alibi | None, ...]:
    """How a bias by distance, of all heads, may reach the attention; first that there is none."""
    given = inspect.signature(attention.forward).parameters
    names = [n for n in ("alibi", "position_bias") if n in given]
    return (None, *(Alibi(argument=name, axis=axis) for name in names for axis in (-3, 0)))


def _kv_heads(linears: Mapping[str, Any], apart: tuple[str, str, str], width: int, size: int) -> int:
    """How many key heads the shapes have room for; 0 where they are no whole heads."""
    query, key, value = apart
    if query == key:
        rows = sizes_of(linears[query])[0] - width
        return rows // (2 * size) if rows > 0 and rows % (2 * size) == 0 else 0
    rows, of_keys = sizes_of(linears[value])[0], sizes_of(linears[key])[0]
    return rows // size if rows % size == 0 and of_keys % (rows // size) == 0 else 0


def _size_field(config: Any, size: int) -> str:
    """The config field that has the size of what a head gives to the output."""
    names = [k for k, v in config.to_dict().items() if v == size and ("head" in k and ("dim" in k or "size" in k))]
    names += [n for n in ("kv_channels", "d_kv") if getattr(config, n, None) == size]
    return names[0] if names else ""


def _vectors(
    everywhere: _Named, owner: str, apart: tuple[str, str, str], heads: int, kv_heads: int, size: int
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Parameters with entries per head that any layer has, and the norms among them that take all heads together."""
    vectors, norms = list[str](), dict[str, str]()
    for name, module in everywhere:
        if name != owner and not name.startswith(f"{owner}."):
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is None or parameter.dim() != 1 or isinstance(module, nn.Linear) or is_transposed(module):
                continue
            if "bias" in leaf and name == owner:  # what is added to the output, as wide as the hidden states
                continue
            if parameter.numel() in (heads, kv_heads) and parameter.numel() not in (1, size):
                vectors.append(f"{name}.{leaf}")
            elif parameter.numel() in (heads * size, kv_heads * size) and size not in (1, parameter.numel()):
                vectors.append(f"{name}.{leaf}")
                if leaf == "weight":
                    norms[name] = apart[1] if "k" in _leaf(name).split("_")[0] else apart[0]
    return tuple(dict.fromkeys(vectors)), norms


def _width_field(config: Any, width: int) -> str:
    """The config field that has a width; narrow copies give every such field a value of its own."""
    words = ("intermediate", "ffn", "inner", "d_ff")
    names = [k for k, v in config.to_dict().items() if v == width and type(v) is int and any(w in k for w in words)]
    return names[0] if len(names) == 1 else ""


def _mlps(modules: Mapping[str, Any], linears: Mapping[str, Any], config: Any) -> Iterator[tuple[Mlp, ...]]:
    """For each module with one linear layer down to the hidden size, and one or two of its width up from it."""
    hidden = getattr(config, "hidden_size", 0)
    owners = dict.fromkeys(n.rpartition(".")[0] for n in linears)
    children = {owner: [n for n in linears if n.rpartition(".")[0] == owner] for owner in owners}
    if "intermediate.dense" in linears and "output.dense" in linears:  # BERT's two halves
        children["output"] = ["intermediate.dense", "output.dense"]
        children.pop("intermediate", None)
    for owner, names in children.items():
        shapes = {n: sizes_of(linears[n]) for n in names}
        for down in names:
            width = shapes[down][1]
            if shapes[down][0] != hidden or _leaf(down) in _GATE_OF_MLP | {"up_proj", "w3"}:
                continue
            ups = [n for n in names if n != down and shapes[n] == (width, hidden)]
            fused = [n for n in names if n != down and shapes[n] == (2 * width, hidden)]
            field = _width_field(config, width)
            if len(ups) in (1, 2) and not fused:
                ups.sort(key=lambda n: _leaf(n) not in _GATE_OF_MLP)
                plain = Mlp(tuple(ups), (down,), field)
                gated = _gated(modules, owner, ups)
                several = (replace(plain, gated=gated), plain) if gated else (plain,)
                sparse = type(getattr(modules.get(owner), _SPARSE, None)) is float
                yield (*several, *(replace(m, kept=_SPARSE) for m in several)) if sparse else several
            elif len(fused) == 1 and not ups:
                yield (Mlp((fused[0], fused[0]), (down,), field),)
            else:
                continue
            break


def _gated(modules: Mapping[str, Any], owner: str, ups: list[str]) -> Gated | None:
    """The product of a gate, where two matrices lead up and the module holds an activation."""
    activation = next((f"{owner}.{n}" for n in ("act_fn", "act", "activation_fn") if f"{owner}.{n}" in modules), None)
    if len(ups) != 2 or not owner or activation is None or _leaf(ups[0]) not in _GATE_OF_MLP:
        return None
    return Gated(owner, activation)


def _experts(modules: Mapping[str, Any], config: Any) -> Iterator[Experts]:
    """Stacked experts, laid out as their module says; first with their router, then without."""
    for name, module in modules.items():
        stacks = {n: p for n, p in module._parameters.items() if p is not None and p.dim() == 3}
        down = stacks.get("down_proj")
        rows = next((n for n in ("gate_up_proj", "up_proj") if n in stacks), "")
        if len(stacks) != 2 or down is None or not rows:
            continue
        transposed, biased = bool(getattr(module, "is_transposed", False)), f"{rows}_bias" in module._parameters
        wide = 2 if rows == "gate_up_proj" else 1
        concatenated = bool(getattr(module, "is_concatenated", True))
        extra = {n for n, p in module._parameters.items() if p is not None} - {
            *stacks,
            f"{rows}_bias",
            "down_proj_bias",
        }
        up, out, into = stacks[rows], 2 if transposed else 1, 1 if transposed else 2
        if up.shape[out] != wide * down.shape[into] or up.shape[into] != down.shape[out] or extra:
            continue
        owner = name.rpartition(".")[0]
        counts = [f for f in ("num_local_experts", "num_experts", "n_routed_experts") if _is(config, f, up.shape[0])]
        chosen = [f for f in ("num_experts_per_tok", "moe_topk", "top_k_experts") if _is(config, f, None)]
        base = Experts(
            module=name,
            router="",
            rows=(rows,) * (wide if concatenated else 1),
            columns=("down_proj",),
            width_field=_width_field(config, down.shape[into]),
            count_field=counts[0] if counts else "",
            chosen_field=chosen[0] if chosen else "",
            transposed=transposed,
            alternating=1 if concatenated else wide,
            biased=biased,
        )
        if counts and chosen:
            for leaf in ("gate", "router"):
                gate = modules.get(f"{owner}.{leaf}")
                weight = None if gate is None else gate._parameters.get("weight")
                single = gate is not None and gate._parameters.get("bias") is None and hasattr(gate, "num_experts")
                if single and weight is not None and weight.shape[0] == up.shape[0]:
                    yield replace(base, router=f"{owner}.{leaf}")
        yield base
        return


def _is(config: Any, name: str, value: int | None) -> bool:
    found = value_of(config, name)
    return type(found) is int and (value is None or found == value)
