"""The next-token loss and its gradient at the final hidden states, without the logits of all tokens at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .. import arch
from ..errors import HywiaError
from .patches import forward_replaced
from .samples import Samples

__all__ = [
    "LOGIT_BYTES",
    "LogitChange",
    "Targets",
    "check_head",
    "hidden_gradient",
    "logit_change",
    "logits_of",
    "stated_changes",
    "targets",
]

LOGIT_BYTES = 64 << 20  # bytes of float32 logits at a time; with what is computed from them, about four times as much


class LogitChange(NamedTuple):
    """What becomes of a head's logits: `cap·tanh(scale·logits / cap)`, or `scale·logits` without a cap."""

    scale: float = 1.0
    cap: float | None = None


# Config fields by which families change logits after the head: the change as their code computes it, rounding included,
# and as numbers. An entry of the table names its fields.
_CHANGES: dict[str, tuple[Callable[[Tensor, float], Tensor], Callable[[float], LogitChange]]] = {
    "final_logit_softcapping": (lambda logits, cap: torch.tanh(logits / cap) * cap, lambda cap: LogitChange(cap=cap)),
    "logits_scaling": (lambda logits, scaling: logits / scaling, lambda scaling: LogitChange(scale=1.0 / scaling)),
    "logit_scale": (lambda logits, scale: logits * scale, lambda scale: LogitChange(scale=scale)),
}


@dataclass(frozen=True)
class Targets:
    """What each position of the flattened `[samples · longest]` should predict, on the head's device.

    Attributes:
        tokens: int64, the next token.
        weights: float32, its weight in `Σ_s L_s`: one over the sample's number of next tokens; else zero.
    """

    tokens: Tensor
    weights: Tensor


def check_head(model: Any) -> None:
    """Raise HywiaError when the logits are not what the head and the table's entry give."""
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise HywiaError(
            f"model: expected a language model with its head, got {type(model).__name__}; load it by "
            "AutoModelForCausalLM"
        )
    known = arch.architecture(model).logits
    if known is None:
        return
    for name in _CHANGES:
        value = getattr(arch.text_config(model), name, None)
        if name not in known and value not in (None, 1, 1.0):
            raise HywiaError(
                f"model: config sets {name}={value!r}, which this loss would drop; remove it when the model "
                "was trained without, or add it to its entry in hywia_kernels/arch/table.py"
            )


def _changes(model: Any) -> list[tuple[str, float]]:
    """The fields that change this model's logits, in the order in which its code applies them, and their values."""
    config = arch.text_config(model)
    values = [(name, getattr(config, name, None)) for name in arch.architecture(model).logits or ()]
    return [(name, value) for name, value in values if value is not None]


def logits_of(model: Any, states: Tensor) -> Tensor:
    """The model's logits of final hidden states: computed in the model's dtype, and converted to float32 at the end."""
    changes = arch.architecture(model).logits
    if changes is None:
        return _by_the_model(model, states)
    logits = model.get_output_embeddings()(states)
    for name, value in _changes(model):
        logits = _CHANGES[name][0](logits, value)
    return logits.float()


@functools.cache
def _output_class() -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Held(BaseModelOutputWithPast):
        """What a decoder gives; whatever else a model asks it for is None."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)
            return None

    return Held


def _by_the_model(model: Any, states: Tensor) -> Tensor:
    """The logits `[tokens, vocabulary]` of final hidden states `[tokens, features]`, by the model's own forward with
    its decoder held still: whatever it does to the states before the head, and to the logits after it."""
    output = _output_class()(last_hidden_state=states[None])

    def held(*_: Any, **__: Any) -> Any:
        return output

    tokens = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
    with forward_replaced([(arch.decoder(model), held)]):
        return model(input_ids=tokens, use_cache=False).logits[0].float()


def stated_changes(model: Any) -> tuple[str, ...] | None:
    """The fields by which a model's config states what becomes of its logits, where they tell all that its own forward
    does with random hidden states; None where it does something else, or has none of its own."""
    config = arch.text_config(model)
    names = tuple(name for name in _CHANGES if getattr(config, name, None) not in (None, 1, 1.0))
    head = model.get_output_embeddings()
    if head.weight.shape[1] != getattr(config, "hidden_size", head.weight.shape[1]):
        return None  # something comes before the head
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(4, head.weight.shape[1], generator=generator).to(head.weight)
    with torch.no_grad():
        logits = head(states)
        for name in names:
            logits = _CHANGES[name][0](logits, getattr(config, name))
        same = torch.allclose(logits.float(), _by_the_model(model, states), rtol=1e-5, atol=1e-6)
    return names if same else None


def logit_change(model: Any) -> LogitChange:
    """What `logits_of` does after the head, as numbers for a kernel.

    Raises:
        HywiaError: the family changes logits in two ways, or in one that only its own forward knows, which these
            numbers do not hold.
    """
    if arch.architecture(model).logits is None:
        raise HywiaError(
            f"model: what a {model.config.model_type} model does to its logits after the head is in its own forward "
            "alone, which no kernel knows; leave out what is learned from logits"
        )
    changes = _changes(model)
    if len(changes) > 1:
        names = " and ".join(name for name, _ in changes)
        raise HywiaError(f"model: expected one change of the logits after the head, got {names}, which no kernel knows")
    return _CHANGES[changes[0][0]][1](changes[0][1]) if changes else LogitChange()


def targets(samples: Samples, device: torch.device) -> Targets:
    """The targets of these samples, moved before the forward pass so that the loss does not wait for a device."""
    following = torch.zeros_like(samples.tokens)
    following[:, :-1] = samples.tokens[:, 1:]
    counted = torch.arange(samples.longest) < samples.lengths[:, None] - 1
    weights = counted / (samples.lengths[:, None] - 1).float()
    return Targets(following.reshape(-1).to(device), weights.reshape(-1).to(device))


def hidden_gradient(model: Any, hidden: Tensor, wanted: Targets, scale: float) -> tuple[Tensor, Tensor]:
    """The gradient of `scale · Σ_s L_s` at the final hidden states, and `Σ_s L_s`, float32, on the head's device.

    Args:
        hidden: `[samples, longest, features]`.
        wanted: the targets of these samples.
        scale: the loss scale.
    """
    head = model.get_output_embeddings()
    gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    flat, into = hidden.detach().reshape(-1, hidden.shape[-1]), gradient.view(-1, hidden.shape[-1])
    device = wanted.tokens.device
    total = torch.zeros((), dtype=torch.float32, device=device)
    vocabulary = getattr(head, "out_features", None) or arch.text_config(model).vocab_size
    step = max(1, LOGIT_BYTES // (4 * vocabulary))
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        states = flat[part].requires_grad_()
        with torch.enable_grad():
            logits = logits_of(model, states)
            loss = functional.cross_entropy(logits, wanted.tokens[part], reduction="none")
            loss = (loss * wanted.weights[part]).sum()
            del logits
            (into[part],) = torch.autograd.grad(loss * scale, states)
        total += loss.detach()
    return gradient, total
