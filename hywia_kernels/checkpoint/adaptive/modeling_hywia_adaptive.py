"""Causal language models whose layers differ in width: the family's own class, with some modules of another shape.

Forward, cache, generation, gradient checkpointing and device maps are the family's: no layer is written again here.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .alibi_hywia_adaptive import SURVIVORS, keep_heads
from .configuration_hywia_adaptive import (
    HywiaAdaptiveConfig,
    adaptive_fields,
    auto_class,
    base_config,
    bookkeeping_fields,
    config_class,
)

__all__ = ["HywiaAdaptiveForCausalLM", "change_modules", "check_changes", "describe_changes", "model_class"]


class HywiaAdaptiveForCausalLM(PreTrainedModel):
    """The class that the auto classes know; it hands over to a subclass of the family's own model class."""

    config_class = HywiaAdaptiveConfig

    def __new__(cls, config, *args, **kwargs):
        return model_class(config.base_model_type)(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        if config is None:
            hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            chosen = {k: kwargs[k] for k in hub if k in kwargs}
            config = HywiaAdaptiveConfig.from_pretrained(pretrained_model_name_or_path, **chosen)
        made = model_class(config.base_model_type)
        return made.from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        return model_class(config.base_model_type)._from_config(config, **kwargs)


@functools.cache
def model_class(base_model_type):
    """The family's causal language model, its modules changed as the config says when it is built."""
    adaptive = config_class(base_model_type)
    auto = auto_class(adaptive.__mro__[1])
    family: Any = auto._model_mapping[adaptive.__mro__[1]]

    def __init__(self, config, *args, **kwargs):
        family.__init__(self, config, *args, **kwargs)
        change_modules(self, config.module_changes)

    def _supports_default_dynamic_cache(cls):
        return family._supports_default_dynamic_cache()  # which tells families by the names of their classes

    content = {
        "__init__": __init__,
        "_supports_default_dynamic_cache": classmethod(_supports_default_dynamic_cache),
        "__module__": __name__,
        "__doc__": family.__doc__,
        "config_class": adaptive,
        "_auto_class": auto.__name__,
    }
    return type(HywiaAdaptiveForCausalLM.__name__, (family,), content)


def check_changes(changes):
    """Make sure that a config's `module_changes` has the form that `describe_changes` gives it: names and numbers.

    Raises:
        ValueError: it has another form.
    """

    def number(value):
        return isinstance(value, int) and not isinstance(value, bool)

    def attribute(value):
        return all(attribute(v) for v in value) if isinstance(value, list) and value else number(value)

    def shape(value):
        return isinstance(value, list) and 1 <= len(value) <= 4 and all(number(v) and v > 0 for v in value)

    def field(value):
        return value is None or isinstance(value, (bool, int, float, str, list, dict))

    parts = {"parameters": shape, "attributes": attribute, "config": field}
    keys = {"heads", "of", "argument", "axis"}
    for name, change in changes.items() if isinstance(changes, dict) else [(None, None)]:
        if not isinstance(change, dict) or not set(change) <= {*parts, "alibi"}:
            raise ValueError(f"module_changes: expected parts {', '.join(parts)} and alibi of {name!r}, got {change!r}")
        for part, fits in parts.items():
            for leaf, value in (change[part] if isinstance(change.get(part), dict) else {}).items():
                if leaf.startswith("_") or not fits(value):
                    raise ValueError(f"module_changes: expected {part} of {name!r} to be numbers, got {leaf}={value!r}")
            if not isinstance(change.get(part, {}), dict):
                raise ValueError(f"module_changes: expected names and values as {part} of {name!r}")
        alibi = change.get("alibi")
        if alibi is None:
            continue
        if not isinstance(alibi, dict) or set(alibi) != keys or not isinstance(alibi["argument"], str):
            raise ValueError(f"module_changes: expected alibi of {name!r} to have {', '.join(sorted(keys))}")
        heads, of = alibi["heads"], alibi["of"]
        if not isinstance(heads, list) or not heads or not all(map(number, [*heads, of, alibi["axis"]])):
            raise ValueError(f"module_changes: expected whole numbers in alibi of {name!r}, got {alibi!r}")
        if heads != sorted(set(heads)) or not 0 <= heads[0] <= heads[-1] < of:
            raise ValueError(f"module_changes: expected heads of {name!r} below {of}, ascending, got {heads!r}")


def _changeable(module, attribute, name):
    """The present value of a module's attribute, which must be data of its own to be changed."""
    if attribute not in vars(module) or callable(vars(module)[attribute]):
        raise ValueError(f"module_changes: {type(module).__name__} {name!r} has no number {attribute!r}")
    return vars(module)[attribute]


def change_modules(model, changes):
    """Change modules as `describe_changes` wrote down; new parameters are uninitialised where weights will be loaded.

    Raises:
        ValueError: the changes do not have that form, or name modules that the model has not.
    """
    check_changes(changes)
    modules = dict(model.named_modules())
    for name, change in changes.items():
        if name not in modules:
            raise ValueError(f"module_changes: the model has no module {name!r}")
        module = modules[name]
        if "config" in change:
            module.config = copy.copy(module.config)
            known = module.config.to_dict()
            for field, value in change["config"].items():
                if field not in known or callable(getattr(type(module.config), field, None)):
                    raise ValueError(f"module_changes: the config of {name!r} has no field {field!r}")
                setattr(module.config, field, value)
        for attribute, value in change.get("attributes", {}).items():
            old = _changeable(module, attribute, name)
            setattr(module, attribute, tuple(value) if isinstance(old, tuple) else value)
        if "alibi" in change:
            keep_heads(module, **change["alibi"])
        for leaf, shape in change.get("parameters", {}).items():
            old = module._parameters.get(leaf)
            if old is None or old.dim() != len(shape):
                raise ValueError(f"module_changes: {name!r} has no parameter {leaf!r} of {len(shape)} axes")
            new = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)
            setattr(module, leaf, new)
        if "parameters" in change and not any(p.is_meta for p in module.parameters(recurse=False)):
            with torch.no_grad():
                model._init_weights(module)  # a model from a config alone; loading replaces what is meta


