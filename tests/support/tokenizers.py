"""A tokenizer of the tiny families' vocabulary, `t0` to `t130`, and text in it."""

from __future__ import annotations

import torch


def write_tokenizer(folder) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(131)}, unk_token="t0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="t0", pad_token="t0").save_pretrained(folder)


def text(words: int = 200) -> str:
    ids = torch.randint(2, 128, (words,), generator=torch.Generator().manual_seed(2))
    return " ".join(f"t{i}" for i in ids.tolist())
