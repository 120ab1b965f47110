"""GGUF files by llama.cpp's own library: quantised, and their perplexity. Needs `pip install cyllama`, its bindings.

The bindings that serve (`xllamacpp`, see `served_engines`) have neither the quantiser nor the logits of a prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FORMATS = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}  # llama.h's LLAMA_FTYPE_MOSTLY_*


def _library() -> Any:
    from cyllama.llama import llama_cpp

    return llama_cpp


def quantised(source: Path, target: Path, name: str) -> Path:
    """`source`, a GGUF file of floats, as one of `FORMATS`, by `llama_model_quantize`.

    Raises:
        RuntimeError: the quantiser refuses; its own words.
    """
    library, said = _library(), []
    library.set_log_callback(lambda level, text: said.append(text))
    settings = library.LlamaModelQuantizeParams()
    settings.ftype, settings.nthread = FORMATS[name], torch.get_num_threads()
    try:
        library.model_quantize(str(source), str(target), settings)
    except RuntimeError as error:
        target.unlink(missing_ok=True)  # it leaves what it had written
        words = [line for text in said for line in text.splitlines() if "failed" in line or "not divisible" in line]
        raise RuntimeError("; ".join(" ".join(line.split()) for line in words) or str(error)) from error
    finally:
        library.set_log_callback(None)
    return target


def types(path: Path) -> dict[str, str]:
    """Name -> type of a file's matrices; vectors stay float32 in all formats."""
    import gguf

    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors if sum(n > 1 for n in t.shape) > 1}


def counted(path: Path) -> str:
    """How many of a file's matrices have which type, the commonest first: "Q5_0 120, Q8_0 91"."""
    return ", ".join(f"{name} {count}" for name, count in Counter(types(path).values()).most_common())


def perplexity(path: Path, tokens: Tensor) -> float:
    """As `hywia_kernels.perplexity` of int64 `[blocks, block]`, with llama.cpp's logits of the file."""
    library = _library()

    class Model(library.LlamaModel):  # type: ignore[misc, name-defined]
        # cyllama 0.2.18 reads the size of the vocabulary here to hand out logits, and does not set it.
        n_vocab = len(_vocabulary(path))

    library.set_log_callback(lambda level, text: None)
    model = Model(str(path), library.LlamaModelParams())
    settings = library.LlamaContextParams()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = tokens.shape[1]
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    context = library.LlamaContext(model, settings)
    total = 0.0
    try:
        for block in tokens.tolist():
            context.kv_cache_clear()
            batch = library.LlamaBatch(n_tokens=len(block), embd=0, n_seq_max=1)
            for place, token in enumerate(block):
                batch.add(token, place, [0], True)
            context.decode(batch)
            for place, target in enumerate(block[1:]):
                logits = torch.tensor([context.get_logits_ith(place)])
                total += float(functional.cross_entropy(logits, torch.tensor([target])))
    finally:
        context.close()
        model.close()
        library.set_log_callback(None)
    return math.exp(total / (tokens.shape[0] * (tokens.shape[1] - 1)))


def _vocabulary(path: Path) -> list[str]:
    import gguf

    return gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].data
