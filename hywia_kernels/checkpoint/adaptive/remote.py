"""Models of a checkpoint's own code whose modules differ from what its config says.

Their directories keep the family's own config and code, and the config also holds `module_changes`: loading needs both
this package and `trust_remote_code`, and without the package fails on the shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import HywiaError
from .. import description, loaded_weights
from ..ties import set_ties

__all__ = ["adapted", "is_remote_code", "load", "skeleton"]

_CHANGES = "module_changes"


def is_remote_code(model: Any) -> bool:
    """Whether a model's class came with its checkpoint."""
    return type(model).__module__.startswith("transformers_modules.")


def adapted(model: Any) -> Any:
    """A model of the same class with the same tensors, whose config names the changes of its modules.

    Raises:
        ValueError, RuntimeError: no such model can be built from them.
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


def load(source: str, dtype: Any, values: Mapping[str, Any], *, trusted: bool, device: Any = None) -> Any:
    """The model of a directory whose own Python code describes it, changed as `adapted` wrote into its config.

    Args:
        source: the directory. dtype: "auto" keeps the checkpoint's. values: the content of its config.json.
        trusted: whether that code may be run. device: as `loaded_weights.read` takes it.

    Raises:
        HywiaError: the code may not be run, transformers has the family itself, `auto_map` names other code than the
            directory's, or the weights are not the model's.
    """
    family_type = description.family(values)
    if trusted is not True or not description.needs_code(family_type):
        raise HywiaError(
            f"model: {source}: the code of a {family_type} checkpoint is run with trust_remote_code=True "
            "(--trust-remote-code) only, and where transformers has no such family"
        )
    description.check_code(values, f"{source}: config.json")
    network, report = _built(source, dtype, values, device)
    loaded_weights.check_complete(report, source)
    return network


def _built(source: str, dtype: Any, values: Mapping[str, Any], device: Any) -> tuple[Any, Mapping[str, Any]]:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    from .modeling_hywia_adaptive import change_modules, check_changes

    if not values.get(_CHANGES):
        return loaded_weights.read(source, AutoModelForCausalLM, dtype=dtype, trust_remote_code=True, device=device)
    check_changes(values[_CHANGES])
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    family: Any = get_class_from_dynamic_module(config.auto_map["AutoModelForCausalLM"], source)

    class Changed(family):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            change_modules(self, getattr(config, _CHANGES))

    Changed.__name__, Changed.__module__ = family.__name__, family.__module__
    network, report = loaded_weights.read(source, Changed, config=config, dtype=dtype, device=device)
    network.__class__ = family
    return network, report


def skeleton(source: str, dtype: Any, values: Mapping[str, Any]) -> Any:
    """The model of such a directory on the meta device, for a caller who may run its code (see `load`).

    Args:
        source: the directory. dtype: None takes the config's. values: the content of its config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from .modeling_hywia_adaptive import change_modules

    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    options = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, trust_remote_code=True, **options)
        if values.get(_CHANGES):
            change_modules(network, values[_CHANGES])
    return network
