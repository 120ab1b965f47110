"""Tiny models of the LLaMA family; plans over them are `cuts`'s."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from .cuts import CUTS as PLANS
from .cuts import make_plan
from .models import random_model, sizes

__all__ = ["PLANS", "TINY", "Tiny", "fresh", "make_plan"]


@dataclass(frozen=True)
class Tiny:
    """One small configuration; odd sizes on purpose."""

    name: str
    heads: int
    kv_heads: int
    tied: bool
    bias: bool = False
    hidden: int = 48
    head_dim: int = 8
    intermediate: int = 56
    layers: int = 3
    vocabulary: int = 259

    def build(self, seed: int = 0):
        model = random_model(
            seed=seed,
            **sizes(self.vocabulary, self.hidden, self.intermediate, self.layers, self.heads, self.kv_heads),
            head_dim=self.head_dim,
            max_position_embeddings=128,
            tie_word_embeddings=self.tied,
            attention_bias=self.bias,
            mlp_bias=self.bias,
            initializer_range=0.15,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=258,
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith(".bias"):
                    parameter.normal_(0.0, 0.1)
        return model


TINY = (
    Tiny("mha-tied", heads=6, kv_heads=6, tied=True),
    Tiny("mha-untied", heads=6, kv_heads=6, tied=False),
    Tiny("gqa-tied", heads=6, kv_heads=3, tied=True),
    Tiny("gqa-untied", heads=8, kv_heads=2, tied=False, head_dim=6),
    Tiny("gqa-bias", heads=6, kv_heads=3, tied=False, bias=True),
)
_BUILT: dict[str, object] = {}


def fresh(tiny: Tiny):
    """A new copy of a tiny model; building is slower than copying."""
    if tiny.name not in _BUILT:
        _BUILT[tiny.name] = tiny.build()
    return copy.deepcopy(_BUILT[tiny.name])
