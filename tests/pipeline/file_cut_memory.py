"""Prints, in bytes: the peak of the process's own memory while a model is cut from files to files, above what it was
before; the model's largest tensor; all of its tensors."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hywia_kernels as hk
from benchmarks.memory import HostPeak
from tests.support.cuts import make_plan
from tests.support.tokenizers import write_tokenizer


def build(folder: Path, **sizes: int):
    config = LlamaConfig(vocab_size=131, num_attention_heads=8, num_key_value_heads=8, **sizes)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, max_shard_size="60MB")
    write_tokenizer(folder)
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    return make_plan(model, "both"), largest, sum(p.numel() * p.element_size() for p in model.parameters())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    small, _, _ = build(folder / "small", hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    plan, largest, total = build(folder / "large", hidden_size=512, intermediate_size=4096, num_hidden_layers=8)
    hk.prune_files(folder / "small", small, folder / "small-cut")  # what is imported only once
    with HostPeak() as peak:
        time.sleep(0.2)  # until it looks
        hk.prune_files(folder / "large", plan, folder / "large-cut")
    print(peak.bytes, largest, total)


main(Path(sys.argv[1]))
