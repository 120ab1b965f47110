"""A model whose layers' weights stay in their files: its structure, and where each weight lies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import arch
from ..checkpoint import hub, loading
from ..checkpoint.skeleton import skeleton
from ..checkpoint.sources import judged, located
from ..checkpoint.weight_files import Stored, stored_tensors
from ..errors import HywiaError
from .stored import StoredWeights, places_of
from .weights import tables

__all__ = ["open_mapped", "stored_of"]

_STORED = "_hywia_stored"  # attribute of a model: where its layers' weights lie
_WAY_OUT = "score it where it fits into memory (--weights host, or --memory auto)"

# Names under which checkpoints hold a parameter, where they are not the model's, as transformers renames them: from the
# model's to the checkpoint's.
_RENAMED = ((r"^lm_head\.", "embed_out."), (r"\.mlp\.gate\.", ".block_sparse_moe.gate."))
# Stacked experts, and the matrices of one expert that are joined along their rows, by the two ways of naming them.
_STACKED = re.compile(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)")
_EXPERT = {
    "gate_up_proj": (
        ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
        ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
    ),
    "down_proj": (("mlp.experts.{}.down_proj.weight",), ("block_sparse_moe.experts.{}.w2.weight",)),
}


def stored_of(model: Any) -> StoredWeights | None:
    """Where a model's layers' weights lie; None for a model that is loaded."""
    return model.__dict__.get(_STORED)


def open_mapped(
    model: str | Path, *, device: str | torch.device = "cpu", revision: str | None = None
) -> tuple[Any, Any]:
    """`(model, tokenizer)` as `load` gives them, but for the layers' weights: they stay in their safetensors files, and
    their parameters are on the meta device. It serves `calibrate_streamed` alone.

    Args:
        model: a hub id, or a directory, in the stored dtype. Its weights are fetched.
        device: where embedding, final norm and head go.
        revision: of a hub model.

    Raises:
        UsageError, HywiaError: as `load`; or the weights cannot be read as they lie: of a GGUF file, of code of the
            checkpoint's own, of a family whose structure is derived, or of tensors that loading converts.
    """
    source = located(model, revision)
    if source.is_gguf:
        raise HywiaError(f"model: {model} is a GGUF file, whose blocks are no weights yet; {_WAY_OUT}")
    judgement = judged(source, trusted=False, quantised=False)
    if judgement.rotary:
        raise HywiaError(f"model: {model} is a Baichuan model, whose matrices are split on loading; {_WAY_OUT}")
    folder = source.path
    if source.from_hub:
        folder = hub.complete(source.name, folder, code=False, options=source.hub)
    network = skeleton(folder)
    if not arch.is_known(network):
        raise HywiaError(
            f"model: {network.config.model_type} is not in the table of architectures, and its structure is derived "
            f"from weights in memory; {_WAY_OUT}"
        )
    tokenizer = loading.tokenizer_of(folder, source.name, judgement)
    for named in (network.config, network, tokenizer):
        named.name_or_path = source.name
    modules = dict(network.named_modules())
    stored = _found(network, folder)
    of_layers, outside = tables(network, modules)
    with torch.no_grad():
        # First the buffers: a module that makes its own would make its weights up, too, were they there.
        _buffers(network, modules, stored_tensors(folder), torch.device(device))
        held = [stored.tensor(name).to(p.dtype) for name, p in zip(outside.names, outside.originals, strict=True)]
        outside.put([tensor.to(device, copy=True) for tensor in held])
    for table in of_layers:
        for parameter in table.originals:
            parameter.requires_grad_(False)
    network.__dict__[_STORED] = stored
    return network, tokenizer


def _found(network: Any, folder: Path) -> StoredWeights:
    """Where each parameter of a model on the meta device lies."""
    tensors = stored_tensors(folder)
    prefix = f"{network.base_model_prefix}."
    names: dict[str, tuple[list[str], int]] = {}
    for name, parameter in network.named_parameters():
        one = next((n for n in _candidates(name, prefix) if n in tensors), None)
        parts, rows = ([one], 0) if one is not None else _experts(name, tensors, len(parameter))
        shape = tuple(parameter.shape)
        if not parts or _shape(parts, rows, tensors) != shape:
            what = f"stores it as {_shape(parts, rows, tensors)}" if parts else "does not store it under a known name"
            raise HywiaError(
                f"{name}: expected a stored tensor {shape} that can be read as it lies, but {folder} {what}; {_WAY_OUT}"
            )
        names[name] = parts, rows
    places = places_of(tensors, [part for parts, _ in names.values() for part in parts])
    return StoredWeights(
        {name: [places[part] for part in parts] for name, (parts, _) in names.items()},
        {name: rows for name, (_, rows) in names.items() if rows},
    )


def _candidates(name: str, prefix: str) -> list[str]:
    """Names that a checkpoint may hold a parameter under."""
    renamed = [name, *(re.sub(old, new, name) for old, new in _RENAMED)]
    return [*renamed, *(n.removeprefix(prefix) for n in renamed if n.startswith(prefix))]


def _experts(name: str, tensors: Mapping[str, Stored], count: int) -> tuple[list[str], int]:
    """`(names, how many are one expert's)` of the matrices that a stack is made of; none where it is no such stack."""
    match = _STACKED.fullmatch(name)
    if match is None:
        return [], 0
    for leaves in _EXPERT[match[2]]:
        parts = [f"{match[1]}.{leaf.format(e)}" for e in range(count) for leaf in leaves]
        if parts and all(part in tensors for part in parts):
            return parts, len(leaves)
    return [], 0


def _shape(parts: Sequence[str], rows: int, tensors: Mapping[str, Stored]) -> tuple[int, ...] | None:
    """The shape of what stored tensors make; None where they do not fit together."""
    shapes = [tensors[part].shape for part in parts]
    if not rows:
        return shapes[0]
    if any(len(shape) != 2 or shape != shapes[i % rows] for i, shape in enumerate(shapes)):
        return None
    return len(shapes) // rows, sum(shape[0] for shape in shapes[:rows]), shapes[0][1]


def _buffers(
    network: Any, modules: Mapping[str, nn.Module], tensors: Mapping[str, Stored], device: torch.device
) -> None:
    """Gives a model on the meta device its buffers: those that are stored, and those that its modules make, as loading
    with transformers has them made."""
    prefix = f"{network.base_model_prefix}."
    for name, module in modules.items():
        empty = [leaf for leaf, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for leaf in empty:
            made: Any = module._buffers[leaf]
            module._buffers[leaf] = torch.empty_like(made, device="cpu")
        if empty:
            network._init_weights(module)
        for leaf in empty:
            full = f"{name}.{leaf}" if name else leaf
            known = next((n for n in _candidates(full, prefix) if n in tensors), None)
            buffer: Any = module._buffers[leaf]
            if known is not None and leaf not in module._non_persistent_buffers_set:
                place = places_of(tensors, [known])[known]
                buffer.copy_(StoredWeights({full: [place]}).tensor(full))
            module._buffers[leaf] = buffer.to(device)
