"""A narrow copy of a model's config: the same kinds of layers, few of them, and small enough to try things on.

What a config's fields mean goes by their names, as families of transformers use them. A family for which the narrow
values contradict each other is made less narrow, step by step, until its config and its model accept them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .classes import auto_class

__all__ = ["MOST_PARAMETERS", "narrow", "narrow_configs"]

MOST_PARAMETERS = 60_000_000  # of a copy that is still small
_VOCABULARY = 192
_TAKERS = "num_kv_shared_layers"
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_query_groups", "kv_n_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "model_dim", "emb_dim")
_HEAD_SIZES = ("head_dim", "attention_head_size", "kv_channels", "d_kv", "v_head_dim", "global_head_dim")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts")
# Numbers for fields that have no meaning of their own here; those that are smaller already stay.
_SMALL = {
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"), 128),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "sliding_window_size"), 8),
    **{"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "o_lora_rank": 24},
    **{"swa_head_dim": 8, "swa_v_head_dim": 12, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 64},
    **{"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 16, "ssm_state_size": 8},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"linear_num_heads": 2, "linear_head_dim": 8},
    **{
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": _VOCABULARY,
        "unpadded_vocab_size": _VOCABULARY,
        "num_nextn_predict_layers": 0,
    },
    **{
        "n_groups": 2,
        "mamba_n_groups": 2,
        "n_group": 2,
        "topk_group": 1,
        "num_expert_group": 2,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
    },
    **{"num_dense_layers": 1, "first_num_dense_layers": 1, "moe_layer_start_index": 1, "embedding_size": 40},
    **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    **{"word_embed_proj_dim": 40, "laurel_rank": 8, "rotary_dim": 4},
}


def _field(values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of the names that the config has a whole number for."""
    return next((n for n in names if type(values.get(n)) is int and values[n] > 0), None)


def _chosen_layers(values: Mapping[str, Any], layers: int, most: int) -> list[int]:
    """Layers that stand for all: the first ones, and one of each kind that a list by layer names, in their order."""
    per_layer = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == layers]
    takers = values.get(_TAKERS) or 0  # of the last layers, which take the keys and values of others
    kinds = [str([*(v[i] for v in per_layer), i >= layers - takers]) for i in range(layers)]
    chosen = [i for i in range(layers) if kinds.index(kinds[i]) == i][: (3 if takers else 2) * most]
    chosen += [i for i in range(layers) if i not in chosen][: max(0, min(most, layers) - len(chosen))]
    return sorted(chosen)


def _fewer_layers(values: dict[str, Any], most: int) -> None:
    name = _field(values, _LAYERS)
    if name is None:
        return
    layers = values[name]
    chosen = _chosen_layers(values, layers, most)
    for field, value in values.items():
        if isinstance(value, (list, tuple)) and len(value) == layers and field not in ("architectures",):
            values[field] = [value[i] for i in chosen]
        elif (
            field in ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "cross_attention_layers")
            and value
        ):
            values[field] = [new for new, old in enumerate(chosen) if old in value] or [0]
    own = values.get("per_layer_config")
    if isinstance(own, dict):
        places = {old: str(new) for new, old in enumerate(chosen)}
        values["per_layer_config"] = {places[int(k)]: v for k, v in own.items() if int(k) in places}
    if values.get(_TAKERS):
        values[_TAKERS] = sum(i >= layers - values[_TAKERS] for i in chosen)
    values[name] = len(chosen)
    for field in _LAYERS:
        if field in values and type(values[field]) is int:
            values[field] = len(chosen)


def _smaller(values: dict[str, Any]) -> None:
    for field, small in _SMALL.items():
        if type(values.get(field)) is int and values[field] > small:
            values[field] = small
    if "vocab_size" in values:
        values["vocab_size"] = min(_VOCABULARY, values["vocab_size"])
    for field, value in values.items():
        if field.endswith(("token_id", "token_index", "image_token")) and _beyond(value):
            values[field] = [1] if isinstance(value, list) else 1
    for field in _EXPERT_COUNTS:
        if type(values.get(field)) is int:
            values[field] = min(8, values[field])
    for field in _CHOSEN:
        if type(values.get(field)) is int:
            values[field] = min(2, values[field])


def _beyond(token: Any) -> bool:
    tokens = token if isinstance(token, list) else [token]
    return any(type(t) is int and t >= _VOCABULARY for t in tokens)


