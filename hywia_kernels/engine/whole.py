"""The pass over the whole graph: one forward and one backward of all samples, keeping what backward needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import arch
from .loss import hidden_gradient, targets
from .patches import forward_replaced
from .samples import Samples

__all__ = ["run"]


def run(model: Any, samples: Samples, scale: float) -> Tensor:
    """Runs forward and backward of `scale · Σ_s L_s` through an instrumented model; returns `Σ_s L_s`, float32, on the
    head's device."""
    device = model.get_input_embeddings().weight.device
    wanted = targets(samples, model.get_output_embeddings().weight.device)
    tokens = samples.tokens.to(device)
    with torch.enable_grad():
        embedding = model.get_input_embeddings()
        embedded = embedding(tokens).detach().requires_grad_()
        entry = arch.architecture(model)
        entered = embedded.clone() if entry.derived else embedded  # which some families scale in place
        if entry.together:  # layers may have embeddings of the tokens besides
            with forward_replaced([(embedding, lambda *_, **__: entered)]):
                hidden = arch.decoder(model)(input_ids=tokens, use_cache=False).last_hidden_state
        else:
            hidden = arch.decoder(model)(inputs_embeds=entered, use_cache=False).last_hidden_state
        gradient, loss = hidden_gradient(model, hidden, wanted, scale)
        torch.autograd.grad(hidden, embedded, gradient)
    return loss
