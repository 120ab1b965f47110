"""Parts of a model that need care before it is written: dtypes, shared matrices, contradictory generation configs."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

__all__ = ["check_storable", "storable_generation", "storable_state"]


def storable_generation(generation: Any) -> Any:
    """A copy of a generation config that its class stores even if it contradicts itself (a temperature beside greedy
    decoding), as many published ones do: a config that loaded once can be loaded again."""
    generation = copy.deepcopy(generation)
    generation._original_object_hash = hash(generation)
    return generation


def check_storable(model: Any) -> None:
    """Warn of weights whose dtype loading will not keep, in a model that `plain_model` gave."""
    kept = (
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dtype == dtype or not parameter.is_floating_point() or any(part in name for part in kept):
            continue
        if not torch.equal(parameter.detach().to(dtype).to(parameter.dtype), parameter.detach()):
            warnings.warn(
                f"save: {name} is stored in {str(parameter.dtype).removeprefix('torch.')} as it is, but loading rounds "
                f"every weight to the model's {str(dtype).removeprefix('torch.')}; call model.to(dtype) for one dtype",
                stacklevel=3,
            )
            return


def storable_state(described: Any) -> dict[str, Any] | None:
    """The state dict in which modules that share a matrix, though the family's do not, have copies of it: loading gives
    each its own. None where no copy is needed."""
    state = described.state_dict()
    ties = described.get_expanded_tied_weights_keys(all_submodels=True)
    memories: set[tuple[Any, ...]] = set()
    copies: dict[str, Any] = {}
    for name, tensor in state.items():
        memory = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
        if memory in memories and tensor.numel() and name not in ties and name not in ties.values():
            copies[name] = tensor.clone()
        memories.add(memory)
    return {**state, **copies} if copies else None
