"""A tiny random model of every family, and, apart from the table, what its units are.

To test a new entry, add a `Family` here. Odd sizes on purpose; fewer KV heads than query heads where the family has it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# What a unit `u` is on a weight: `(parameter of the layer, u -> the part of that parameter)`.
Part = tuple[str, Callable[[torch.Tensor, int], torch.Tensor]]


def rows(name: str, size: int = 1, start: int = 0) -> Part:
    return name, lambda w, u: w[start + u * size : start + (u + 1) * size]


def columns(name: str, size: int = 1) -> Part:
    return name, lambda w, u: w[:, u * size : (u + 1) * size]


def stored_columns(name: str, size: int = 1, start: int = 0) -> Part:
    """Outputs of a Conv1D, which stores `[in, out]`."""
    return name, lambda w, u: w[:, start + u * size : start + (u + 1) * size]


@dataclass(frozen=True)
class Family:
    """One family's tiny model.

    Attributes:
        name: `config.model_type` (a suffix after a dash tells two of one type apart).
        config: fields of the config beside those all share.
        attention, mlp: the matrices' parts of one unit, names relative to the layer.
        layers: path of the list of layers.
        stock: kinds of cuts, made alike in all layers, that a stock config describes.
        experts: how many there are (0: none); `mlp` is then about one, its names formatted with `e`.
    """

    name: str
    config: dict[str, Any]
    attention: tuple[Part, ...]
    mlp: tuple[Part, ...]
    layers: str = "model.layers"
    stock: tuple[str, ...] = ("mlp", "attention", "both")
    experts: int = 0
    dense_layers: tuple[int, ...] = field(default=())
    dense: tuple[Part, ...] = ()

    def build(self):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(3)
        common = dict(vocab_size=131, max_position_embeddings=64, bos_token_id=1, eos_token_id=None, pad_token_id=0)
        config = AutoConfig.for_model(self.name.partition("-")[0], **{**common, **self.config})
        return randomised(AutoModelForCausalLM.from_config(config).eval())


@torch.no_grad()
def randomised(model):
    """Weights large enough that every unit matters, norms and biases away from their defaults."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0.0, 0.1)
        elif parameter.dim() == 1:
            parameter.copy_(parameter + torch.empty_like(parameter).uniform_(-0.4, 0.4))
        else:
            parameter.normal_(0.0, 0.15)
    return model


def _gated(width: int) -> tuple[Part, ...]:
    return rows("mlp.gate_proj.weight"), rows("mlp.up_proj.weight"), columns("mlp.down_proj.weight")


def _grouped(rep: int, size: int, output: str = "o_proj") -> tuple[Part, ...]:
    return (
        rows("self_attn.q_proj.weight", rep * size),
        rows("self_attn.k_proj.weight", size),
        rows("self_attn.v_proj.weight", size),
        columns(f"self_attn.{output}.weight", rep * size),
    )


