"""Whether a model's head is its embedding, as it is in memory: what the config says of it may be wrong.

Full fine-tuning can leave a checkpoint with a head of its own under a config that says tied; transformers keeps both,
but ties them again wherever only the config is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["own_head", "set_ties", "settle_tying", "shared", "tied_head"]


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
    """Make a config, and its part for the language decoder, say whether the head of `model` is its embedding.

    Returns:
        the config, which was changed in place.
    """
    tied = tied_head(model)
    if tied is None:
        return config
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    # transformers goes by the outer config; servers read either.
    for part in (config,) if inner is config else (config, inner):
        if bool(getattr(part, "tie_word_embeddings", False)) != tied:
            part.tie_word_embeddings = tied
    return config


def own_head(model: Any) -> bool:
    """Whether a model has a head `[vocabulary, hidden]` with memory of its own; False where it has none at all."""
    return model.get_output_embeddings() is not None and tied_head(model) is False


def settle_tying(model: Any) -> bool:
    """Make the config of a model with a head of its own say so, so that what is later built from the config has it.

    Returns:
        whether the config had to be changed.
    """
    if not own_head(model):
        return False
    decoder = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    wrong = [c for c in (model.config, decoder) if getattr(c, "tie_word_embeddings", False)]
    for config in wrong:
        config.tie_word_embeddings = False
    if wrong and hasattr(model, "all_tied_weights_keys"):
        head = {id(p) for p in model.get_output_embeddings().parameters()}
        own = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in head}
        model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if k not in own}
    return bool(wrong)
