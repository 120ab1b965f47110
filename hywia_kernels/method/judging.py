"""Plans judged by what they leave of a model's predictions: masked, briefly refitted, held against the dense model.

The model is put back after every plan, bit for bit. A plan is tried one layer at a time (see `through_layers`): the
text that it is judged on goes through each layer while that is changed, so that no copy of the model is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch
from ..arch.holding import plain_model
from ..engine.passes import apart, put_back
from ..engine.samples import padded
from ..settings import RIDGE
from ..types import Plan
from .calibration_data import check_tokens
from .divergence import mean_divergence, with_head
from .layer_runs import CHUNK_TOKENS, entrance, leaving
from .reconstruction import check_ridge, reconstruct, through_layers
from .surgery import checked_groups, mask
from .undo import Undo

__all__ = ["Follow", "Judge", "Texts", "changed", "shared_out"]

Follow = Callable[[Any, Plan], None]  # trains a masked model in place, whose plan it is


@dataclass(frozen=True)
class Texts:
    """The parts of a calibration text that plans are tried on.

    Attributes:
        refit: int64 `[samples, length]`, to solve matrices on. judged: the same, to judge on.
        fresh: how many of the judged samples nothing else has read: neither the scores nor the refit.
    """

    refit: Tensor
    judged: Tensor
    fresh: int


def shared_out(tokens: Tensor, scored: int, refit: int, judged: int) -> Texts:
    """The first samples to refit on and the last ones to judge on, int64 `[samples, length]`.

    Those to judge on are at most half of the text. Where it is short, samples that were scored are among them; they are
    never refitted on, unless there is one sample alone.

    Args:
        scored: how many of the first samples the scores have read. refit, judged: how many of each are wanted.
    """
    held = min(judged, max(1, len(tokens) // 2))
    read = max(scored, min(refit, len(tokens) - held))
    first = tokens[: max(1, min(refit, len(tokens) - held))]
    return Texts(first, tokens[len(tokens) - held :], max(0, min(held, len(tokens) - read)))


class Judge:
    """Measures how far plans of one model take its predictions, on one text.

    Args:
        model: as it is before any of the plans. texts: to try them on.
        ridge: of the refit; None: the removed units are masked, and nothing is solved.
        passes: of the refit, in which layers are trained.

    Raises:
        UsageError, HywiaError: as `reconstruct`.
    """

    def __init__(self, model: Any, texts: Texts, ridge: float | None = RIDGE, passes: int = 0) -> None:
        if ridge is not None:
            check_ridge(ridge)
        self.model, self.ridge, self.passes = plain_model(model, changing=True), ridge, passes
        self.refit = None if ridge is None else padded(texts.refit)
        text = padded(texts.judged)
        check_tokens(text.tokens, self.model)
        self.chunks = text.sorted().chunks(CHUNK_TOKENS)
        self.dense = self._states()

    @torch.no_grad()
    def divergence(self, plan: Plan) -> float:
        """Mean over tokens of `KL(dense ‖ masked and refitted)`, in nats.

        Held meanwhile: what `reconstruct` holds of the text to refit on, the hidden states of the text to judge on
        between two layers, a copy of one layer's cut parameters, and a chunk of logits (see `distillation_loss`).

        Raises:
            HywiaError: the plan is not this model's, or its equations cannot be solved. After this, and after any other
                error or interrupt, the model is as it was.
        """
        with apart(dict(self.model.named_modules())):
            layers: Any = self.model.get_submodule(arch.architecture(self.model).layers)
            begun = [entrance(self.model, layers, chunk) for chunk in self.chunks]
            hidden = [begin.hidden for begin in begun]

            def go_on(index: int, layer: nn.Module) -> None:
                for run, begin in enumerate(begun):
                    hidden[run] = begin.calls[index](layer, hidden[run])

            groups = checked_groups(self.model, plan)
            ridge, passes = self.ridge or RIDGE, self.passes
            through_layers(self.model, plan, groups, self.refit, ridge, passes=passes, while_changed=go_on)
            ends = zip(self.chunks, begun, hidden, strict=True)
            states = [leaving(self.model, layers, chunk, begin, left) for chunk, begin, left in ends]
            return mean_divergence(self.model, self.dense, self._flat(states))

    def after(self, plan: Plan, follow: Follow) -> float:
        """As `divergence`, once `follow` has trained the masked and refitted model.

        A copy of all parameters is held in the host's memory meanwhile, and another one of the head's.
        """
        dense = with_head(self.model, copy.deepcopy(self.model.get_output_embeddings()))
        refit = None if self.refit is None else list(self.refit.tokens)
        with changed(self.model, plan, refit, self.ridge or RIDGE, self.passes):
            follow(self.model, plan)
            return mean_divergence(self.model, self.dense, self._states(), dense)

    @torch.no_grad()
    def _states(self) -> Tensor:
        """The final hidden states of the model as it is, `[tokens, hidden]` without padding."""
        with apart(dict(self.model.named_modules())):
            decoder, device = arch.decoder(self.model), self.model.get_input_embeddings().weight.device
            return self._flat(
                [decoder(chunk.tokens.to(device), use_cache=False).last_hidden_state for chunk in self.chunks]
            )

    def _flat(self, states: list[Tensor]) -> Tensor:
        rows = zip(self.chunks, states, strict=True)
        return torch.cat([s.flatten(0, 1).index_select(0, chunk.rows().to(s.device)) for chunk, s in rows])


@contextmanager
def changed(model: nn.Module, plan: Plan, batches: Any, ridge: float = RIDGE, passes: int = 0) -> Iterator[None]:
    """A model masked to a plan, and refitted where there are `batches` to do it on (see `reconstruct`), for as long as
    the context is open.

    The caller may change parameters' values further. Afterwards, and after any error or interrupt, all parameters have
    their values and gradients again, bit for bit, and modules and configs their attributes; parameters that are
    replaced by others, and buffers that are written to, are not put back. A copy of the parameters is held in the
    host's memory.
    """
    undo = Undo(model)
    kept = [(p, p.detach().to("cpu", copy=True), p.grad, p.requires_grad) for p in model.parameters()]

    @torch.no_grad()
    def restore() -> None:
        for parameter, values, gradient, learning in kept:
            parameter.copy_(values)
            parameter.grad = gradient
            parameter.requires_grad_(learning)
        undo.roll_back()

    with put_back(restore):
        if batches is None:
            mask(model, plan)
        else:
            reconstruct(model, plan, batches, ridge=ridge, passes=passes)
        yield
