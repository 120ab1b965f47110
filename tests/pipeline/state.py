"""What a pass must leave as it found it, as values to compare."""

from __future__ import annotations

import gc
import os
import sys

import torch

DEVICES = ("cpu", "cuda")


def process_state():
    """Settings of the process and of this thread."""
    return {
        "collecting": gc.isenabled(),
        "environment": dict(os.environ),
        "deterministic": torch.get_deterministic_debug_mode(),
        "filling": torch.utils.deterministic.fill_uninitialized_memory,
        "autocast": [torch.is_autocast_enabled(d) for d in DEVICES],
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "products": [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision],
        "modes": len(torch.overrides._get_current_function_mode_stack()),
    }


def model_state(model):
    """All of a model but its values: flags, forwards, hooks, the identity of parameters and their gradients."""
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    module = sys.modules[type(model).__module__]
    return {
        "training": {n: m.training for n, m in modules.items()},
        "forwards": {n: vars(m).get("forward") for n, m in modules.items()},
        "compiled": {n: vars(m).get("_compiled_call_impl") for n, m in modules.items()},
        "hooks": {(n, h): list(getattr(m, h).values()) for n, m in modules.items() for h in hooks},
        "learning": {n: p.requires_grad for n, p in model.named_parameters()},
        "parameters": {n: id(p) for n, p in model.named_parameters()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "rotation": getattr(module, "apply_rotary_pos_emb", None),
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name != "gradients" or not isinstance(value, dict):
            assert after[name] == value, name
            continue
        for parameter, gradient in value.items():
            now = after[name][parameter]
            assert (gradient is None) == (now is None), parameter
            assert gradient is None or torch.equal(gradient, now), parameter
