"""Baichuan-7B and Baichuan2-7B as LLaMA models: the same mathematics under other names.

Their checkpoints hold queries, keys and values as one matrix `W_pack` `[3 · hidden, hidden]`, one after the other, and
come with Python code of their own. Nothing of that code is needed or run: the matrix is taken apart, and the rest has
LLaMA's names already. Baichuan2 multiplies by its head with every row at length one, which is done here once.

The 13B models (ALiBi instead of rotary embedding) are no LLaMA; they load through their own code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import HywiaError
from . import loaded_weights
from .file_kinds import read_json
from .weight_files import stored_tensors

__all__ = ["converted", "is_rotary", "llama_config", "load"]

_PACKED = ".self_attn.W_pack.weight"
_FREQUENCIES = ".rotary_emb.inv_freq"
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)


def is_rotary(values: dict[str, Any]) -> bool:
    """Whether a config is one of the 7B models: the 13B models, with ALiBi, do not bound their positions."""
    return values.get("model_type") == "baichuan" and "max_position_embeddings" in values


def converted(state: dict[str, Tensor], *, normalised_head: bool) -> dict[str, Tensor]:
    """A LLaMA state dict from a Baichuan-7B one, which is emptied.

    Args:
        state: name -> tensor. normalised_head: bring the rows of the head to length one (Baichuan2).

    Raises:
        HywiaError: a packed matrix does not hold three of one size, or rotary frequencies are not LLaMA's.
    """
    llama: dict[str, Tensor] = {}
    for name in list(state):
        tensor = state.pop(name)
        if name.endswith(_PACKED):
            if tensor.shape[0] % 3:
                raise HywiaError(f"{name}: expected the rows of q, k and v, got {tensor.shape[0]}")
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                llama[f"{name.removesuffix(_PACKED)}.self_attn.{part}_proj.weight"] = rows.clone()
        elif name.endswith(_FREQUENCIES):
            _check_frequencies(name, tensor)
        elif name == "lm_head.weight" and normalised_head:
            llama[name] = torch.nn.functional.normalize(tensor)
        else:
            llama[name] = tensor
    return llama


def _check_frequencies(name: str, stored: Tensor) -> None:
    """Refuse stored rotary frequencies, as old checkpoints have them, that LLaMA would not compute anew."""
    count = stored.numel()
    made = 1.0 / 10000.0 ** (torch.arange(count, dtype=torch.float32) / count)
    if not torch.allclose(stored.float(), made, rtol=1e-2, atol=1e-6):
        raise HywiaError(f"{name}: expected the frequencies of a rotary base of 10000, found others; not a Baichuan-7B")


def llama_config(values: dict[str, Any]) -> Any:
    """The config of the LLaMA model that a Baichuan-7B of this config.json is."""
    from transformers import LlamaConfig

    return LlamaConfig(**{k: values[k] for k in _SHARED if k in values})


def load(folder: Path, dtype: torch.dtype | str) -> Any:
    """The model of a Baichuan-7B directory, of transformers' LLaMA class.

    Args:
        folder: the directory. dtype: "auto" keeps the checkpoint's.

    Raises:
        HywiaError: a tensor is missing, unknown or of another shape; or what `weight_files.stored_tensors` raises.
    """
    from safetensors.torch import load_file
    from transformers import GenerationConfig, LlamaForCausalLM

    values = read_json(folder / "config.json")
    state: dict[str, Tensor] = {}
    # Raises unless the files are whole and no name is there twice.
    for file in dict.fromkeys(tensor.file for tensor in stored_tensors(folder).values()):
        state |= load_file(file)
    wanted = next(iter(state.values())).dtype if dtype == "auto" else dtype
    # The head is brought to length in the dtype it is used in, as the original does.
    state = {name: t if name.endswith(_FREQUENCIES) else t.to(wanted) for name, t in state.items()}  # type: ignore[arg-type]
    # Only Baichuan2 was trained with a loss on the logits' scale, and says so.
    state = converted(state, normalised_head="z_loss_weight" in values)
    config = llama_config(values)
    model, report = loaded_weights.read(None, LlamaForCausalLM, config=config, state_dict=state, dtype=wanted)
    loaded_weights.check_complete(report, str(folder))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = model.name_or_path = str(folder)
    return model
