"""Models of a checkpoint's own code whose modules differ from what its config says.

Their directories keep the family's own config and code, with `module_changes` in the config beside them: loading needs
both this package and `trust_remote_code`, and without the package fails on the shapes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..ties import set_ties

__all__ = ["adapted", "is_remote", "is_remote_code", "load"]

_CHANGES = "module_changes"


def is_remote_code(model: Any) -> bool:
    """Whether a model's class came with its checkpoint."""
    return type(model).__module__.startswith("transformers_modules.")


def is_remote(values: dict[str, Any]) -> bool:
    """Whether a config is of such a directory."""
    return _CHANGES in values and "base_model_type" not in values and "auto_map" in values


def adapted(model: Any) -> Any:
    """The same tensors in a model of the same class whose config names the changes.

    Raises:
        RuntimeError: it cannot be built from them.
    """
    from .modeling_hywia_adaptive import change_modules, describe_changes

    config = set_ties(copy.deepcopy(model.config), model)
    if hasattr(config, _CHANGES):
        delattr(config, _CHANGES)
    with torch.device("meta"):
        twin = type(model)(config)
    changes = describe_changes(model, twin)
    change_modules(twin, changes)
    twin.load_state_dict(model.state_dict(), assign=True)
    setattr(twin.config, _CHANGES, changes)
    twin.tie_weights()
    return twin


def load(source: str, dtype: Any, options: dict[str, Any]) -> Any:
    """The model of a directory that `adapted` describes; runs the checkpoint's code if `options` trust it."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    from .modeling_hywia_adaptive import change_modules

    config = AutoConfig.from_pretrained(
        source, trust_remote_code=options.get("trust_remote_code")
    )  # asks for the trust
    family: Any = get_class_from_dynamic_module(config.auto_map["AutoModelForCausalLM"], source)

    class Changed(family):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            change_modules(self, getattr(config, _CHANGES))

    Changed.__name__, Changed.__module__ = family.__name__, family.__module__
    loaded = Changed.from_pretrained(source, config=config, dtype=dtype)
    loaded.__class__ = family
    return loaded
