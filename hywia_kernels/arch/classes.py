"""Which of transformers' auto classes has a model: that of language models, or of models of images and text."""

from __future__ import annotations

from typing import Any

__all__ = ["IMAGES", "TEXT", "auto_class", "auto_class_name", "is_of_images", "of_images"]

TEXT, IMAGES = "AutoModelForCausalLM", "AutoModelForImageTextToText"


def of_images(model_type: Any) -> bool:
    """Whether a `model_type` is one of images and text, whose decoder is a part beside others.

    Some of these types also have a class of the text alone, or are themselves among the language models; only what no
    class of language models loads with its images counts.
    """
    from transformers.models.auto import modeling_auto as auto

    if not isinstance(model_type, str):
        return False
    whole = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    return whole is not None and auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) != whole


def is_of_images(config: Any) -> bool:
    """`of_images` of a config's family, which has images in it: a config of its text alone is a language model's."""
    model_type = getattr(config, "base_model_type", None) or getattr(config, "model_type", None)
    return of_images(model_type) and config.get_text_config() is not config


def auto_class_name(config: Any) -> str:
    """The name of the auto class by which a config's models are loaded and saved."""
    return IMAGES if is_of_images(config) else TEXT


def auto_class(config: Any) -> Any:
    """The auto class by which a config's models are built, loaded and saved."""
    import transformers

    return getattr(transformers, auto_class_name(config))