def describe_changes(model, stock=None):
    """The `module_changes` of a model: in what its modules differ from those of a stock model.

    Args:
        stock: the model to compare with; None: the one that the family's own config describes.

    Raises:
        ValueError: it lacks modules that the family's model has, or has others.
    """
    if stock is None:
        with torch.device("meta"):
            config = base_config(model.config)
            stock = auto_class(type(config)).from_config(config)
    modules, expected = dict(model.named_modules()), dict(stock.named_modules())
    if modules.keys() != expected.keys():
        raise ValueError(f"model: expected its family's modules, differs in {sorted(modules.keys() ^ expected.keys())}")
    changes = {}
    for name, twin in expected.items():
        module = modules[name]
        parts = {
            "parameters": _parameter_changes(module, twin),
            "attributes": _attribute_changes(module, twin),
            "alibi": getattr(module, SURVIVORS, {}),
            "config": {} if module is model else _config_changes(module, twin, model.config),
        }
        change = {part: values for part, values in parts.items() if values}
        if change:
            changes[name] = change
    return changes


def _parameter_changes(module, twin):
    theirs = dict(twin.named_parameters(recurse=False))
    own = dict(module.named_parameters(recurse=False))
    return {leaf: list(p.shape) for leaf, p in own.items() if p.shape != theirs[leaf].shape}


def _attribute_changes(module, twin):
    """Attributes that differ and are whole numbers or tuples of them: heads, widths, sizes of splits."""

    def plain(value):
        if isinstance(value, (tuple, list)):
            return bool(value) and all(plain(v) for v in value)
        return isinstance(value, int) and not isinstance(value, bool)

    own, theirs = vars(module), vars(twin)
    return {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in own.items()
        if k in theirs and plain(v) and plain(theirs[k]) and v != theirs[k]
    }


def _config_changes(module, twin, whole):
    """Fields in which a module's own copy of the config differs; most modules share the model's and have no copy."""
    own = getattr(module, "config", None)
    if own is None or own is whole or not hasattr(own, "to_dict"):
        return {}
    theirs = twin.config.to_dict()
    names = (k for k in theirs if not k.startswith("_") and k not in (*adaptive_fields, *bookkeeping_fields))
    values = own.to_dict()
    return {k: values[k] for k in names if k in values and values[k] != theirs[k]}
