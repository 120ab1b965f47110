"""Whole layers masked in place: a layer of zeros hands on what it gets, where what it adds is all that it sends."""

from __future__ import annotations

from typing import Any

import torch

from .. import arch
from ..errors import HywiaError
from ..types import Depth

__all__ = ["check_transparent", "zero_layers"]


def check_transparent(model: Any) -> None:
    """Raise HywiaError where a layer whose parameters are zero does not hand on what it gets."""
    config = arch.text_config(model)
    for name, wanted in arch.architecture(model).transparent.items():
        found = getattr(config, name, wanted)
        if found != wanted:
            raise HywiaError(
                f"plan: takes whole layers, and with {name}={found!r} in its config no layer of this model can stand "
                "masked in the place of none; prune it without a mask and without a reconstruction"
            )


@torch.no_grad()
def zero_layers(model: Any, depth: Depth) -> None:
    """Make every parameter of the layers that go zero, norms and biases too, so that they add nothing to the hidden
    states.

    Raises:
        HywiaError: as `check_transparent`, before anything is changed.
    """
    check_transparent(model)
    layers = arch.layers_of(model)
    for index in depth.gone:
        for parameter in layers[index].parameters():
            parameter.zero_()