def _narrower(values: dict[str, Any], size: int) -> None:
    """Few heads of `size`, with as many keys and values for each as before, and narrow MLPs."""
    heads_field, hidden_field = _field(values, _HEADS), _field(values, _HIDDEN)
    if heads_field is None or hidden_field is None:
        return
    kv_field = _field(values, _KV_HEADS)
    heads, kv_heads = values[heads_field], values[kv_field] if kv_field else None
    hidden, states_size = values[hidden_field], _field(values, _HEAD_SIZES[:4])
    few = 4 if kv_heads in (None, heads) else 8
    wide = states_size is not None and values[states_size] * heads != hidden
    values[heads_field] = few
    for field in values:
        number = type(values[field]) is int and values[field] > 0
        if number and "head" in field and ("num" in field or field.startswith("n_")) and "linear" not in field:
            if not field.startswith(("mamba", "index", "ssm")):
                own_kv = "kv" in field or "key" in field or "group" in field
                before = values[field]
                values[field] = (1 if before == 1 else 4) if own_kv and few == 8 else few
        elif number and field in _HEAD_SIZES:
            values[field] = size + (4 if field == "v_head_dim" else 0)
    if type(values.get("qk_rope_head_dim")) is int and values["qk_rope_head_dim"]:
        values["qk_rope_head_dim"] = 4
        if type(values.get("qk_head_dim")) is int and type(values.get("qk_nope_head_dim")) is int:
            values["qk_head_dim"] = values["qk_nope_head_dim"] + 4
        if "head_dim" in values:
            values["head_dim"] = 4  # which rotary embedding reads, where a head has a part without
    if kv_field is not None and kv_heads is not None:
        values[kv_field] = few if kv_heads == heads else 1 if kv_heads == 1 else 4
    narrow_hidden = few * size + (8 if wide else 0)
    for field in _HIDDEN:
        if type(values.get(field)) is int:
            values[field] = narrow_hidden
    _narrow_mlps(values, narrow_hidden)
    for own in (values.get("per_layer_config") or {}).values():
        _narrower_layer(own, values, few, size)
    if type(values.get("mamba_d_head", values.get("mamba_headdim"))) in (int, str):
        for field in ("mamba_d_head", "mamba_headdim"):
            if field in values:
                values[field] = size
        for field in ("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"):
            if type(values.get(field)) is int:
                values[field] = values.get("mamba_expand", 2) * narrow_hidden // size
    elif type(values.get("mamba_head_dim")) is int:
        values["mamba_head_dim"], values["mamba_num_heads"] = size, 4


def _narrower_layer(own: dict[str, Any], values: Mapping[str, Any], few: int, size: int) -> None:
    """What one layer has instead of the config's values: heads of twice the size, and as many as there are."""
    for field in own:
        if field in _HEAD_SIZES:
            own[field] = 2 * size
        elif field in _HEADS:
            own[field] = few
        elif field in _KV_HEADS:
            own[field] = values.get(field, few)
        elif type(own[field]) is int and own[field] > _SMALL.get(field, own[field]):
            own[field] = _SMALL[field]


def _narrow_mlps(values: dict[str, Any], hidden: int) -> None:
    """Widths that differ from all others, so that a matrix's shape tells which field it has its width from."""
    widths = [
        field
        for field, value in values.items()
        if ((type(value) is int and value > 0) or _all_whole(value))
        and ("intermediate" in field or "ffn" in field or field in ("n_inner", "inner_dim", "d_ff"))
        and not field.startswith("num_")
    ]
    for i, field in enumerate(sorted(widths)):
        width = 40 + 8 * i + (8 if 40 + 8 * i == hidden else 0)
        values[field] = [width] * len(values[field]) if isinstance(values[field], (list, tuple)) else width


