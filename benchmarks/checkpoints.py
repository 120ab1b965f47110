"""Checkpoints of a shape with random weights, written tensor by tensor: no machine has to hold them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from hywia_kernels.checkpoint.weight_writer import WeightWriter

from .models import DTYPES, SHAPES

_SHARD = 5_000_000_000  # bytes, as most published checkpoints have it


def write(folder: Path, shape: str, layers: int | None, dtype: str, device: torch.device, shard: int = _SHARD) -> None:
    """A LLaMA of these sizes, with a tokenizer of a few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = SHAPES[shape] if layers is None else {**SHAPES[shape], "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, max_position_embeddings=2048, tie_word_embeddings=False, dtype=DTYPES[dtype])
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(DTYPES[dtype])
    folder.mkdir(parents=True)
    state = model.state_dict()
    writer = WeightWriter(folder, state, parameters=model.num_parameters(), max_shard_size=shard)
    for name, empty in state.items():
        values = torch.empty(empty.shape, dtype=empty.dtype, device=device)
        writer.put(name, values.fill_(1.0) if "norm" in name else values.normal_(0.0, 0.02))
    writer.finish()
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0").save_pretrained(folder)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Let the system drop the files' pages, so that what comes next reads them from the disk."""
    for file in weight_files(folder):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def copy(source: Path, target: Path) -> None:
    """The weights' files, flushed to the disk as a cut is."""
    target.mkdir()
    for file in weight_files(source):
        shutil.copyfile(file, target / file.name)
        handle = os.open(target / file.name, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(folder: Path) -> int:
    """Reads the weights' files once; returns their bytes."""
    total = 0
    buffer = bytearray(1 << 24)
    for file in weight_files(folder):
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                total += count
    return total
