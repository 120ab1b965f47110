"""A cut model with what it should predict, as one module whose forward gives the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import arch
from ..distillation import distillation_loss
from .teacher import Teacher
from .tuning import Tuned

__all__ = ["Distilled", "divergence"]

_JUDGED_TOKENS = 4096  # at a time


class Distilled(nn.Module):
    """A cut model with what it should predict: its forward gives the loss, so that wrappers see every gradient."""

    def __init__(self, student: Any, tuned: Tuned, teacher: Teacher, hard: float, *, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast  # products in bfloat16
        self.student = student
        self.own = nn.ParameterList(tuned.own.values())  # those inside the student too, which counts each once
        self.hard = hard
        self._teacher = (teacher,)  # in a tuple: no module of this one
        super().train(False)

    @property
    def teacher(self) -> Teacher:
        return self._teacher[0]

    def train(self, mode: bool = True) -> Distilled:
        """Always as if evaluated: dropout would only blur what is compared. A Trainer asks at every step, which is no
        time to go through all modules."""
        return self

    def forward(self, input_ids: Tensor, index: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(input_ids, index, self.hard, held_out=False)}

    def loss(self, tokens: Tensor, index: Tensor, hard: float, *, held_out: bool) -> Tensor:
        """Mean over all positions but the last, which has no next token."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            hidden = arch.decoder(self.student)(tokens, use_cache=False).last_hidden_state[:, :-1]
            hidden = hidden.reshape(-1, hidden.shape[-1])
            targets = self.teacher.targets(tokens, index, held_out=held_out)
            labels = tokens[:, 1:].reshape(-1) if hard else None
            return distillation_loss(self.student, hidden, targets, None, labels=labels, hard=hard)


@torch.no_grad()
def divergence(distilled: Distilled, held_out: Tensor, device: torch.device) -> float:
    """Mean KL divergence in nats of the cut model's next-token distributions from the dense model's, on held-out
    samples."""
    step = max(1, _JUDGED_TOKENS // held_out.shape[1])
    total = 0.0
    for start in range(0, len(held_out), step):
        batch = held_out[start : start + step]
        index = torch.arange(start, start + len(batch))
        total += len(batch) * float(distilled.loss(batch.to(device), index, 0.0, held_out=True))
    return total / len(held_out)
