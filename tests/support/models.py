"""Random models of any family, by their sizes."""

from __future__ import annotations

import torch


def sizes(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    """Fields of a config as LLaMA and its kin name them."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def random_model(kind: str = "llama", seed: int | None = 0, **fields):
    """A causal language model in eval mode; `kind` is its `model_type`, `fields` are its config's.

    Args:
        seed: None draws the weights from the generator as it stands.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if seed is not None:
        torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).eval()
