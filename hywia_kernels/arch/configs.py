"""What a model's config says of its language decoder, and which head counts its family's own checks let pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .language import Architecture

__all__ = ["checks_of", "differs_by_layer", "stock_head_counts", "text_config", "value_of"]


def text_config(model: nn.Module) -> Any:
    """The config of the language decoder, which in models of text and images is a part of the whole one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def value_of(config: Any, name: str) -> Any:
    """A config's field; None where it has none, or says it of each layer alone."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers': a value of one layer would be taken for that of all
        return None


def differs_by_layer(config: Any, name: str) -> bool:
    """Whether a config says a field of each layer alone."""
    try:
        getattr(config, name, None)
    except RuntimeError:
        return True
    return False


def _accepts(config_class: Any, values: Mapping[str, Any]) -> bool:
    from huggingface_hub.errors import StrictDataclassError

    try:
        config_class.from_dict(dict(values))
    except (ValueError, StrictDataclassError):
        return False
    return True


def _family_class(config: Any) -> Any:
    """The config class whose checks a stock checkpoint must pass; one whose layers differ runs none of them."""
    from transformers import CONFIG_MAPPING

    base = getattr(config, "base_model_type", None)
    return type(config) if base is None else CONFIG_MAPPING[base]


def checks_of(config_class: Any) -> tuple[str, ...]:
    """Names of a config class's own checks, beside those of all configs: by these it may refuse a head count."""
    from transformers import PretrainedConfig

    own = [c for c in config_class.__mro__ if issubclass(c, PretrainedConfig) and c is not PretrainedConfig]
    return tuple(sorted({name for c in own for name in vars(c) if name.startswith("validate_")}))


def stock_head_counts(model: nn.Module, entry: Architecture, size: int, kv_heads: int, rep: int) -> tuple[int, ...]:
    """By asking the family's config; only those that check their fields can refuse. Empty means any; where it takes no
    count at all, one more than there are, so that the two are told apart."""
    config = text_config(model)
    family, names = _family_class(config), entry.attention
    if not names.free_head_dim or not checks_of(family):
        return ()
    if entry.stand_in is not None and all(getattr(config, k, v) == v for k, v in entry.stand_in_needs.items()):
        return ()
    values = {**config.to_dict(), "head_dim": size}
    counts = range(1, kv_heads + 1)
    stock = tuple(
        n for n in counts if _accepts(family, {**values, names.heads_field: n * rep, names.kv_heads_field or "": n})
    )
    return () if len(stock) == kv_heads else stock or (kv_heads + 1,)
