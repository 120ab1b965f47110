"""What the tests saw of transformers' families that the table lacks, on a small random model of each."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["DECODERS", "DERIVED", "IMAGES", "MLP_ONLY", "REASONS", "REFUSED"]

_CHANNELS_AND_HEADS = (
    "afmoe",
    "apertus",
    "apertus1p5_text",
    "arcee",
    "aria_text",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "bamba",
    "biogpt",
    "cohere",
    "cohere2",
    "cohere_compass_text",
    "ctrl",
    "cwm",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone",
    "exaone4",
    "exaone_moe",
    "falcon",
    "gemma3n_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_neo",
    "gpt_neox_japanese",
    "gpt_oss",
    "gptj",
    "granite_swa",
    "helium",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "kimi_linear",
    "kolibri1",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "llama4_text",
    "mimo_v2_flash",
    "minicpm3",
    "minimax_m2",
    "minimax_m3_vl_text",
    "ministral",
    "ministral3",
    "modernbert-decoder",
    "mpt",
    "nanochat",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo_hybrid",
    "openai-gpt",
    "persimmon",
    "qwen3_5_text",
    "sarvam_mla",
    "sarvam_moe",
    "seed_oss",
    "solar_open",
    "stablelm",
    "vaultgemma",
    "xglm",
    "youtu",
)
_EXPERTS_TOO = (
    "cohere2_moe",
    "deepseek_v2",
    "flex_olmo",
    "flint",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "jamba",
    "lara_mini",
    "mellum",
    "minimax",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_next",
)

# Families of encoders, which are causal where their config says `is_decoder`, as it does not by default.
DECODERS = (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
)

# Family -> kinds of units that can go.
DERIVED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys((*_CHANNELS_AND_HEADS, *DECODERS), ("mlp", "attention")),
    "dbrx": ("attention",),
    **dict.fromkeys(_EXPERTS_TOO, ("mlp", "attention", "experts")),
}

# Families whose attention is left alone.
MLP_ONLY: Mapping[str, tuple[str, ...]] = dict.fromkeys(
    (
        "codegen",
        "diffllama",
        "doge",
        "gemma4_unified_text",
        "gpt_bigcode",
        "inkling2_loop_text",
        "inkling2_text",
        "inkling_text",
        "laguna",
        "longcat_flash",
        "zaya",
    ),
    ("mlp",),
)

# Families of images and text whose language part is derived, heads and channels.
IMAGES = ("llava", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")

# Why a family is refused -> what its refusal says.
REASONS: Mapping[str, str] = {
    "not causal": "this is no causal language model",
    "no small copy of its config can be made": "no small copy of its config",
    "no part of it is understood": "nothing of its structure could be derived",
    "a saved model does not reload to the same logits": "a saved model reloads to logits that differ",
}

# Family -> why it is refused.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("cpmant", "xlm", "xlnet"), "not causal"),
    **dict.fromkeys(
        (
            "blt",
            "deepseek_v4",
            "dory",
            "dots3_note_text",
            "mamba2",
            "phi4_multimodal",
            "qwen4_exp_text",
            "reformer",
            "rwkv",
            "xlstm",
            "zamba",
            "zamba2",
        ),
        "no small copy of its config can be made",
    ),
    **dict.fromkeys(
        (
            "bitnet",
            "falcon_mamba",
            "hrm_text",
            "jetmoe",
            "mamba",
            "recurrent_gemma",
        ),
        "no part of it is understood",
    ),
    "falcon_h1": "a saved model does not reload to the same logits",
}