def _all_whole(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(type(v) is int and v > 0 for v in value)


def _shares(section: Sequence[int], shrink: float) -> list[int]:
    """Sections of a head's frequencies, in the same proportion of a head that is smaller."""
    ends = [round(shrink * sum(section[: i + 1])) for i in range(len(section))]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def _plain_rotary(values: dict[str, Any], shrink: float) -> None:
    """Rotary embedding without factors whose number goes with the head's size, which shrinks; it moves no unit."""

    def plain(one: Mapping[str, Any]) -> dict[str, Any]:
        lists = {k: v for k, v in one.items() if not isinstance(v, (list, tuple))}
        if len(lists) == len(one) and "dynamic" not in str(one.get("rope_type")):
            return {**one, "rope_theta": one.get("rope_theta") or 10000.0}
        kept = {k: v for k, v in lists.items() if k in ("partial_rotary_factor", "mrope_interleaved")}
        if isinstance(one.get("mrope_section"), (list, tuple)):  # of time, height and width
            kept["mrope_section"] = _shares(one["mrope_section"], shrink)
        return {**kept, "rope_type": "default", "rope_theta": one.get("rope_theta") or 10000.0}

    parameters = values.get("rope_parameters")
    if isinstance(parameters, dict) and any(isinstance(v, dict) for v in parameters.values()):
        values["rope_parameters"] = {k: plain(v) if isinstance(v, dict) else v for k, v in parameters.items()}
    elif isinstance(parameters, dict):
        values["rope_parameters"] = plain(parameters)


def _head_size(values: Mapping[str, Any]) -> int:
    """Features of a head; 0 where the config does not say."""
    heads_field, hidden_field = _field(values, _HEADS), _field(values, _HIDDEN)
    if type(values.get("head_dim")) is int:
        return values["head_dim"]
    return values[hidden_field] // values[heads_field] if heads_field and hidden_field else 0


def _narrow_vision(values: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """A small tower of images, which gives the text's decoder what it takes."""
    hidden_field = _field(text, _HIDDEN)
    hidden = text[hidden_field] if hidden_field is not None else 32
    small = {
        **dict.fromkeys(("depth", "num_hidden_layers"), 2),
        **dict.fromkeys(("num_heads", "num_attention_heads"), 2),
        **{"embed_dim": 32, "intermediate_size": 48, "head_dim": 16, "out_hidden_size": hidden},
        "hidden_size": hidden if "embed_dim" in values else 32,
    }
    changed = {k: small[k] if k in small and type(v) is int else v for k, v in values.items()}
    return {k: [0] if k.endswith("indexes") and isinstance(v, (list, tuple)) else v for k, v in changed.items()}


def _narrowed(values: dict[str, Any], size: int | None, most_layers: int) -> dict[str, Any]:
    values = copy.deepcopy(values)
    _fewer_layers(values, most_layers)
    _smaller(values)
    if size is not None:
        before = _head_size(values)
        _narrower(values, size)
        _plain_rotary(values, size / before if before else 1.0)
    for part in ("attn_config", "ffn_config"):
        if isinstance(values.get(part), dict) and size is not None:
            _smaller(values[part])
            _narrow_mlps(values[part], 0)
            for field in _KV_HEADS:
                if type(values[part].get(field)) is int:
                    values[part][field] = 1 if values[part][field] == 1 else 2
    return values


def narrow_configs(config: Any) -> Iterator[Any]:
    """Configs of small models of one family, the narrowest first; the last have the whole width and few layers.

    Args:
        config: of a causal language model, or of a model with one (`text_config`).
    """
    values = config.to_dict()
    inside = isinstance(values.get("text_config"), dict) and config.get_text_config() is not config
    for size, layers in ((16, 2), (32, 2), (64, 2), (None, 2), (None, 1)):
        changed = _narrowed(values["text_config"] if inside else values, size, layers)
        if inside:
            changed = {**values, "text_config": changed}
            if isinstance(values.get("vision_config"), dict) and size is not None:
                changed["vision_config"] = _narrow_vision(values["vision_config"], changed["text_config"])
        for part in ("quantization_config", "transformers_version", "architectures", "dtype", "torch_dtype"):
            changed.pop(part, None)
        try:
            made = type(config).from_dict(changed)
        except Exception:  # each family has errors of its own for values that contradict each other
            continue
        made._attn_implementation = getattr(config, "_attn_implementation", None)
        yield made


def narrow(config: Any, *, seed: int = 0) -> Any:
    """A small random model of a config's family, on the CPU in float32 and in eval mode; None where none can be made.

    Weights are large enough for every unit to matter, and norms and biases are away from their usual values.
    """
    import torch

    for made in narrow_configs(config):
        try:
            with torch.device("meta"):
                shapes = auto_class(made).from_config(copy.deepcopy(made), trust_remote_code=False)
            if sum(p.numel() for p in shapes.parameters()) > MOST_PARAMETERS:
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = auto_class(made).from_config(made, trust_remote_code=False, dtype=torch.float32).eval()
                _randomise(model)
                with torch.no_grad():
                    out = model(input_ids=torch.arange(3, 15)[None], use_cache=False)
            if bool(torch.isfinite(out.logits).all()):
                return model
        except Exception:  # as above: the family's own checks, or shapes that do not fit
            continue
    return None


def _randomise(model: Any) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
            else:
                parameter.normal_(0.0, 0.15)
