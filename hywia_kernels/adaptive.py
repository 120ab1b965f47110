"""Checkpoints whose layers differ in width, which no stock config can describe.

`config.json` is the family's config with `model_type` replaced, so that stock loaders refuse it by name instead of
failing on a shape, plus `layer_widths`: config field -> width in each layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import arch, surgery
from .errors import HywiaError
from .load import ADAPTIVE

__all__ = ["load_adaptive", "save_adaptive"]


def save_adaptive(model: Any, folder: Path, widths: Mapping[str, Sequence[int]]) -> None:
    """Write weights, generation config and config, the config last."""
    from huggingface_hub import save_torch_state_dict

    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    stored: set[int] = set()
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in stored:  # of tied weights the first name, which is the embedding's
            stored.add(tensor.data_ptr())
            state[name] = tensor
    save_torch_state_dict(state, folder)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["base_model_type"] = config.get("model_type")
    config["model_type"] = ADAPTIVE
    config["layer_widths"] = {field: list(w) for field, w in widths.items()}
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adaptive(folder: Path, dtype: Any) -> Any:
    """Build the family's model, give each layer its widths, and load the weights into it.

    Raises:
        HywiaError: the directory is damaged or was written by an incompatible version.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    values = json.loads((folder / "config.json").read_text())
    widths = values.pop("layer_widths")
    base, saved_dtype = values.pop("base_model_type"), values["dtype"]
    values.pop("model_type")
    config = AutoConfig.for_model(base, **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    surgery.resize(model, _counts(model, widths))
    # Parameters only: rotary frequencies stay float32 in every dtype.
    state = {k: v.to(getattr(torch, saved_dtype) if dtype == "auto" else dtype) for k, v in _read(folder).items()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    empty = [name for name, p in model.named_parameters() if p.is_meta]
    if empty or unexpected:
        raise HywiaError(f"model: {folder} lacks {empty or 'nothing'} and has unknown {unexpected or 'nothing'}")
    del missing  # tied weights are stored once; what is truly missing is still on the meta device
    _restore_buffers(model, config)
    model.config.dtype = next(model.parameters()).dtype
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _counts(model: nn.Module, widths: Mapping[str, Sequence[int]]) -> dict[str, int]:
    entry = arch.architecture(model)
    fields = {"mlp": entry.mlp.width_field, "attention": entry.attention.kv_heads_field}
    return {g.name: widths[fields[g.kind]][g.layer] for g in arch.groups(model)}


def _read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def _restore_buffers(model: nn.Module, config: Any) -> None:
    """Buffers that no checkpoint stores (rotary frequencies) come from a one-layer model of the same config."""
    from transformers import AutoModelForCausalLM

    small = type(config).from_dict({**config.to_dict(), "num_hidden_layers": 1, "vocab_size": 8, "pad_token_id": None})
    donor = AutoModelForCausalLM.from_config(small)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, donor.get_submodule(owner).get_buffer(leaf))
