"""How a model is held: what wraps it, and whether its weights are here to be read, differentiated and changed.

Wrappers that stand for the model they hold are taken off; whatever else keeps a pass from the weights themselves is
refused by name before anything runs, with the way to a model that can be worked on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HywiaError, UsageError

__all__ = ["check_held", "plain_model", "unwrapped"]

_COMPILED, _PARALLEL = ("OptimizedModule",), ("DistributedDataParallel", "DataParallel")
# Wrappers by their class's name, and the way out.
_WRAPPERS = {
    "OptimizedModule": "put its _orig_mod there, or compile parts by layer.compile(), which keeps their names",
    "DistributedDataParallel": "put its .module there",
    "DataParallel": "put its .module there",
    "FullyShardedDataParallel": "its weights are sharded over processes: work on the model before it is sharded, or on "
    "a checkpoint of the whole state",
    "CheckpointWrapper": "put its _checkpoint_wrapped_module there; passes choose what to run again themselves",
    "DeepSpeedEngine": "work on the model before deepspeed.initialize",
}
_QUANTISED = ("bitsandbytes", "torchao", "gptqmodel", "auto_gptq", "awq", "optimum", "hqq", "quanto", "aqlm", "eetq")
# Ways out, as clauses of a message.
_DEQUANTISED = "load the model in bfloat16 or float32, without quantisation; prune it, then quantise the result"
_UNSHARDED = (
    "load the model in one process, without tp_plan, fully_shard or ZeRO, or gather its weights (full_tensor()) into a "
    "model of its own"
)


def unwrapped(model: Any) -> Any:
    """The model itself: what `torch.compile(model)`, DataParallel or DistributedDataParallel hold.

    Raises:
        UsageError: not a module. HywiaError: a wrapper that holds something else than the model's own weights.
    """
    while True:
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"model: expected a loaded language model (a torch.nn.Module), got {type(model).__name__}; "
                "hywia_kernels.load(directory) gives one and its tokenizer"
            )
        name, package = type(model).__name__, type(model).__module__.partition(".")[0]
        if name in _COMPILED and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif name in _PARALLEL and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        elif package == "peft":
            raise HywiaError(
                f"model: expected a model without adapters, got {name}; merge them first: "
                "model = model.merge_and_unload()"
            )
        elif name in _WRAPPERS:
            raise HywiaError(f"model: expected the model itself, got it in {name}; {_WRAPPERS[name]}")
        else:
            _check_wrapper(model)
            return model


def _check_wrapper(model: nn.Module) -> None:
    """Refuse a wrapper of somebody's own, which has no config while the model that it holds has one."""
    if getattr(model, "config", None) is not None:
        return
    for name, child in model.named_children():
        if getattr(child, "config", None) is not None and hasattr(child, "get_output_embeddings"):
            raise HywiaError(
                f"model: expected the language model itself, got {type(model).__name__} around it; pass model.{name}"
            )


def plain_model(model: Any, *, changing: bool = False) -> Any:
    """The model that `unwrapped` gives, once `check_held` has passed it.

    Args:
        model: a model, or one in a wrapper. changing: its weights are about to be changed, or replaced by others.

    Raises:
        UsageError: not a module. HywiaError: a model held in a way that keeps the work from its weights.
    """
    if changing and type(model).__name__ == "DistributedDataParallel":
        raise HywiaError(
            "model: expected a model that is not yet DistributedDataParallel, whose buckets are of the parameters as "
            "they are; pass model.module, and wrap the result again"
        )
    model = unwrapped(model)
    check_held(dict(model.named_modules()))
    return model


def check_held(modules: Mapping[str, nn.Module]) -> None:
    """Raise HywiaError for the first module, or weight, of a model that the passes and cuts cannot work on."""
    for name, module in modules.items():
        kind, package = type(module).__name__, type(module).__module__.partition(".")[0]
        if kind in _WRAPPERS and name:
            raise HywiaError(f"{name}: expected the module itself, got it in {kind}; {_WRAPPERS[kind]}")
        if package == "peft":
            raise HywiaError(
                f"{name}: expected a model without adapters, got {kind} of peft; merge them first "
                "(model.merge_and_unload(), or load the merged model)"
            )
        if package in _QUANTISED:
            raise HywiaError(f"{name}: expected an unquantised module, got {kind} of {package}; {_DEQUANTISED}")
        parameters = module._parameters
        if isinstance(module, nn.Linear) and "weight" not in parameters:
            others = ", ".join(leaf for leaf, p in parameters.items() if p is not None and leaf != "bias")
            raise HywiaError(
                f"{name}: expected a weight that is a parameter, got one computed from others ({others}); make it one: "
                "torch.nn.utils.prune.remove, remove_weight_norm or parametrize.remove_parametrizations"
            )
        for leaf, parameter in parameters.items():
            if parameter is not None:
                _check_parameter(module, f"{name}.{leaf}" if name else leaf, parameter)
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                raise HywiaError(_on_meta_message(module, f"{name}.{leaf}" if name else leaf))


def _check_parameter(module: nn.Module, name: str, parameter: Tensor) -> None:
    kind = type(parameter)
    if kind is not nn.Parameter and kind is not Tensor:
        package = kind.__module__.partition(".")[0]
        if kind.__name__ == "DTensor":
            raise HywiaError(f"{name}: expected a whole weight, got a DTensor, sharded over processes; {_UNSHARDED}")
        if package in _QUANTISED:
            raise HywiaError(
                f"{name}: expected an unquantised weight, got {kind.__name__} of {package}; {_DEQUANTISED}"
            )
        raise HywiaError(
            f"{name}: expected a torch.nn.Parameter, got {kind.__name__} of {kind.__module__}, whose values passes "
            "cannot reach; load the model with plain weights, without quantisation or sharding"
        )
    if parameter.device.type == "meta":
        raise HywiaError(_on_meta_message(module, name))
    if parameter.is_inference():
        raise HywiaError(
            f"{name}: expected a weight that can be saved for backward, got one made under torch.inference_mode(); "
            "load the model outside of it (torch.no_grad() does no harm)"
        )
    if not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
        raise HywiaError(f"{name}: expected an unquantised weight, got {parameter.dtype}; {_DEQUANTISED}")
    if parameter.layout != torch.strided:
        raise HywiaError(f"{name}: expected a dense weight, got {parameter.layout}; make it one: .to_dense()")
    if not parameter.numel() or not parameter.data_ptr():
        raise HywiaError(f"{name}: expected a weight with values, got one whose memory is elsewhere; {_UNSHARDED}")


def _on_meta_message(module: nn.Module, name: str) -> str:
    hook = getattr(module, "_hf_hook", None)
    hooks = [hook, *getattr(hook, "hooks", ())]
    if any(getattr(one, "offload", False) for one in hooks):
        where = "on disk or in the host's memory"
        return (
            f"{name}: expected weights that are loaded, got them offloaded by accelerate ({where}); load the model "
            'without device_map="auto" (or cpu_offload, disk_offload): on one device, or spread over GPUs that hold '
            "all; a plan is also carried out from the files themselves (hk.prune_files)"
        )
    return (
        f"{name}: expected weights with values, got them on the meta device; load the model's weights "
        '(from_pretrained, without device_map="auto" where it leaves some offloaded)'
    )
