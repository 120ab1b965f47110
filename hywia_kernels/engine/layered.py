"""The lean and the layerwise pass keep what enters each decoder layer, and run one layer at a time again in backward.

Lean takes all samples in one run; the last layers, whose backward comes first, can keep all that it needs, so that they
are not run again. Layerwise takes the samples in several runs, and scores a layer when its matrices' gradients and
inputs have arrived from all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch
from ..errors import HywiaError
from .block import BlockForward, Kept
from .linear import Collected, Scorer
from .loss import hidden_gradient, targets
from .patches import forward_replaced
from .samples import Samples

__all__ = ["Step", "backward", "hidden_of", "kept_on", "refuse_hooks", "run"]


@dataclass
class Step:
    """One call of a layer: the hidden states that entered it, the device they were on, and the other arguments."""

    hidden: Tensor
    device: torch.device
    arguments: tuple
    keywords: dict[str, Any]
    kept: Kept | None = None  # what backward needs, where it need not be made again


@dataclass
class _Tape:
    """The steps of one run of samples, and what left the last layer."""

    steps: list[Step] = field(default_factory=list)
    last: Tensor | None = None


def kept_on(hidden: Tensor, offload: bool) -> Tensor:
    """Hidden states as they are kept for backward: where they are, or, with `offload`, in the host's pinned memory."""
    if not offload or hidden.device.type != "cuda":
        return hidden.detach()
    host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
    # The copy is on the stream that makes the tensor and that will reuse its memory, so nothing has to wait.
    return host.copy_(hidden.detach(), non_blocking=True)


def hidden_of(out: Any) -> Tensor:
    """The hidden states among what a layer returns: some return a tuple or list, with attention weights behind."""
    return out[0] if isinstance(out, (tuple, list)) else out


def _recording(forward: Callable, tape: _Tape, last: bool, offload: bool, keep: bool) -> Callable:
    def record(hidden: Tensor, *arguments: Any, **keywords: Any) -> Any:
        step = Step(kept_on(hidden, offload), hidden.device, arguments, keywords)
        tape.steps.append(step)
        out: Any
        if keep and isinstance(forward, BlockForward):
            out, step.kept = forward.kept(hidden, **keywords)
        else:
            with torch.no_grad():
                out = forward(hidden, *arguments, **keywords)
        if last:
            tape.last = hidden_of(out).detach().requires_grad_()  # the final norm's graph begins here
            return (tape.last, *out[1:]) if isinstance(out, (tuple, list)) else tape.last
        return out

    return record


def _forward(
    model: Any, layers: nn.ModuleList, samples: Samples, scale: float, offload: bool, kept_layers: int
) -> tuple[_Tape, Tensor, Tensor]:
    """`(tape, gradient at what left the last layer, Σ_s L_s)` of one run of samples."""
    tape = _Tape()
    replacements = [
        (layer, _recording(layer.forward, tape, i == len(layers) - 1, offload, i >= len(layers) - kept_layers))
        for i, layer in enumerate(layers)
    ]
    wanted = targets(samples, model.get_output_embeddings().weight.device)
    tokens = samples.tokens.to(model.get_input_embeddings().weight.device)
    with forward_replaced(replacements), torch.enable_grad():
        embedded = model.get_input_embeddings()(tokens).detach()
        hidden = arch.decoder(model)(inputs_embeds=embedded, use_cache=False).last_hidden_state
        gradient, loss = hidden_gradient(model, hidden, wanted, scale)
        assert tape.last is not None
        (gradient,) = torch.autograd.grad(hidden, tape.last, gradient)
    tape.last = None
    return tape, gradient, loss


def backward(layer: nn.Module, step: Step, gradient: Tensor, scorer: Scorer) -> Tensor:
    """Runs an instrumented layer again, and back; returns the gradient at what entered it."""
    hidden = step.hidden.to(step.device, non_blocking=True)
    forward: Any = layer.forward
    scorer.replaying = True
    try:
        if isinstance(forward, BlockForward):
            kept = forward.kept(hidden, **step.keywords)[1] if step.kept is None else step.kept
            return forward.backward(gradient.to(step.device), kept)
        hidden = hidden.requires_grad_()
        with torch.enable_grad():
            out = hidden_of(forward(hidden, *step.arguments, **step.keywords))
    finally:
        scorer.replaying = False
    return torch.autograd.grad(out, hidden, gradient.to(out.device))[0]


def refuse_hooks(layers: nn.ModuleList) -> None:
    """Raise HywiaError where a decoder layer has hooks. Backward runs its `forward` alone again, so they would not be
    called."""
    for i, layer in enumerate(layers):
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise HywiaError(
                f"model: expected no hooks on decoder layers, got some on layer {i}, which passes that run layers one "
                "by one ('lean', 'layerwise', 'streamed') cannot follow; remove them, or pass memory='fast'"
            )


def run(
    model: Any,
    layers: nn.ModuleList,
    chunks: Sequence[Samples],
    scorer: Scorer,
    scale: float,
    offload: bool,
    kept_layers: int = 0,
) -> Tensor:
    """Runs forward and backward of `scale · Σ_s L_s` through an instrumented model; returns `Σ_s L_s`, float32, on the
    head's device.

    Args:
        layers: the decoder's.
        chunks: runs of samples, in the order of the results.
        offload: keep what enters the layers in the host's pinned memory (CUDA).
        kept_layers: how many of the last layers, where they run as one node, keep all that backward needs.

    Raises:
        HywiaError: a decoder layer has hooks.
    """
    refuse_hooks(layers)
    tapes, gradients, losses = [], [], []
    for chunk in chunks:
        tape, gradient, loss = _forward(model, layers, chunk, scale, offload, kept_layers)
        tapes.append(tape)
        gradients.append(gradient)
        losses.append(loss)
    del tape, gradient
    total = sum(chunk.total for chunk in chunks)
    for layer in reversed(layers):
        scorer.collected = collected = Collected(total) if len(chunks) > 1 else None
        for c, chunk in enumerate(chunks):
            if collected is not None:
                scorer.select(chunk)
                collected.begin(chunk.total)
            gradients[c] = backward(layer, tapes[c].steps.pop(), gradients[c], scorer)
        scorer.collected = None
        if collected is not None:
            collected.score(scorer)
    return torch.stack(losses).sum()
