"""Checkpoints for `bench_served`: a tiny one of each family, cut, and configs of big shapes without their weights.

    python -m benchmarks.served_models families DIRECTORY [FAMILY ...]
    python -m benchmarks.served_models shapes DIRECTORY [dense 22x9232 16x5120 13x4403]
    python -m benchmarks.served_models layers DIRECTORY

`families` writes a directory for each of the table of README that is served as text: random weights in bfloat16, heads
of 32, cut by a quarter of the units that the family's stock config can lose (see `CUTS`), and the tokenizer of bytes.
`shapes` writes LLaMA-7B's config with so many heads and channels and nothing else, for vLLM's `--load-format dummy`.
`layers` writes a tiny LLaMA with fewer heads whose layers differ in channels: `blocks` as Nemotron-NAS blocks for vLLM
(`--remote`), and `twin` for transformers (`--reference`).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hywia_kernels as hk
from hywia_kernels.checkpoint.decilm import write_decilm
from hywia_kernels.deploy import serving_rules
from tests.support.tokenizers import byte_tokenizer

from . import models
from .session import argv_of, make_parser

MODULE = "benchmarks.served_models"
SHAPES = ("dense", "22x9232", "16x5120", "13x4403")
_VOCABULARY = 259
_SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
_GQA = dict(_SIZES, num_key_value_heads=4)
_WIDE = dict(_GQA, head_dim=32)
_SLIDING = dict(_WIDE, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2)
_EXPERTS = dict(_WIDE, num_experts_per_tok=2)
# Fields of each family's config beside those that all have.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(_WIDE, tie_word_embeddings=True),
    "mistral": dict(_WIDE, sliding_window=16),
    "qwen2": _GQA,
    "qwen3": _WIDE,
    "gemma": _WIDE,
    "gemma2": dict(_SLIDING, query_pre_attn_scalar=32),
    "gemma3_text": dict(_SLIDING, query_pre_attn_scalar=32),
    "granite": dict(_GQA, logits_scaling=2.0, residual_multiplier=0.5, embedding_multiplier=3.0),
    "smollm3": dict(_GQA, no_rope_layers=[1, 1, 1, 0]),
    "olmo2": _GQA,
    "olmo3": dict(_GQA, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2),
    "phi": dict(_SIZES, partial_rotary_factor=0.5),
    "phi3": _GQA,
    "starcoder2": dict(_GQA, use_bias=True),
    "gpt_neox": dict(_SIZES, rotary_pct=0.5),
    "opt": dict(_SIZES, ffn_dim=512, word_embed_proj_dim=256),
    "gpt2": {"n_embd": 256, "n_layer": 4, "n_head": 8, "n_inner": 512, "n_positions": 256},
    "bloom": {"hidden_size": 256, "n_layer": 4, "n_head": 8},
    "mixtral": dict(_EXPERTS, num_local_experts=4),
    "qwen3_moe": dict(_EXPERTS, num_experts=4, moe_intermediate_size=128, decoder_sparse_step=1),
}
# Kinds of units that a family can lose, the same share in each layer, so that its stock config describes it and vLLM
# takes it; not named: both.
CUTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gemma2", "gemma3_text", "gpt_neox", "opt", "gpt2"), ("mlp",)),
    **dict.fromkeys(serving_rules.VLLM_GUESSES_HEADS, ("mlp",)),
    "bloom": (),
}
_BOTH = ("mlp", "attention")


def tiny(family: str):
    """A model of that type with random weights in bfloat16, large enough that every unit matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ends = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    common = dict(vocab_size=_VOCABULARY, max_position_embeddings=256, **ends)
    config = AutoConfig.for_model(family, **{**common, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
            else:
                parameter.normal_(0.0, 0.08)
    return model.to(torch.bfloat16)


def plan_of(model: Any, units: Sequence[str], layers: tuple[int, int] | None = None) -> hk.Plan:
    """A plan that removes a quarter of the units of these kinds, of those layers or all, ranked at random."""
    scores = hk.score(model, criterion="random", seed=5)
    return hk.plan(scores, group_ratio=0.25, units=tuple(units), layers=layers, align=32)


def write_families(folder: Path, names: Sequence[str], cut: Sequence[str] | None = None) -> None:
    for name in names:
        torch.manual_seed(3)
        model = tiny(name)
        units = CUTS.get(name, _BOTH) if cut is None else cut
        if units:
            hk.prune(model, plan_of(model, units))
        hk.save(model, byte_tokenizer(), folder / name)
        print(f"{name}: {json.loads((folder / name / 'config.json').read_text())['architectures'][0]}", flush=True)


def write_shapes(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        shape = dict(models.SHAPES["7b"])
        if name != "dense":
            heads, shape["intermediate_size"] = map(int, name.split("x"))
            shape["num_attention_heads"] = shape["num_key_value_heads"] = heads
        config = {
            **shape,
            **{"model_type": "mistral", "architectures": ["MistralForCausalLM"], "head_dim": 128, "dtype": "bfloat16"},
            **{"sliding_window": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
            **{"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
        }
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config, indent=2))


def write_layers(folder: Path) -> None:
    torch.manual_seed(3)
    model = tiny("llama")
    heads, channels = plan_of(model, ("attention",)), plan_of(model, ("mlp",), layers=(1, 3))
    keep = {name: (heads if name.endswith("attention") else channels).keep[name] for name in heads.keep}
    left = heads.parameters_after + channels.parameters_after - heads.parameters_before
    hk.prune(model, dataclasses.replace(channels, keep=keep, parameters_after=left))
    write_decilm(model, byte_tokenizer(), folder / "blocks")
    hk.save(model, byte_tokenizer(), folder / "twin")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(MODULE, __doc__)
    parser.add_argument("what", choices=("families", "shapes", "layers"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--cut", nargs="*", choices=_BOTH, help="of families, whatever vLLM takes; default: see CUTS")
    given = parser.parse_args(argv_of(argv))
    if given.what == "families":
        write_families(given.folder, given.names or list(FAMILIES), given.cut)
    elif given.what == "shapes":
        write_shapes(given.folder, given.names or list(SHAPES))
    else:
        write_layers(given.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
