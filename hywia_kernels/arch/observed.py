"""What the tests saw of transformers' families that the table lacks, on a small random model of each."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["DERIVED", "MLP_ONLY", "REFUSED"]

_CHANNELS_AND_HEADS = (
    "apertus",
    "exaone4",
    "arcee",
    "biogpt",
    "cohere",
    "cohere2",
    "cwm",
    "deepseek_v3",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone",
    "falcon",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_neo",
    "gpt_neox_japanese",
    "gpt_oss",
    "gptj",
    "granite_swa",
    "helium",
    "hunyuan_v1_moe",
    "internlm3",
    "jais2",
    "lfm2",
    "llama4_text",
    "minicpm3",
    "minimax_m2",
    "ministral",
    "ministral3",
    "nanochat",
    "nemotron",
    "olmo",
    "persimmon",
    "qwen3_5_text",
    "sarvam_mla",
    "sarvam_moe",
    "seed_oss",
    "solar_open",
    "stablelm",
    "vaultgemma",
    "youtu",
)
_EXPERTS_TOO = (
    "deepseek_v2",
    "flex_olmo",
    "granitemoe",
    "granitemoe_swa",
    "granitemoeshared",
    "lara_mini",
    "mellum",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_next",
)

# Family -> kinds of units that can go.
DERIVED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_CHANNELS_AND_HEADS, ("mlp", "attention")),
    **dict.fromkeys(_EXPERTS_TOO, ("mlp", "attention", "experts")),
}

# Families whose attention is left alone.
MLP_ONLY: Mapping[str, tuple[str, ...]] = {
    "codegen": ("mlp",),
    "diffllama": ("mlp",),
    "gpt_bigcode": ("mlp",),
    "laguna": ("mlp",),
}

# Family -> why it is refused.
REFUSED: Mapping[str, str] = {
    "bert": "not causal without `is_decoder`",
    "falcon_h1": "a saved model does not reload to the same logits",
}
