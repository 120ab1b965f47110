"""Which tensors of a checkpoint's files make which parameters of the model, and their values, a few at a time.

Names in the files are often the model's own. Where they are not (experts stored one by one, other prefixes), the
conversions that transformers applies while it loads are applied here to as many tensors as one of them takes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import baichuan, loaded_weights, weight_files
from .weight_files import Stored

__all__ = ["Bundle", "bundles_of", "merged", "read", "read_ahead"]

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
}


@dataclass
class Bundle:
    """Tensors of the files that are read together, and what they become.

    Attributes:
        sources: names in the files -> where they lie.
        targets: names in the model's state -> shape.
        conversions: how each part of the sources is converted, in transformers' order.
    """

    sources: dict[str, Stored] = field(default_factory=dict)
    targets: dict[str, torch.Size] = field(default_factory=dict)
    conversions: list[_Conversion] = field(default_factory=list)


@dataclass
class _Conversion:
    """One parameter's sources `(name in the files, pattern it matched)`, and transformers' converter; None: as it is.

    Where a packed matrix of Baichuan is taken apart, `normalised` says whether its head is brought to length.
    """

    target: str
    parts: list[tuple[str, str]]
    converter: Any = None
    normalised: bool | None = None

    def made(self, model: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.normalised is not None:
            return baichuan.converted({name: values[name] for name, _ in self.parts}, normalised_head=self.normalised)
        if self.converter is None:
            return {self.target: values[self.parts[0][0]]}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.parts:
            converter.add_tensor(self.target, name, pattern, values[name])
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def bundles_of(model: Any, stored: Mapping[str, Stored], source: str, *, packed: bool | None = None) -> list[Bundle]:
    """Every tensor of the files in the bundle that makes parameters of it.

    Args:
        model: on the meta device. stored: name -> tensor, by the files' headers. source: what the user named.
        packed: the files are Baichuan-7B's, whose LLaMA the model is; True: the rows of its head are brought to length.

    Raises:
        HywiaError: the files lack a tensor of the model, or hold one of another shape, or one that has no place.
    """
    state = model.state_dict(keep_vars=True)
    conversions, extra = (_renamed(model, stored, state), []) if packed is None else (_packed(stored, packed), [])
    bundles: list[Bundle] = []
    mismatched: list[tuple[str, torch.Size, torch.Size]] = []
    found: set[str] = set()
    for conversion in conversions:
        sources = {name: stored[name] for name, _ in conversion.parts}
        shapes = _shapes(model, conversion, sources)
        if not shapes:  # rotary frequencies of old checkpoints
            if packed is not None:  # which of such a model must be LLaMA's
                read(model, Bundle(sources, {}, [conversion]))
            continue
        for name, shape in shapes.items():
            if name not in state:
                extra.append(name)
            elif state[name].shape != shape:
                mismatched.append((name, shape, state[name].shape))
        found |= shapes.keys()
        bundles.append(Bundle(sources, shapes, [conversion]))
    extra = [name for name in extra if not _ignored(model, name, "unexpected")]
    held = {id(state[name]) for name in found if name in state}
    missing = [n for n, t in state.items() if id(t) not in held and not _ignored(model, n, "missing")]
    report = {"missing_keys": missing, "unexpected_keys": extra, "mismatched_keys": mismatched}
    loaded_weights.check_complete(report, source)
    return _without_doubles([b for b in bundles if any(name in state for name in b.targets)], state)


def _renamed(model: Any, stored: Mapping[str, Stored], state: dict[str, Tensor]) -> list[_Conversion]:
    """As transformers renames and converts while it loads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    found: dict[str, _Conversion] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        converter = None if pattern is None else by_pattern[pattern]
        conversion = found.setdefault(target, _Conversion(target, [], converter))
        conversion.parts.append((name, name if pattern is None else pattern))
    return list(found.values())


def _packed(stored: Mapping[str, Stored], normalised: bool) -> list[_Conversion]:
    return [_Conversion(name, [(name, name)], normalised=normalised) for name in stored]


def _shapes(model: Any, conversion: _Conversion, sources: Mapping[str, Stored]) -> dict[str, torch.Size]:
    """Names and shapes of what a conversion makes, without reading anything."""
    if conversion.target.endswith("rotary_emb.inv_freq"):
        return {}
    empty = {
        name: torch.empty(s.shape, dtype=_DTYPES.get(s.dtype, torch.uint8), device="meta")
        for name, s in sources.items()
    }
    return {name: value.shape for name, value in conversion.made(model, empty).items()}


def _ignored(model: Any, name: str, when: str) -> bool:
    """Whether a family says that a tensor may be missing, or left over, when it is loaded."""
    patterns = getattr(model, f"_keys_to_ignore_on_load_{when}", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _without_doubles(bundles: list[Bundle], state: Mapping[str, Tensor]) -> list[Bundle]:
    """The bundles, of which one that makes what another makes already is dropped: head and embedding of a model that
    has them as one may both be stored. The one that has the first of the names counts, as when transformers ties."""
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    made = {id(state[name]): name for b in bundles for name in b.targets if name in state}
    made |= {id(state[n]): n for b in bundles for n in b.targets if n in state and first[id(state[n])] == n}
    return [b for b in bundles if any(made[id(state[n])] == n for n in b.targets if n in state)]


def merged(bundles: Iterable[Bundle]) -> Bundle:
    """Several bundles as one."""
    whole = Bundle()
    for bundle in bundles:
        whole.sources |= bundle.sources
        whole.targets |= bundle.targets
        whole.conversions += bundle.conversions
    return whole


def read_ahead(bundles: Iterable[Bundle]) -> None:
    """Ask the system to have the files' pages of bundles in memory when they are read."""
    weight_files.read_ahead((s.file, s.begin, s.bytes) for bundle in bundles for s in bundle.sources.values())


def read(model: Any, bundle: Bundle) -> dict[str, Tensor]:
    """A bundle's values in the model's dtype, by names of the model's state; views of the mapped files where nothing
    had to be converted.

    Args:
        model: on the meta device.
    """
    from safetensors import safe_open

    values: dict[str, Tensor] = {}
    by_file: dict[Path, list[str]] = {}
    for name, stored in bundle.sources.items():
        by_file.setdefault(stored.file, []).append(name)
    dtypes = _dtypes(model, bundle)
    for file, names in by_file.items():
        with safe_open(str(file), "pt") as opened:
            for name in names:
                value = opened.get_tensor(name)
                values[name] = value.to(dtypes[name]) if value.is_floating_point() else value
    made: dict[str, Tensor] = {}
    for conversion in bundle.conversions:
        made |= conversion.made(model, {name: values.pop(name) for name, _ in conversion.parts})
    return made


def _dtypes(model: Any, bundle: Bundle) -> dict[str, torch.dtype]:
    """Name in the files -> dtype of the parameters that it goes into, to which it is cast before it is converted."""
    names: dict[str, torch.dtype] = {}
    for conversion in bundle.conversions:
        module, _, leaf = (conversion.target if conversion.normalised is None else "").rpartition(".")
        try:
            dtype = getattr(model.get_submodule(module), leaf).dtype
        except AttributeError:
            dtype = model.dtype
        names |= {name: dtype for name, _ in conversion.parts}
    return names
