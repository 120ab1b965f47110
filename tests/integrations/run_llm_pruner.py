"""Runs a script of LLM-Pruner's repository on a tiny model, with at most one import changed.

    python run_llm_pruner.py REPOSITORY SCRIPT theirs|ours TAYLOR OUT

What the script would fetch (tokenizer, weights, text) is made here; what it prunes, and how, is untouched. OUT gets the
model's tensors before and after, and the ids it was calibrated with.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from unittest import mock

import torch

IMPORT = "from LLMPruner.pruner import hf_llama_pruner as llama_pruner"
OURS = "from hywia_kernels.integrations import llm_pruner as llama_pruner"
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8}
KV_HEADS = {"hf_prune.py": 8, "llama3.py": 2}
SAMPLES, LENGTH, VOCABULARY = 4, 16, 40000  # the script's own prompt for the graph has ids up to 29892


def stand_ins(captured: dict) -> dict[str, types.ModuleType]:
    """Modules in place of those that fetch text or measure perplexity on it."""
    examples = types.ModuleType("LLMPruner.datasets.example_samples")
    ids = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(11))
    captured["ids"] = ids
    examples.get_examples = lambda *_, **__: ids.clone()
    perplexity = types.ModuleType("LLMPruner.evaluator.ppl")

    def metric(model, *_, **__):
        captured["after"] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        return {}

    perplexity.PPLMetric = metric
    return {m.__name__: m for m in (examples, perplexity)}


def tiny(cls, config_class, kv_heads: int):
    torch.manual_seed(7)
    config = config_class(
        vocab_size=VOCABULARY,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        initializer_range=0.2,
        use_cache=False,
        attn_implementation="eager",  # the graph cannot see heads through fused attention
        **SHAPE,
    )
    return cls(config).eval()


def main(repository: str, script: str, side: str, taylor: str, out: str) -> None:
    sys.path.insert(0, repository)
    source = (Path(repository) / script).read_text()
    assert source.count(IMPORT) == 1
    if side == "ours":
        source = source.replace(IMPORT, OURS)
    import transformers

    if script == "hf_prune.py":
        from LLMPruner.models.hf_llama.modeling_llama import LlamaForCausalLM
    else:
        from transformers import LlamaForCausalLM
    captured: dict = {}
    model = tiny(LlamaForCausalLM, transformers.LlamaConfig, KV_HEADS[script])
    captured["before"] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    tokenizer = types.SimpleNamespace(pad_token_id=0)
    sys.modules.update(stand_ins(captured))
    sys.argv = [
        *(script, "--block_wise", "--device", "cpu", "--eval_device", "cpu", "--pruner_type", "taylor"),
        *("--taylor", taylor, "--pruning_ratio", "0.5", "--num_examples", str(SAMPLES)),
        *("--block_attention_layer_start", "1", "--block_attention_layer_end", "3"),
        *("--block_mlp_layer_start", "1", "--block_mlp_layer_end", "3"),
    ]
    with (
        mock.patch.object(LlamaForCausalLM, "from_pretrained", return_value=model),
        mock.patch.object(transformers.LlamaTokenizer, "from_pretrained", return_value=tokenizer),
        mock.patch.object(transformers.AutoTokenizer, "from_pretrained", return_value=tokenizer),
    ):
        exec(compile(re.sub(r"\bprint\(j\)", "pass", source), script, "exec"), {"__name__": "__main__"})
    torch.save(captured, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
