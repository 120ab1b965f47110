"""What the JSON files of a checkpoint's tokenizer and generation ask for. Nothing is run here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import HywiaError
from .file_kinds import check_kind, read_json

__all__ = ["check_generation", "check_tokenizer", "check_tokenizer_class", "tokenizer_config"]

_GENERATION: tuple[tuple[tuple[type, ...], tuple[str, ...]], ...] = (
    (
        (int,),
        (
            *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "num_beams"),
            *("num_return_sequences", "bos_token_id", "eos_token_id", "pad_token_id", "no_repeat_ngram_size"),
        ),
    ),
    ((float, int), ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty")),
    ((bool,), ("do_sample", "use_cache")),
)
_TOKENIZER_CLASS = re.compile(r"\w*Tokeni[sz]er\w*|(Tokenizers|SentencePiece|Python|MistralCommon)Backend")
_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("vocab.json", "vocab.txt"),
)


def check_generation(folder: Path) -> None:
    """Judge generation_config.json, if there is one; its fields become attributes of an object that has methods.

    Raises:
        HywiaError: it is damaged, a field has a method's name, or a value is of a type that transformers does not take.
    """
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.is_file():
        return
    for name, value in read_json(path).items():
        if name.startswith("__") or callable(getattr(GenerationConfig, name, None)):
            raise HywiaError(f"model: {path}: expected fields of generation, got {name!r}, the name of a method")
        items = value if isinstance(value, list) and name == "eos_token_id" else [value]
        for types, names in _GENERATION:
            wrong = [item for item in items if item is not None and type(item) not in types]
            if name in names and wrong:
                raise HywiaError(f"model: {path}: expected {name} to be {types[0].__name__}, got {value!r}")


def check_tokenizer(folder: Path, name: str) -> dict[str, Any]:
    """The content of tokenizer_config.json ({} without one), once the directory is seen to hold a vocabulary.

    Args:
        folder: the directory. name: what the user called it.

    Raises:
        HywiaError: there is no vocabulary, a file is not what its name says, or a named class is no tokenizer.
    """
    stored = [folder / file for file in _VOCABULARIES if (folder / file).is_file()] + sorted(folder.glob("*.tiktoken"))
    values = check_tokenizer_class(folder)
    for file in stored:
        check_kind(file)
    if not stored and not values.get("auto_map"):
        raise HywiaError(
            f"tokenizer: no tokenizer in {name}: expected tokenizer.json or tokenizer.model; copy the tokenizer's "
            "files of the original model beside the weights"
        )
    for extra in ("special_tokens_map.json", "added_tokens.json"):
        if (folder / extra).is_file():
            read_json(folder / extra)
    return values


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, {} without one."""
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def check_tokenizer_class(folder: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, once every class that it or config.json names is seen to be a tokenizer's.

    transformers takes the class of that name, whatever it is, and a model's class would open weights in its own way.

    Raises:
        HywiaError: a file is damaged, or a class has no tokenizer's name.
    """
    values = tokenizer_config(folder)
    config = folder / "config.json"
    for source in (values, read_json(config) if config.is_file() else {}):
        wanted = source.get("tokenizer_class")
        if wanted is not None and not (isinstance(wanted, str) and _TOKENIZER_CLASS.fullmatch(wanted)):
            raise HywiaError(f"tokenizer: expected tokenizer_class to name a tokenizer, got {wanted!r}")
    return values
