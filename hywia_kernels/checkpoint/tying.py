"""Whether a model's head is its embedding.

A config says that head and embedding are one, and a checkpoint can still hold two of them: full fine-tuning under some
engines takes them apart. transformers 5 then keeps both, while the config goes on saying that they are one; whatever is
made from that config ties them again, and the head is lost.
"""

from __future__ import annotations

from typing import Any

__all__ = ["own_head", "settle_tying"]


def own_head(model: Any) -> bool:
    """Whether a model has a head `[vocabulary, hidden]` with memory of its own; False where it has none at all."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        return False
    first, second = head.weight, getattr(embedding, "weight", None)
    if first is second or second is None:
        return False
    if first.device.type == "meta" or second.device.type == "meta":
        return True  # two parameters; there is no memory to compare
    return first.data_ptr() != second.data_ptr()


def settle_tying(model: Any) -> bool:
    """Make the config of a model with a head of its own say so; whether it had to be changed.

    What is saved, copied or built from the config afterwards keeps the head.
    """
    if not own_head(model):
        return False
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    said = [c for c in (model.config, text) if getattr(c, "tie_word_embeddings", False)]
    for config in said:
        config.tie_word_embeddings = False
    if said and hasattr(model, "all_tied_weights_keys"):
        head = {id(p) for p in model.get_output_embeddings().parameters()}
        own = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in head}
        model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if k not in own}
    return bool(said)
