"""Whether what was written is the model in memory: every tensor bit for bit, and a config that builds its shapes.

The files are read back once, one tensor at a time (mostly from the page cache, just after they were written); nothing
is loaded as a second model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import HywiaError
from .adaptive import remote
from .ties import shared
from .weight_files import weight_files

__all__ = ["check_config", "check_file", "check_tensors", "check_written"]


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, uint8 `[bytes]` on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def check_tensors(folder: Path, expected: Mapping[str, Tensor]) -> set[str]:
    """Compare the weight files of a directory with what they should hold.

    Args:
        folder: the directory.
        expected: name in the files -> tensor; where several names have one memory, the files must hold one of them.

    Returns:
        the names that the files hold.

    Raises:
        HywiaError: a tensor is missing, unknown, or differs in dtype, shape or any bit.
    """
    from safetensors import SafetensorError

    stored: set[str] = set()
    try:
        for file in weight_files(folder):
            stored |= _compared(file, expected)
    except SafetensorError as error:
        raise HywiaError(f"save: what was written cannot be read back: {error}") from error
    present: dict[tuple[Any, ...], str] = {}
    for name in stored:
        present.setdefault(_memory(expected[name]), name)
    missing = sorted(n for n, t in expected.items() if n not in stored and _memory(t) not in present)
    if missing:
        raise HywiaError(f"save: expected {missing[0]} in {folder}, it was not written ({len(missing)} such tensors)")
    return stored


def check_file(file: Path, expected: Mapping[str, Tensor]) -> None:
    """Compare one safetensors file with all it should hold.

    Raises:
        HywiaError: as `check_tensors`.
    """
    from safetensors import SafetensorError

    try:
        stored = _compared(file, expected)
    except SafetensorError as error:
        raise HywiaError(f"save: what was written cannot be read back: {error}") from error
    if stored != expected.keys():
        raise HywiaError(f"save: expected {min(expected.keys() - stored)} in {file}, it was not written")


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory, read in the same way."""
    if tensor.is_meta:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.dtype


def _compared(file: Path, expected: Mapping[str, Tensor]) -> set[str]:
    """The names that one safetensors file holds, once each tensor is seen to be the expected one."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
        for name in names:
            if name not in expected:
                raise HywiaError(f"save: {file.name} holds {name}, which the model has not")
            got, want = opened.get_tensor(name), expected[name]
            if got.dtype != want.dtype or got.shape != want.shape:
                raise HywiaError(
                    f"save: {name}: expected {want.dtype} {tuple(want.shape)} in {file.name}, got {got.dtype} "
                    f"{tuple(got.shape)}"
                )
            if not torch.equal(_bits(got), _bits(want)):
                raise HywiaError(f"save: {name} in {file.name} is not what the model has; the disk may be failing")
    return set(names)


def check_written(model: Any, folder: Path) -> None:
    """Raise unless a directory, loaded by transformers, would be this model.

    Args:
        model: what was saved, of the class that its config in the directory names.

    Raises:
        HywiaError: it would not be; the message names the tensor.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    # Some families' files have other names and shapes than their modules (experts one by one).
    stored = check_tensors(folder, revert_weight_conversion(model, dict(state)))
    check_config(model, state, stored, folder)


def check_config(model: Any, state: Mapping[str, Tensor], stored: set[str], folder: Path) -> None:
    """Raise unless the config in a directory builds a model's shapes and ties.

    Args:
        model: as in `check_written`. state: its state dict; of a model on the meta device, with `keep_vars`.
        stored: the names of it that the files hold.

    Raises:
        HywiaError: as `check_written`.
    """
    twin = _built(model, folder)
    shapes = {name: tensor.shape for name, tensor in twin.state_dict().items()}
    for name, tensor in state.items():
        if shapes.get(name) != tensor.shape:
            built = tuple(shapes[name]) if name in shapes else "none"
            raise HywiaError(
                f"save: {name}: expected {tuple(tensor.shape)} from the config that was written, it builds {built}"
            )
    ties = twin.get_expanded_tied_weights_keys(all_submodels=True)
    for target, source in ties.items():
        if target in state and source in state and not shared(state[target], state[source]):
            raise HywiaError(f"save: the config that was written ties {target} to {source}, which are two matrices")
    memory: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        first = memory.setdefault(_memory(tensor), name)
        restored = name in stored or name in ties or name in ties.values()
        if first != name and tensor.numel() and not restored:
            raise HywiaError(f"save: {name} is the same memory as {first}, which loading would not restore")


def _built(model: Any, folder: Path) -> Any:
    """The model on the meta device that the config in the directory describes."""
    from transformers import AutoConfig

    try:
        if remote.is_remote_code(model):
            config = type(model.config).from_pretrained(folder)
        else:
            config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            twin = type(model)(config)
            changes = getattr(config, "module_changes", None)
            if changes is not None and remote.is_remote_code(model):
                from .adaptive.modeling_hywia_adaptive import change_modules

                change_modules(twin, changes)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise HywiaError(f"save: the config that was written does not build the model: {error}") from error
    return twin
