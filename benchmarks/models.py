"""Whole models to measure: LLaMA shapes with random weights, made on the device, and the bundled SmolLM2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import hywia_kernels as hk

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
    },
    "65b": {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "vocab_size": 32000,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}
SMOLLM2 = "smollm2"
NAMES = (*SHAPES, SMOLLM2)
Change = Callable[[nn.Module], None]


def build(name: str, layers: int | None, dtype: str, device: torch.device, change: Change | None = None):
    """A causal language model in eval mode; `layers` keeps the first so many. Weights are random but SmolLM2's.
    `change` is called on a random model while it has no memory, to give it other widths."""
    if name == SMOLLM2:
        model, _ = hk.load(SMOLLM2, dtype=dtype, device=str(device))
        if layers is not None:
            model.model.layers = model.model.layers[:layers]
            model.config.num_hidden_layers = len(model.model.layers)
        return model
    return _random(name, layers, dtype, device, change)


def _random(name: str, layers: int | None, dtype: str, device: torch.device, change: Change | None):
    """Never on the CPU on its way: a meta model, then memory, then values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[name] if layers is None else {**SHAPES[name], "num_hidden_layers": layers}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=2048))
    if change is not None:
        change(model)
    model = model.to(DTYPES[dtype]).to_empty(device=device).eval()
    # Not a parameter, so `to_empty` left it unset; and its frequencies stay float32.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0.0, 0.02)
            elif type(module).__name__.endswith("RMSNorm"):
                module.weight.fill_(1.0)
    return model


def description(model: nn.Module, shape: str, dtype: str) -> dict[str, str | int]:
    """The columns that say which model a row is about."""
    weights = "pretrained" if shape == SMOLLM2 else "random"
    return {"shape": shape, "layers": model.config.num_hidden_layers, "dtype": dtype, "weights": weights}  # type: ignore


def token_ids(model: nn.Module, samples: int, length: int, device: torch.device) -> torch.Tensor:
    """Random ids `[samples, length]`: what they say does not change the time."""
    return torch.randint(model.get_input_embeddings().num_embeddings, (samples, length), device=device)  # type: ignore
