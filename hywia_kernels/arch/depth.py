"""Whole decoder layers: what leaves with one, and what of config and modules goes by the layers' number or places.

Where a layer stands may decide what it is: whether its attention slides, whether it has rotary positions or experts.
Configs list such types layer by layer, and the lists follow a cut. Whether that is all is not believed but tried: a
model is built, without memory, from the config as it was and from the config as it will be, and each layer that stays
must be the same in both.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import HywiaError
from .configs import text_config
from .discovery import architecture, layers_of

__all__ = ["check_depth", "keep_layers", "layer_parameters"]

_TYPES = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")  # fields with an entry per layer
_FAMILY = ("transformers.", "transformers_modules.")  # where the classes of families are, a checkpoint's own among them


def layer_parameters(model: nn.Module) -> tuple[int, ...]:
    """Parameters of each decoder layer, all of which leave with it.

    Raises:
        HywiaError: an unknown architecture, or a layer shares parameters with something else.
    """
    counts = []
    for layer in layers_of(model):
        counts.append(sum(p.numel() for p in layer.parameters()))
    beside = sum(p.numel() for p in model.parameters()) - sum(counts)
    inside = {id(p) for layer in layers_of(model) for p in layer.parameters()}
    if beside != sum(p.numel() for p in model.parameters() if id(p) not in inside):
        raise HywiaError("model: layers share parameters with each other, so none of them can go; use other --units")
    return tuple(counts)


def check_depth(model: nn.Module, keep: Sequence[int]) -> None:
    """Make sure that layers can go: that the family's config describes those that stay at their new places.

    Args:
        keep: indices of the layers that stay, ascending.

    Raises:
        HywiaError: it does not; the message names what a layer would become.
    """
    _Follower(model, keep)


def keep_layers(model: nn.Module, keep: Sequence[int]) -> None:
    """Take all layers but `keep` out of a model, in place: the list of layers, the config's fields, and the numbers
    that modules keep for themselves.

    The caller holds the layers that go, and what modules' and configs' dictionaries had, if this is to be undone.

    Raises:
        HywiaError: as `check_depth`, before anything is changed.
    """
    _Follower(model, keep).follow()


class _Follower:
    """One change of a model's depth: found out on twins without memory, then made.

    Raises:
        HywiaError: as `check_depth`.
    """

    def __init__(self, model: nn.Module, keep: Sequence[int]) -> None:
        self.model, self.keep = model, list(keep)
        entry, config = architecture(model), text_config(model)
        if entry.together:
            raise HywiaError(
                "model: its layers hand on more than hidden states, so none of them can go whole; use other --units"
            )
        for name, wanted in entry.placeless.items():
            found = getattr(config, name, wanted)
            if found != wanted:
                raise HywiaError(
                    f"model: whole layers can go where the config says {name}={wanted!r}, got {found!r}: a layer's "
                    "place enters what it computes; use other --units"
                )
        self.path = f"{entry.layers}."
        self.fields = _fields(config, self.keep)
        self.before = _twin(model, {})
        self.after = _twin(model, self.fields)
        self.places = self._compared_layers()

    def _compared_layers(self) -> list[tuple[str, str]]:
        """`(module in its layer, attribute)` of the numbers that are a layer's own place."""
        one, other = layers_of(self.before), layers_of(self.after)
        if len(other) != len(self.keep):
            raise self._refusal(f"its config still describes {len(other)} layers, not {len(self.keep)}")
        places: dict[tuple[str, str], None] = {}
        for new, old in enumerate(self.keep):
            was, will = dict(_facts(one[old])), dict(_facts(other[new]))
            for key in [*was, *(k for k in will if k not in was)]:
                if was.get(key) == will.get(key) and type(was.get(key)) is type(will.get(key)):
                    continue
                if type(was.get(key)) is int and (was[key], will.get(key)) == (old, new):
                    places[key] = None
                    continue
                what = ".".join(part for part in key if part)
                raise self._refusal(
                    f"layer {old} would be layer {new}, and its {what} {will.get(key)!r} instead of {was.get(key)!r}"
                )
        return list(places)

    def _refusal(self, why: str) -> HywiaError:
        kind = getattr(self.model.config, "model_type", type(self.model).__name__)
        return HywiaError(
            f"model: a {kind} config cannot describe the layers that stay: {why}; use other --units than layers"
        )

    def follow(self) -> None:
        layers = layers_of(self.model)
        stays = [layers[i] for i in self.keep]
        del layers[:]
        layers.extend(stays)
        for new, layer in enumerate(stays):
            for name, attribute in self.places:
                module = layer.get_submodule(name)
                if attribute in vars(module):
                    setattr(module, attribute, new)
        config = text_config(self.model)
        for name, value in self.fields.items():
            setattr(config, name, value)
        self._follow_outside()

    def _follow_outside(self) -> None:
        """Attributes and buffers of modules outside the layers that depend on which layers there are."""
        modules = dict(self.model.named_modules())
        after = dict(self.after.named_modules())
        for name, was in self.before.named_modules():
            if name.startswith(self.path) or name not in after or name not in modules:
                continue
            module, will = modules[name], after[name]
            now, then = dict(_plain(was)), dict(_plain(will))
            for attribute in now:
                if attribute in then and now[attribute] != then[attribute] and attribute in vars(module):
                    setattr(module, attribute, then[attribute])
            for buffer in [b for b in was._buffers if b not in will._buffers and b in module._buffers]:
                del module._buffers[buffer]


def _fields(config: Any, keep: Sequence[int]) -> dict[str, Any]:
    """Fields of a decoder's config that follow when layers go, and their new values."""
    depth = config.num_hidden_layers
    fields: dict[str, Any] = {"num_hidden_layers": len(keep)}
    for name in _TYPES:
        types = getattr(config, name, None)
        if isinstance(types, (list, tuple)) and len(types) == depth:
            fields[name] = [types[i] for i in keep]
    step = getattr(config, "decoder_sparse_step", None)
    if step is not None:  # every step-th layer has experts, but for those named
        dense = set(getattr(config, "mlp_only_layers", None) or ())
        fields["decoder_sparse_step"] = 1
        fields["mlp_only_layers"] = [new for new, old in enumerate(keep) if old in dense or (old + 1) % step]
    return fields


def _twin(model: Any, fields: Mapping[str, Any]) -> nn.Module:
    """A model of the family's own class on the meta device, from a model's config with other fields."""
    config = copy.deepcopy(model.config)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name, value in fields.items():
        setattr(inner, name, value)
    family: Any = next((c for c in type(model).__mro__ if c.__module__.startswith(_FAMILY)), type(model))
    with torch.device("meta"):
        return family(config)


def _facts(layer: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    """`((module, attribute), value)` of all that a layer's modules say about themselves, shapes and classes too."""
    for name, module in layer.named_modules():
        yield (name, "class"), type(module).__name__
        for leaf, parameter in (*module._parameters.items(), *module._buffers.items()):
            yield (name, leaf), None if parameter is None else tuple(parameter.shape)
        for attribute, value in _plain(module):
            yield (name, attribute), value


def _plain(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's attributes that are plain values, of its own and not of torch."""
    for attribute, value in vars(module).items():
        if not attribute.startswith("_") and attribute != "training" and _is_plain(value):
            yield attribute, value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    return value is None or isinstance(value, (bool, int, float, str))
