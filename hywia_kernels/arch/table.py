"""The table's entries, one per family; what families share is written once."""

from __future__ import annotations

from dataclasses import replace

from .language import Alibi, Architecture, Attention, Experts, Gated, Mlp

__all__ = ["TABLE"]

_GATED_MLP = Mlp(
    rows=("mlp.gate_proj", "mlp.up_proj"),
    columns=("mlp.down_proj",),
    width_field="intermediate_size",
    gated=Gated(module="mlp", activation="mlp.act_fn"),
)
_GROUPED_QUERY = Attention(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    heads_field="num_attention_heads",
    kv_heads_field="num_key_value_heads",
    rotary="apply_rotary_pos_emb",
    plain=(
        "transformers.models.llama.modeling_llama.LlamaAttention",
        "transformers.models.mistral.modeling_mistral.MistralAttention",
        "transformers.models.qwen2.modeling_qwen2.Qwen2Attention",
    ),
)
_MLP_ATTRIBUTES = (("mlp", "intermediate_size", "channels"),)
_NORMS = ("input_layernorm", "post_attention_layernorm")
_LLAMA = Architecture(
    model_types=("llama",),
    title="LLaMA 1, 2, 3, Vicuna, SmolLM2, TinyLlama; Baichuan-7B",
    layers="model.layers",
    mlp=_GATED_MLP,
    attention=_GROUPED_QUERY,
    attributes=_MLP_ATTRIBUTES,
    norms=_NORMS,
    final_norm="model.norm",
    residual="mlp.down_proj",
)
_GEMMA2 = replace(
    _LLAMA,
    model_types=("gemma2",),
    title="Gemma 2",
    norms=(),
    final_norm=None,
    logits=("final_logit_softcapping",),
    residual=None,
)
# Heads of sliding layers are smaller than the others', whose values may be their keys. Layers whose keys and values
# an assistant model takes keep their heads.
_GEMMA4 = replace(
    _GEMMA2,
    model_types=("gemma4_text",),
    title="Gemma 4, text alone",
    attention=replace(
        _GROUPED_QUERY,
        rotary="",
        plain=(),
        free_head_dim=False,
        size_attribute="head_dim",
        kept="store_full_length_kv",
    ),
    experts=Experts(
        module="experts",
        router="",
        rows=("gate_up_proj", "gate_up_proj"),
        columns=("down_proj",),
        width_field="moe_intermediate_size",
        count_field="num_experts",
        chosen_field="top_k_experts",
    ),
    branches=(_GATED_MLP,),
    partial=True,
    attributes=(*_MLP_ATTRIBUTES, ("experts", "intermediate_dim", "expert_channels")),
    placeless={"layer_types": None},
    requires={"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "is_causal": True},
)
# The smallest models' later layers take the keys and values of earlier ones, and keep their heads, as those do; every
# layer has an embedding of the tokens besides.
_GEMMA4_SMALL = replace(
    _GEMMA4, title="Gemma 4 E2B and E4B, text alone", experts=None, together=True, requires={"is_causal": True}
)
# Norms come after attention and MLP, round otherwise than LLaMA's, and take all heads' queries (keys) together.
_OLMO2 = replace(
    _LLAMA,
    model_types=("olmo2",),
    title="OLMo 2",
    attention=replace(
        _GROUPED_QUERY,
        vectors=("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
        wide_norms={"self_attn.q_norm": "self_attn.q_proj", "self_attn.k_norm": "self_attn.k_proj"},
    ),
    norms=(),
    final_norm=None,
    residual=None,
)
_EXPERTS = Experts(
    module="mlp.experts",
    router="mlp.gate",
    rows=("gate_up_proj", "gate_up_proj"),
    columns=("down_proj",),
    width_field="intermediate_size",
    count_field="num_local_experts",
    chosen_field="num_experts_per_tok",
)
_EXPERT_ATTRIBUTES = (
    *_MLP_ATTRIBUTES,
    ("mlp.experts", "num_experts", "experts"),
    ("mlp.experts", "intermediate_dim", "channels"),
    ("mlp.gate", "num_experts", "experts"),
)

TABLE: tuple[Architecture, ...] = (
    # A Llama config refuses head counts that do not divide the hidden size; a Mistral config takes them.
    replace(
        _LLAMA,
        blocks=("transformers.models.llama.modeling_llama.LlamaDecoderLayer",),
        stand_in="mistral",
        stand_in_needs={"attention_bias": False, "mlp_bias": False},
        stand_in_sets={"sliding_window": None},
    ),
    replace(
        _LLAMA,
        model_types=("mistral",),
        title="Mistral",
        blocks=("transformers.models.mistral.modeling_mistral.MistralDecoderLayer",),
    ),
    replace(
        _LLAMA,
        model_types=("qwen2",),
        title="Qwen2, Qwen2.5",
        blocks=("transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer",),
    ),
    replace(
        _LLAMA,
        model_types=("qwen3",),
        title="Qwen3",
        blocks=("transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer",),
    ),
    # Their norms compute (1 + weight) · x / rms(x); Gemma 2 and 3 have one behind the MLP too.
    replace(_LLAMA, model_types=("gemma",), title="Gemma", norms=(), final_norm=None),
    _GEMMA2,
    replace(_GEMMA2, model_types=("gemma3_text",), title="Gemma 3"),
    replace(
        _GEMMA2,
        model_types=("gemma3",),
        title="Gemma 3 with vision",
        layers="model.language_model.layers",
        logits=(),
    ),
    _GEMMA4,
    replace(
        _GEMMA4,
        model_types=("gemma4",),
        title="Gemma 4 (26B-A4B, 31B)",
        layers="model.language_model.layers",
    ),
    _GEMMA4_SMALL,
    replace(
        _GEMMA4_SMALL,
        model_types=("gemma4",),
        title="Gemma 4 E2B, E4B",
        layers="model.language_model.layers",
    ),
    # Multipliers on embeddings, residuals and scores are the model's own; only the head's concerns the loss.
    replace(_LLAMA, model_types=("granite",), title="Granite", logits=("logits_scaling",)),
    replace(_LLAMA, model_types=("smollm3",), title="SmolLM3"),
    _OLMO2,
    replace(_OLMO2, model_types=("olmo3",), title="OLMo 3"),
    Architecture(
        model_types=("phi",),
        title="Phi-1, Phi-2",
        layers="model.layers",
        # vLLM's code takes four times the hidden size where there is no `n_inner`.
        mlp=Mlp(rows=("mlp.fc1",), columns=("mlp.fc2",), width_field="intermediate_size", width_alias="n_inner"),
        attention=replace(_GROUPED_QUERY, output="self_attn.dense"),
        residual="mlp.fc2",
    ),
    replace(
        _LLAMA,
        model_types=("phi3",),
        title="Phi-3, Phi-4",
        mlp=Mlp(
            rows=("mlp.gate_up_proj", "mlp.gate_up_proj"),
            columns=("mlp.down_proj",),
            width_field="intermediate_size",
        ),
        attention=replace(
            _GROUPED_QUERY, query="self_attn.qkv_proj", key="self_attn.qkv_proj", value="self_attn.qkv_proj"
        ),
        attributes=(("self_attn", "num_key_value_heads", "kv_heads"),),
        config_readers=("self_attn",),
    ),
    Architecture(
        model_types=("starcoder2",),
        title="StarCoder2",
        layers="model.layers",
        mlp=Mlp(rows=("mlp.c_fc",), columns=("mlp.c_proj",), width_field="intermediate_size"),
        attention=_GROUPED_QUERY,
        residual="mlp.c_proj",
    ),
    Architecture(
        model_types=("gpt_neox",),
        title="GPT-NeoX, Pythia",
        layers="gpt_neox.layers",
        mlp=Mlp(rows=("mlp.dense_h_to_4h",), columns=("mlp.dense_4h_to_h",), width_field="intermediate_size"),
        attention=Attention(
            query="attention.query_key_value",
            key="attention.query_key_value",
            value="attention.query_key_value",
            output="attention.dense",
            heads_field="num_attention_heads",
            interleaved=True,
            free_head_dim=False,
        ),
    ),
    Architecture(
        model_types=("opt",),
        title="OPT",
        layers="model.decoder.layers",
        mlp=Mlp(rows=("fc1",), columns=("fc2",), width_field="ffn_dim"),
        attention=Attention(
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            value="self_attn.v_proj",
            output="self_attn.out_proj",
            heads_field="num_attention_heads",
            free_head_dim=False,
        ),
        attributes=(("self_attn", "num_heads", "heads"),),
        transparent={"do_layer_norm_before": True},
    ),
    Architecture(
        model_types=("gpt2",),
        title="GPT-2",
        layers="transformer.h",
        mlp=Mlp(rows=("mlp.c_fc",), columns=("mlp.c_proj",), width_field="n_inner"),
        attention=Attention(
            query="attn.c_attn",
            key="attn.c_attn",
            value="attn.c_attn",
            output="attn.c_proj",
            heads_field="n_head",
            free_head_dim=False,
        ),
        attributes=(("attn", "num_heads", "heads"), ("attn", "split_size", "width")),
        requires={"add_cross_attention": False},
        placeless={"scale_attn_by_inverse_layer_idx": False},
    ),
    Architecture(
        model_types=("bloom",),
        title="Bloom, Bloomz",
        layers="transformer.h",
        mlp=Mlp(rows=("mlp.dense_h_to_4h",), columns=("mlp.dense_4h_to_h",), width_field=""),
        attention=Attention(
            query="self_attention.query_key_value",
            key="self_attention.query_key_value",
            value="self_attention.query_key_value",
            output="self_attention.dense",
            heads_field="n_head",
            interleaved=True,
            free_head_dim=False,
            alibi=Alibi(argument="alibi", axis=0),
        ),
        attributes=(("self_attention", "num_heads", "heads"),),
        requires={"slow_but_exact": False},  # which slices the matrices by the hidden size
    ),
    # Code of the checkpoint's own (--trust-remote-code). Baichuan-7B is converted to LLaMA's layout on load.
    Architecture(
        model_types=("baichuan",),
        title="Baichuan-13B, Baichuan2-13B",
        layers="model.layers",
        mlp=_GATED_MLP,
        attention=Attention(
            query="self_attn.W_pack",
            key="self_attn.W_pack",
            value="self_attn.W_pack",
            output="self_attn.o_proj",
            heads_field="num_attention_heads",
            free_head_dim=False,
            alibi=Alibi(argument="attention_mask", axis=-3),
        ),
        attributes=(("self_attn", "num_heads", "heads"), ("self_attn", "hidden_size", "width")),
    ),
    replace(
        _LLAMA,
        model_types=("mixtral",),
        title="Mixtral",
        experts=_EXPERTS,
        attributes=_EXPERT_ATTRIBUTES,
        whole_attributes=(("", "num_experts", "experts"),),  # which the router's auxiliary loss reads
        residual=None,
    ),
    replace(
        _LLAMA,
        model_types=("qwen3_moe",),
        title="Qwen3-MoE",
        experts=replace(_EXPERTS, width_field="moe_intermediate_size", count_field="num_experts"),
        attributes=_EXPERT_ATTRIBUTES,
        whole_attributes=(("", "num_experts", "experts"),),  # which the router's auxiliary loss reads
        residual=None,
    ),
)
