"""Training steps as fast as the device: layers compiled, and forward and backward replayed as one CUDA graph.

A small model's step is thousands of kernels of a few microseconds each. From Python a step of SmolLM2's shapes on 8,192
tokens takes 127 ms on an H200, of which the GPU computes for 55. With compiled layers it computes for 26, and launching
still takes 107: hence the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from ... import arch
from ...engine.patches import unpacked
from ...engine.static_driver import capture
from .distilled import Distilled
from .teacher import Live, Remembered

__all__ = ["CapturedStep", "captured_step", "compiled", "uncompiled"]

_CAPTURED_PARAMETERS = 3e9  # of the dense model: above, kernels are long enough to hide what launches them
_COMPILED_TOKENS = 1_000_000  # from which compiling takes less time than it saves: some ten seconds, and half of a step
_SHAPES = 4  # kinds of decoder layers, both models' together, that are compiled at most


@contextmanager
def compiled(distilled: Distilled, tokens: int) -> Iterator[None]:
    """Decoder layers of both models compute through torch.compile for a while, on a GPU, where so many tokens to come
    are worth it and the layers are not of too many widths. What torch.compile cannot take runs as it is written."""
    teacher = distilled.teacher
    models = [distilled.student, teacher.model] if isinstance(teacher, Live) else [distilled.student]
    layers = [layer for model in models for layer in arch.layers_of(model)]
    kinds = {(type(layer), *((name, p.shape) for name, p in layer.named_parameters())) for layer in layers}
    if not next(distilled.parameters()).is_cuda or tokens < _COMPILED_TOKENS or len(kinds) > _SHAPES:
        yield
        return
    import torch._dynamo  # takes a second: not for those who never compile

    try:
        for layer in layers:
            layer.compile(dynamic=False)
        with torch._dynamo.config.patch(suppress_errors=True):
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def uncompiled() -> Any:
    """A context in which compiled layers run as they are written: for shapes that come once."""
    return torch.compiler.set_stance("force_eager")


def _as_compiled() -> Any:
    """A context in which compiled layers run as they were compiled, or raise RuntimeError: what is compiled while a
    stream is captured fails, and would leave a layer as it is written without a word."""
    return torch.compiler.set_stance("fail_on_recompile")


class CapturedStep:
    """Forward and backward of a batch as one CUDA graph. Gradients add up in buffers of its own, which the parameters
    hold as theirs after a call.

    Args:
        samples, length: of every batch, whose samples are whole. during: makes a context that the step is captured in.
    """

    def __init__(
        self, distilled: Distilled, samples: int, length: int, during: Callable[[], Any] = nullcontext
    ) -> None:
        self.parameters = [p for p in distilled.parameters() if p.requires_grad]
        device = self.parameters[0].device
        self.tokens = torch.zeros(samples, length, dtype=torch.int64, device=device)
        self.index = torch.zeros(samples, dtype=torch.int64, device=device)
        self.share = torch.ones((), device=device)
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self._hand_out()

        def step() -> Tensor:
            loss = distilled(self.tokens, self.index)["loss"] * self.share
            loss.backward()
            return loss.detach()

        try:
            with unpacked():
                self._replay = capture(step, during=during)
        finally:
            for parameter in self.parameters:
                parameter.grad = None

    def _hand_out(self) -> None:
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def takes(self, tokens: Tensor) -> bool:
        """Whether a batch has the shape that was captured."""
        return tokens.shape == self.tokens.shape

    def __call__(self, tokens: Tensor, index: Tensor, share: float) -> Tensor:
        """Add `share` times the gradients of the batch's loss to the parameters'; returns so much of the loss. `index`
        says which samples of the text they are."""
        if self.parameters[0].grad is None:
            torch._foreach_zero_(self.gradients)
            self._hand_out()
        self.tokens.copy_(tokens)
        self.index.copy_(index)
        self.share.fill_(share)
        return self._replay().clone()


def captured_step(distilled: Distilled, samples: int, length: int) -> CapturedStep | None:
    """A captured step where it pays and the models can be captured; else None."""
    teacher = distilled.teacher
    if not isinstance(teacher, (Live, Remembered)) or not next(distilled.parameters()).is_cuda:
        return None
    if isinstance(teacher, Remembered) and not teacher.at_hand:
        return None
    if sum(p.numel() for p in teacher.model.parameters()) > _CAPTURED_PARAMETERS:
        return None
    for context, during in ((nullcontext, _as_compiled), (uncompiled, nullcontext)):
        # A model that asks the host for something, a compiled layer that cannot be captured, memory that is short.
        with suppress(RuntimeError, NotImplementedError), context():
            return CapturedStep(distilled, samples, length, during)
    return None
