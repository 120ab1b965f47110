"""What a change that failed must have left as it was: weights, widths, configs and hooks."""

from __future__ import annotations

import copy

import torch


def numbers(model):
    """Attributes of all modules and configs that say how wide things are, or what is called."""
    plain = (int, float, str, bool, dict, list, tuple, type(None))
    config = {k: copy.deepcopy(v) for k, v in model.config.to_dict().items()}
    attributes = {
        name: {k: copy.copy(v) for k, v in vars(m).items() if isinstance(v, plain) and not k.startswith("_")}
        for name, m in model.named_modules()
    }
    configs = {
        n: m.config.to_dict() for n, m in model.named_modules() if hasattr(getattr(m, "config", None), "to_dict")
    }
    return config, attributes, configs


def values(model):
    return {n: v.clone() for n, v in model.state_dict().items()}


def assert_as_it_was(model, before, said, flags):
    now = values(model)
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(now[name], value), name
    assert numbers(model) == said
    assert hooks_and_forwards(model) == flags


def hooks_and_forwards(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
    return {
        name: (vars(m).get("forward"), m.training, *({**getattr(m, h)} for h in hooks))
        for name, m in model.named_modules()
    }
