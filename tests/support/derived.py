"""Small random models of families that the table of architectures lacks, and what is done with each."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import hywia_kernels as hk
from hywia_kernels.arch import narrow, observed
from hywia_kernels.method import derivation

_SECTIONS = {"rope_theta": 1e6, "mrope_section": [16, 24, 24], "rope_type": "default"}
# Fields that published checkpoints state and transformers' defaults lack, or by which they show more of the family.
FIELDS: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in observed.DECODERS},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "head_dim": 64},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen2_vl": {"text_config": {"rope_parameters": _SECTIONS}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _SECTIONS}},
}


@dataclass(frozen=True)
class Outcome:
    """What became of one family.

    Attributes:
        status: "derived", "MLP only", "heads only" or "refused", and for a refusal why.
        kinds: kinds of units that can go.
        logits, tokens: of the cut model in memory, and what it goes on with without a cache.
        seconds: of the proof.
    """

    status: str
    kinds: tuple[str, ...] = ()
    logits: torch.Tensor | None = None
    tokens: list[list[int]] | None = None
    seconds: float = 0.0


@functools.cache
def prompt() -> torch.Tensor:
    return torch.randint(5, 190, (2, 12), generator=torch.Generator().manual_seed(11))


def config_of(model_type: str):
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **FIELDS.get(model_type, {}))


def small(model_type: str, seed: int = 1):
    """A small random model of a family; None where none can be made of its default config."""
    return narrow.narrow(config_of(model_type), seed=seed)


def status_of(proof: derivation.Proof) -> str:
    if "attention" not in proof.kinds:
        return "MLP only"
    return "derived" if "mlp" in proof.kinds else "heads only"


def pruned(model_type: str, folder: Path) -> Outcome:
    """Derive, prove, cut by the recipe's steps and save a family's small model."""
    model = small(model_type)
    try:
        if model is None:
            derivation.derived(SimpleNamespace(config=config_of(model_type)))
        proof = hk.prove(model)
    except hk.HywiaError as refused:
        return Outcome(f"refused: {refused}")
    assert proof is not None, f"{model_type} is in the table"
    units = tuple(k for k in ("mlp", "attention") if k in proof.kinds)  # whole experts: test_experts_together.py
    recipe = hk.Recipe(criterion="magnitude", group_ratio=0.4, units=units, align=8)
    result = hk.compress(model, None, recipe)
    hk.save(model, None, folder, result=result)
    tokens = prompt()
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    ids = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=6,
        use_cache=False,
        eos_token_id=None,
    )
    return Outcome(status_of(proof), proof.kinds, logits, ids.tolist(), proof.seconds)
