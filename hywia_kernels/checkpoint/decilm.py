"""A LLaMA-family model whose MLPs differ in width as a Nemotron-NAS (DeciLM) checkpoint, meant for vLLM.

The format follows vLLM's `nemotron_nas.py`. vLLM 0.23.0 loaded a tiny one, on its CPU engine, and continued prompts as
transformers does (`benchmarks/test_vllm.py`).

That `DeciLMForCausalLM` takes each layer's channels from `block_configs`; its query heads are one number for the
whole model, so attention must be equally wide everywhere. Widths of whole 256s are also written as `ffn_mult`, the only
form that its older releases read. The directory carries its config class: vLLM needs `--trust-remote-code` for it.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from .. import arch
from ..arch.facts import weight_bytes
from ..errors import HywiaError
from . import atomic_directory
from .originals import copy_companions, original
from .replaceable import Input
from .ties import set_ties, tied_head
from .verify import check_tensors

__all__ = ["ffn_mult", "write_decilm"]

FAMILIES = ("llama", "mistral")
CONFIG_FILE = "configuration_decilm.py"


def ffn_mult(width: int, hidden: int) -> float | None:
    """The multiplier that vLLM turns into `width`: `int(2 · mult · hidden / 3)`, then up to a multiple of 256."""
    if width % 256:
        return None
    # Half a channel more than needed: the product's rounding must not fall below a whole number.
    mult = 1.5 * (width - 128) / hidden
    made = int(2 * mult * hidden / 3)
    return mult if -(-made // 256) * 256 == width else None


def _refusal(model: Any, heads: set[int]) -> str | None:
    """Why the format does not hold exactly this model; `heads`: the layers' different numbers of KV heads."""
    config = model.config
    family = getattr(config, "base_model_type", None) or config.model_type
    if family not in FAMILIES:
        return f"expected one of {', '.join(FAMILIES)}, got {family}"
    if getattr(config, "sliding_window", None) is not None:
        return f"expected no sliding_window, got {config.sliding_window}"
    if len(heads) > 1:
        return f"expected as many heads in every layer, got {sorted(heads)}; plan with --units mlp"
    return None


def write_decilm(model: Any, tokenizer: Any, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a directory with the weights under their own names, a config with `block_configs`, and the tokenizer.

    Args:
        model, tokenizer: what to write; the tokenizer may be None.
        path: the directory. overwrite: replace one that holds a model or scores and nothing else.

    Raises:
        HywiaError: the format cannot hold the model exactly, or it cannot be written. UsageError: the directory exists.
    """
    from huggingface_hub import save_torch_state_dict

    groups = arch.groups(model)
    kv_heads = {g.units for g in groups if g.kind == "attention"}
    reason = _refusal(model, kv_heads)
    if reason is not None:
        raise HywiaError(f"decilm: vLLM's blocks hold LLaMA's alone: {reason}")
    path = Path(path)
    source = original(model)
    inputs = () if source is None else (Input("model that is read", source),)
    atomic_directory.check_target(path, overwrite=overwrite, inputs=inputs)
    attention = next(g for g in groups if g.kind == "attention")
    per_group = attention.members[-1].group_size // arch.head_dim(model)
    widths = [g.units for g in groups if g.kind == "mlp"]
    config = _config(model, widths, attention.units * per_group, per_group)
    whole = model.state_dict()
    state = {name: tensor for name, tensor in whole.items() if name != "lm_head.weight" or not tied_head(model)}
    with atomic_directory.directory(path, overwrite=overwrite, inputs=inputs, need=weight_bytes(model)) as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.to_json_file(folder / "generation_config.json", use_diff=True)
        shutil.copyfile(Path(__file__).with_name(CONFIG_FILE), folder / CONFIG_FILE)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(model, tokenizer, folder)
        save_torch_state_dict(state, folder)
        check_tensors(folder, whole)
    return path


def _config(model: Any, widths: list[int], heads: int, per_group: int) -> dict[str, Any]:
    """The content of config.json: `widths` by layer, `heads` query heads, of which `per_group` share a KV head."""
    values = set_ties(copy.deepcopy(model.config), model).to_dict()
    for own in ("base_model_type", "layer_widths", "module_changes", "transformers_version"):
        values.pop(own, None)
    blocks = []
    for width in widths:
        mult = ffn_mult(width, model.config.hidden_size)
        ffn: dict[str, Any] = {"no_op": False, "replace_with_linear": False, "intermediate_size": width}
        if mult is not None:
            ffn["ffn_mult"] = mult
        attention = {"no_op": False, "replace_with_linear": False, "n_heads_in_group": per_group}
        blocks.append({"attention": attention, "ffn": ffn})
    return {
        **values,
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CONFIG_FILE.removesuffix('.py')}.DeciLMConfig"},
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "intermediate_size": max(widths),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // per_group,
        "head_dim": arch.head_dim(model),
        "block_configs": blocks,
    }