_SIZES = dict(hidden_size=36, intermediate_size=44, num_hidden_layers=3)
_GQA = dict(**_SIZES, num_attention_heads=6, num_key_value_heads=3)
_WIDE = dict(**_GQA, head_dim=10)  # six heads of ten: not the hidden size
_SLIDING = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
_VISION = dict(_SIZES, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
_NO_STOCK_HEADS = ("mlp",)
# Every second layer has heads of twice the size, fewer keys, and values that are its keys.
_GEMMA4: dict[str, Any] = dict(
    _WIDE,
    num_hidden_layers=4,
    sliding_window=5,
    layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    global_head_dim=12,
    num_global_key_value_heads=2,
    attention_k_eq_v=True,
    hidden_size_per_layer_input=0,
    final_logit_softcapping=4.0,
    vocab_size=131,
    max_position_embeddings=64,
)
_GEMMA4_VISION = dict(_SIZES, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
_GEMMA4_VISION |= dict(patch_size=4, position_embedding_size=16)


def _neox(name: str, heads: int, **fields: Any) -> Family:
    """Queries, keys and values of a head in consecutive rows of one matrix."""
    size = 36 // heads
    return Family(
        name,
        _SIZES | dict(num_attention_heads=heads) | fields,
        (rows("attention.query_key_value.weight", 3 * size), columns("attention.dense.weight", size)),
        (rows("mlp.dense_h_to_4h.weight"), columns("mlp.dense_4h_to_h.weight")),
        layers="gpt_neox.layers",
        stock=_NO_STOCK_HEADS,
    )


def _experts() -> tuple[Part, ...]:
    width = 12
    return (
        ("mlp.experts.gate_up_proj", lambda w, u: w[u : u + 1]),
        ("mlp.experts.gate_up_proj", lambda w, u: w[width + u : width + u + 1]),
        ("mlp.experts.down_proj", lambda w, u: w[:, u : u + 1]),
    )


_PHI3: tuple[tuple[Part, ...], tuple[Part, ...]] = (
    (
        rows("self_attn.qkv_proj.weight", 12),
        rows("self_attn.qkv_proj.weight", 6, 36),
        rows("self_attn.qkv_proj.weight", 6, 54),
        columns("self_attn.o_proj.weight", 12),
    ),
    (rows("mlp.gate_up_proj.weight"), rows("mlp.gate_up_proj.weight", 1, 44), columns("mlp.down_proj.weight")),
)

FAMILIES: tuple[Family, ...] = (
    Family("llama", _WIDE | dict(tie_word_embeddings=True), _grouped(2, 10), _gated(44)),
    Family("llama-bias", _GQA | dict(attention_bias=True, mlp_bias=True), _grouped(2, 6), _gated(44)),
    Family("mistral", _WIDE | dict(sliding_window=5), _grouped(2, 10), _gated(44)),
    Family(
        "qwen2", _GQA | dict(use_sliding_window=True, max_window_layers=1, sliding_window=5), _grouped(2, 6), _gated(44)
    ),
    Family("qwen3", _WIDE, _grouped(2, 10), _gated(44)),
    Family("gemma", _WIDE, _grouped(2, 10), _gated(44)),
    Family(
        "granite",
        _GQA
        | dict(
            logits_scaling=3.0,
            residual_multiplier=0.6,
            attention_multiplier=0.3,
            embedding_multiplier=2.0,
            mlp_bias=True,
        ),
        _grouped(2, 6),
        _gated(44),
    ),
    Family(
        "gemma2",
        _WIDE | _SLIDING | dict(final_logit_softcapping=4.0, attn_logit_softcapping=3.0, query_pre_attn_scalar=12),
        _grouped(2, 10),
        _gated(44),
    ),
    Family("gemma3_text", _WIDE | _SLIDING | dict(query_pre_attn_scalar=12), _grouped(2, 10), _gated(44)),
    Family(
        "gemma3",
        dict(
            text_config=_WIDE | _SLIDING | dict(vocab_size=131, max_position_embeddings=64, query_pre_attn_scalar=12),
            vision_config=_VISION,
            mm_tokens_per_image=1,
            image_token_index=130,
            boi_token_index=129,
            eoi_token_index=128,
        ),
        _grouped(2, 10),
        _gated(44),
        layers="model.language_model.layers",
    ),
    Family("gemma4_text", _GEMMA4, _grouped(2, 10), _gated(44), stock=_NO_STOCK_HEADS),
    Family(
        "gemma4",
        dict(text_config=_GEMMA4, vision_config=_GEMMA4_VISION, audio_config=None),
        _grouped(2, 10),
        _gated(44),
        layers="model.language_model.layers",
        stock=_NO_STOCK_HEADS,
    ),
    Family("olmo2", _GQA, _grouped(2, 6), _gated(44)),
    Family("olmo3", _GQA | _SLIDING, _grouped(2, 6), _gated(44)),
    Family("smollm3", _GQA | dict(no_rope_layers=[1, 0, 1], attention_bias=True), _grouped(2, 6), _gated(44)),
    Family(
        "phi",
        _GQA | dict(hidden_size=48, tie_word_embeddings=False),
        _grouped(2, 8, "dense"),
        (rows("mlp.fc1.weight"), columns("mlp.fc2.weight")),
    ),
    Family("phi3", _GQA | dict(sliding_window=7), *_PHI3),
    Family(  # its config takes the length of the factors from the head count, whatever the heads' size
        "phi3-longrope",
        _GQA
        | dict(
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=10000.0,
                partial_rotary_factor=0.75,
                short_factor=[1.0, 1.3],
                long_factor=[1.5, 3.0],
                original_max_position_embeddings=16,
                factor=4.0,
            ),
            original_max_position_embeddings=16,
        ),
        *_PHI3,
        stock=_NO_STOCK_HEADS,
    ),
    Family(
        "starcoder2",
        _GQA | dict(sliding_window=5),
        _grouped(2, 6),
        (rows("mlp.c_fc.weight"), columns("mlp.c_proj.weight")),
    ),
    _neox("gpt_neox", 6),
    _neox("gpt_neox-sequential", 4, use_parallel_residual=False, attention_bias=False),
    Family(
        "opt",
        dict(hidden_size=36, ffn_dim=44, num_hidden_layers=3, num_attention_heads=6, word_embed_proj_dim=20),
        _grouped(1, 6, "out_proj"),
        (rows("fc1.weight"), columns("fc2.weight")),
        layers="model.decoder.layers",
        stock=_NO_STOCK_HEADS,
    ),
    Family(
        "opt-350m",  # norms behind attention and MLP
        dict(hidden_size=36, ffn_dim=44, num_hidden_layers=3, num_attention_heads=4, do_layer_norm_before=False),
        _grouped(1, 9, "out_proj"),
        (rows("fc1.weight"), columns("fc2.weight")),
        layers="model.decoder.layers",
        stock=_NO_STOCK_HEADS,
    ),
    Family(
        "gpt2",
        dict(n_embd=36, n_inner=44, n_layer=3, n_head=6, n_positions=64),
        (
            stored_columns("attn.c_attn.weight", 6),
            stored_columns("attn.c_attn.weight", 6, 36),
            stored_columns("attn.c_attn.weight", 6, 72),
            rows("attn.c_proj.weight", 6),
        ),
        (stored_columns("mlp.c_fc.weight"), rows("mlp.c_proj.weight")),
        layers="transformer.h",
        stock=_NO_STOCK_HEADS,
    ),
    Family(
        "bloom",
        dict(hidden_size=36, n_layer=3, n_head=6),
        (rows("self_attention.query_key_value.weight", 18), columns("self_attention.dense.weight", 6)),
        (rows("mlp.dense_h_to_4h.weight"), columns("mlp.dense_4h_to_h.weight")),
        layers="transformer.h",
        stock=(),
    ),
    Family(
        "mixtral",
        _WIDE | dict(intermediate_size=12, num_local_experts=5, num_experts_per_tok=2, sliding_window=6),
        _grouped(2, 10),
        _experts(),
        stock=("mlp", "attention", "both", "experts", "all"),
        experts=5,
    ),
    Family(
        "qwen3_moe",
        _WIDE
        | dict(
            moe_intermediate_size=12,
            num_experts=5,
            num_experts_per_tok=2,
            mlp_only_layers=[1],
            norm_topk_prob=False,
        ),
        _grouped(2, 10),
        _experts(),
        stock=("mlp", "attention", "both", "experts", "all"),
        experts=5,
        dense_layers=(1,),
        dense=_gated(44),
    ),
)
_BUILT: dict[str, Any] = {}


def fresh(family: Family):
    """A new copy of a family's model."""
    if family.name not in _BUILT:
        _BUILT[family.name] = family.build()
    return copy.deepcopy(_BUILT[family.name])


def token_ids() -> torch.Tensor:
    return torch.randint(2, 131, (4, 13), generator=torch.Generator().manual_seed(11))


def fresh_named(name: str):
    return fresh(next(family for family in FAMILIES if family.name == name))
