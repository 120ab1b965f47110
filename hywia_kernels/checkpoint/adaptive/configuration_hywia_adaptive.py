"""Config of models whose layers differ in width: a family's own config, and what each module has instead.

This file and `modeling_hywia_adaptive.py` need torch and transformers alone. They travel in every adaptive checkpoint,
so that `trust_remote_code=True` loads it where hywia_kernels is not installed; where it is, importing it registers
them.
"""

from __future__ import annotations

import copy
import functools

from transformers import AutoConfig, PretrainedConfig

__all__ = ["HywiaAdaptiveConfig", "adaptive_fields", "auto_class", "base_config", "bookkeeping_fields", "config_class"]

MODEL_TYPE = "hywia_adaptive"
bookkeeping_fields = ("model_type", "auto_map", "architectures", "transformers_version", "dtype")  # of any config
adaptive_fields = ("base_model_type", "layer_widths", "module_changes")


class HywiaAdaptiveConfig(PretrainedConfig):
    """What `model_type: hywia_adaptive` stands for; loading gives a subclass of the family's own config.

    Fields besides the family's:
        base_model_type: the family's `model_type`.
        layer_widths: config field -> width in each layer. It is for people who read the config; the model is built
            from `module_changes`.
        module_changes: module -> what it has that the family's config would not give it: "parameters" (name -> shape),
            "attributes" (name -> value) and "config" (field -> value).
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        base = config_dict.get("base_model_type")
        if base is None or config_dict.get("module_changes") is None:
            raise ValueError(
                f"{MODEL_TYPE}: expected the config fields base_model_type and module_changes, got "
                f"{sorted(config_dict)}; the checkpoint is damaged or older than this format: prune again"
            )
        return config_class(base).from_dict(config_dict, **kwargs)


@functools.cache
def config_class(base_model_type):
    """The family's config class under the model type `hywia_adaptive`.

    It has this module's name and the general class's, because that is what transformers writes into `auto_map`.
    """
    family = type(AutoConfig.for_model(base_model_type))
    auto = auto_class(family)
    content = {"model_type": MODEL_TYPE, "_auto_class": "AutoConfig", "__module__": __name__, "__doc__": family.__doc__}
    made = type(HywiaAdaptiveConfig.__name__, (family,), content)
    # Where the general class is registered, a config of the special one must find its model too.
    if HywiaAdaptiveConfig in auto._model_mapping:
        auto.register(made, auto._model_mapping[HywiaAdaptiveConfig], exist_ok=True)
    return made


def auto_class(family):
    """The auto class of the models of a family's config class: of images and text, where no class of language models
    has them with their images."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    whole = AutoModelForImageTextToText._model_mapping.get(family, None)
    text = AutoModelForCausalLM._model_mapping.get(family, None)
    composite = "text_config" in getattr(family, "sub_configs", {})
    return (
        AutoModelForImageTextToText if composite and whole is not None and whole is not text else AutoModelForCausalLM
    )


def base_config(config):
    """The family's own config, with the widths that it held before layers were made to differ."""
    values = copy.deepcopy(config).to_dict()
    base = values.get("base_model_type") or values["model_type"]
    for field in (*adaptive_fields, "model_type", "auto_map", "architectures", "transformers_version"):
        values.pop(field, None)
    return type(AutoConfig.for_model(base)).from_dict(values)
