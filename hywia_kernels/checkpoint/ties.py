"""Whether a model's head is its embedding, as it is in memory: what the config says of it may be wrong.

Full fine-tuning can leave a checkpoint with a head of its own under a config that says tied; transformers keeps both,
but ties them again wherever only the config is asked.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["set_ties", "shared", "tied_head"]


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.is_meta:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def shared(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory."""
    return one is other or _storage(one) == _storage(other)


def tied_head(model: Any) -> bool | None:
    """Whether the output matrix is the embedding's memory; None where the model lacks one of them."""
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    head = getattr(model.get_output_embeddings(), "weight", None)
    return None if embedding is None or head is None else shared(embedding, head)


def set_ties(config: Any, model: Any) -> Any:
    """Make a config say of the head what `model` has; also the part of it that is the language decoder's.

    Returns:
        the config.
    """
    tied = tied_head(model)
    if tied is None:
        return config
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    # The outer one decides in transformers; servers read either.
    for part in (config,) if inner is config else (config, inner):
        if bool(getattr(part, "tie_word_embeddings", False)) != tied:
            part.tie_word_embeddings = tied
    return config
