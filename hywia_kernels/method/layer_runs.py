"""A model run layer by layer: each decoder layer on all of the text before the next one begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch
from ..engine.layered import hidden_of
from ..engine.patches import forward_replaced, hooked
from ..engine.samples import Samples
from ..errors import HywiaError

__all__ = ["CHUNK_TOKENS", "Call", "Entrance", "Weights", "entering", "entrance", "leaving", "seen"]

CHUNK_TOKENS = 8192  # that go through a layer together


class Weights:
    """Where the weights are of a model that is run layer by layer: here, all the time."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.devices: list[torch.device] = list(dict.fromkeys(p.device for p in layers.parameters()))

    def entrance(self) -> AbstractContextManager[None]:
        """While inside, what comes before the layers has its weights, and the first layer."""
        return nullcontext()

    def of(self, layers: Sequence[int]) -> AbstractContextManager[None]:
        """While inside, the layers of these indices have theirs."""
        return nullcontext()


class _Reached(Exception):
    """A layer has come to the module that was waited for."""


@dataclass
class Call:
    """A decoder layer's arguments beside the hidden states, for one run of samples."""

    arguments: tuple
    keywords: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        return hidden_of(layer(hidden, *self.arguments, **self.keywords))


@dataclass
class Entrance:
    """What enters the first layer for one run of samples, `[samples, tokens, hidden]`, and every layer's call."""

    calls: list[Call]
    hidden: Tensor
    rows: Tensor | None  # positions without padding; None: all
    rest: tuple | None  # what a layer returns beside the hidden states, if it returns a tuple

    def passed_on(self, hidden: Tensor) -> Any:
        """Hidden states as a layer returns them."""
        return hidden if self.rest is None else (hidden, *self.rest)


def entrance(model: Any, layers: nn.ModuleList, samples: Samples) -> Entrance:
    """Of one run of samples; of the layers, only the first one computes.

    Raises:
        HywiaError: layers of this family do not run by themselves.
    """
    if arch.architecture(model).together:
        raise HywiaError(
            "model: its layers hand on more than hidden states, so none of them runs by itself; leave out what is "
            "reconstructed, searched for or ranked a layer at a time (--no-reconstruct, --search none, --head-ranking "
            "scores)"
        )
    calls: list[Call] = []
    entered: list[Tensor] = []
    rest: list[tuple | None] = []
    first = layers[0].forward

    def passing(hidden: Tensor, *arguments: Any, **keywords: Any) -> Any:
        if not calls:
            entered.append(hidden)
            out: Any = first(hidden, *arguments, **keywords)
            rest.append(tuple(out[1:]) if isinstance(out, (tuple, list)) else None)
        calls.append(Call(arguments, keywords))
        return hidden if rest[0] is None else (hidden, *rest[0])

    tokens = samples.tokens.to(model.get_input_embeddings().weight.device)
    with forward_replaced([(layer, passing) for layer in layers]):
        arch.decoder(model)(tokens, use_cache=False)
    return Entrance(calls, entered[0], samples.rows() if samples.ragged else None, rest[0])


def leaving(model: Any, layers: nn.ModuleList, samples: Samples, begin: Entrance, hidden: Tensor) -> Tensor:
    """The model's final hidden states, those that enter its head, for what leaves the last layer; no layer computes.

    Args:
        samples, begin: the run of samples, and what `entrance` gave for it. hidden: what leaves the last layer.
    """
    tokens = samples.tokens.to(model.get_input_embeddings().weight.device)
    with forward_replaced([(layer, lambda *_, **__: begin.passed_on(hidden)) for layer in layers]):
        return arch.decoder(model)(tokens, use_cache=False).last_hidden_state


@contextmanager
def seen(modules: Sequence[nn.Module], *, stop: bool = False) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """What modules get and give while a layer runs. With `stop`, which goes with one module, the layer is left as soon
    as the module has run, and the block that runs it ends there."""
    kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        kept[module] = (arguments[0], output)
        if stop:
            raise _Reached

    with suppress(_Reached), hooked([(module, keep) for module in modules]):
        yield kept


def entering(call: Call, layer: nn.Module, module: nn.Module, hidden: Tensor, *, stop: bool) -> tuple[Tensor, Tensor]:
    """`(what enters a module of a layer, what leaves the layer)`; with `stop` the layer runs no further than that, and
    the hidden states that entered are given in the place of what leaves."""
    entered: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple) -> None:
        entered.append(arguments[0])
        if stop:
            raise _Reached

    out = hidden
    with suppress(_Reached), hooked([(module, keep)], before=True):
        out = call(layer, hidden)
    return entered[0], out
