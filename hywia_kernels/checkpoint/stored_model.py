"""A checkpoint as a model of which no weight is in memory: its structure, and values of parameters when asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arch.facts import checksum, fingerprint_and_count
from ..errors import HywiaError
from . import hub, loading, stored_parameters
from .file_kinds import read_json
from .skeleton import skeleton
from .sources import judged, located, refusal
from .stored_parameters import Bundle
from .weight_files import stored_tensors

__all__ = ["StoredModel", "open_stored"]


@dataclass(eq=False)
class StoredModel:
    """What `load` would give, with every parameter still in the files.

    Attributes:
        model: in eval mode, its parameters on the meta device, its buffers here.
        tokenizer: as `load` gives it.
        folder: the directory that holds the files.
        bundles: what is read together.
    """

    model: Any
    tokenizer: Any
    folder: Path
    bundles: list[Bundle]

    def read(self, bundle: Bundle) -> dict[str, Tensor]:
        """Values of a bundle's parameters by the names that `named_parameters` gives them; buffers are left out.

        Tied parameters come once, under their first name.
        """
        return {
            self.names[name]: value
            for name, value in stored_parameters.read(self.model, bundle).items()
            if name in self.names
        }

    def __post_init__(self) -> None:
        first: dict[int, str] = {}
        self.names: dict[str, str] = {}  # every name of a parameter -> the first of the same parameter
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            self.names[name] = first.setdefault(id(parameter), name)

    def bundles_within(self, prefix: str) -> list[Bundle]:
        """Those of which a parameter's name begins so."""
        return [b for b in self.bundles if any(name.startswith(prefix) for name in b.targets)]

    def checksums(self, values: Mapping[str, Tensor]) -> dict[str, int]:
        """Of parameters, by name, what their model's fingerprint takes."""
        return {name: checksum(name, value) for name, value in values.items()}

    def fingerprint(self, checksums: Mapping[str, int]) -> str:
        """Of the model with the parameters of which these are the checksums."""
        return fingerprint_and_count(self.model, known=checksums)[0]

    def whole_fingerprint(self) -> str:
        """The model's own; reads all files once."""
        sums: dict[str, int] = {}
        for bundle in self.bundles:
            sums |= self.checksums(self.read(bundle))
        return self.fingerprint(sums)


def open_stored(
    model: str | Path,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> StoredModel:
    """A model in safetensors files, judged as `load` judges it; no weight is read but buffers that were stored.

    Args:
        model, dtype, trust_remote_code, revision: as `load` takes them. Files of a hub model are fetched.

    Raises:
        UsageError, HywiaError: what `load` raises; HywiaError: a GGUF file, whose weights are stored packed.
    """
    source = located(model, revision)
    if source.is_gguf:
        raise HywiaError(
            f"model: {source.name} is a GGUF file, whose weights are packed; work from safetensors files: load it and "
            "save it as a directory first, or use the model that it was made from"
        )
    try:
        judgement = judged(source, trusted=trust_remote_code, quantised=False)
        folder = source.path
        if source.from_hub:
            folder = hub.complete(source.name, folder, code=judgement.code, options=source.hub)
        tokenizer = loading.tokenizer_of(folder, source.name, judgement)
        if source.from_hub:
            tokenizer.name_or_path = source.name
        network = skeleton(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        network.config.name_or_path = network.name_or_path = source.name
        packed = "z_loss_weight" in read_json(folder / "config.json") if judgement.rotary else None
        bundles = stored_parameters.bundles_of(network, stored_tensors(folder), source.name, packed=packed)
        _make_buffers(network)
        _read_buffers(network, bundles)
        _read_generation(network, folder, in_config=not judgement.rotary)
    except (HywiaError, MemoryError):
        raise
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError, ... by cause
        raise refusal(model, error) from error
    return StoredModel(network, tokenizer, folder, bundles)


def _make_buffers(model: Any) -> None:
    """Give the buffers that a model makes itself their values, as transformers does after it has read the others."""
    for module in model.modules():
        for leaf in module._non_persistent_buffers_set:
            buffer = module._buffers.get(leaf)
            if buffer is not None and buffer.is_meta:
                module._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    # Parameters without memory are drawn at random too, which does nothing and takes no time.
    model.initialize_weights()


def _read_buffers(model: Any, bundles: Sequence[Bundle]) -> None:
    """Buffers that are stored, from the files."""
    buffers = {name for name, buffer in model.named_buffers() if buffer.is_meta}
    for bundle in bundles:
        if buffers.isdisjoint(bundle.targets):
            continue
        for name, value in stored_parameters.read(model, bundle).items():
            if name in buffers:
                module, _, leaf = name.rpartition(".")
                owner: nn.Module = model.get_submodule(module)
                owner._buffers[leaf] = value.clone()


def _read_generation(model: Any, folder: Path, *, in_config: bool) -> None:
    """The generation config that is stored, or else (`in_config`) what the model's config says of generation, as
    loading has it."""
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
        return
    if not in_config:
        return
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
