"""Tokenizers that need no files, and text of their vocabularies."""

from __future__ import annotations

import torch


def byte_tokenizer(special: bool = True):
    """Every byte is a token, 0 to 255; with `special`, begin, end and padding follow."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, *(("<s>", "</s>", "<pad>") if special else ())])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if not special:
        return PreTrainedTokenizerFast(tokenizer_object=core)
    built = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    built.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return built


def write_vocabulary(path) -> None:
    """A GGUF file that holds a tokenizer of 259 tokens, as llama.cpp's converter would write it, and nothing else."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(259)])
    writer.add_token_merges(["t1 t2"])
    writer.add_bos_token_id(256)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def write_tokenizer(folder) -> None:
    """Write the tokenizer of the tiny families' vocabulary, `t0` to `t130`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(131)}, unk_token="t0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="t0", pad_token="t0").save_pretrained(folder)


def text(words: int = 200) -> str:
    """So many of that vocabulary's words."""
    ids = torch.randint(2, 128, (words,), generator=torch.Generator().manual_seed(2))
    return " ".join(f"t{i}" for i in ids.tolist())
