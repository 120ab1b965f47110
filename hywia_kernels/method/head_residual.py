"""The residual of each head: the part of its output that the other heads of its layer cannot predict.

Gradients judge a head by what is lost when it goes and all else stays. A reconstruction lets the other heads take over
what they can predict of it, so what counts is the residual: the energy of the head's output that a regression on all
other heads leaves. It takes nothing but second moments of the output matrix's inputs, in one forward pass. It is the
saliency of optimal brain surgery (Hassibi and Stork 1993) for a block of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch
from ..arch.holding import check_held, unwrapped
from ..engine.passes import apart
from ..engine.patches import hooked
from ..engine.samples import Samples, padded
from ..progress import track
from ..types import Group, Scores
from .calibration_data import check_tokens
from .moments import cholesky_factor, exact_products, moment_dtype

__all__ = ["head_residuals", "rank_heads"]

_CHUNK_TOKENS = 8192
_RIDGE = 0.01  # of the mean square of the inputs


@torch.no_grad()
def head_residuals(model: Any, batches: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    """The residual energy of every attention unit: `tr(W_u (H⁻¹)_uu⁻¹ W_uᵀ) / tokens`.

    `H = Σ_t x_t x_tᵀ + λ` are the second moments of what enters the output matrix `W`, and `u` are the unit's inputs.
    The value is the least squared error of `W x` without these inputs when all other columns may change. The moments
    of all layers are held at a time, in float32 (float64 on the CPU).

    Args:
        model: a causal language model of a known architecture.
        batches: token ids int64 `[samples, length]`, or a sequence of such, as `calibrate` takes them.

    Returns:
        The name of every attention group -> float32 `[units]` on the CPU, in squares of the hidden states' unit.

    Raises:
        HywiaError: an unknown architecture, ids beyond the vocabulary, or activations that are NaN or Inf. UsageError:
            malformed batches.
    """
    model = unwrapped(model)
    modules = dict(model.named_modules())
    check_held(modules)
    with apart(modules):
        return _residuals(model, batches)


def _residuals(model: Any, batches: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    groups = [g for g in arch.groups(model) if g.kind == "attention"]
    samples = padded(batches)
    check_tokens(samples.tokens, model)
    grams: dict[str, Tensor] = {}
    rows: list[Tensor | None] = [None]

    def accumulate_into(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1])
            if rows[0] is not None:
                x = x.index_select(0, rows[0].to(x.device))
            x = x.to(moment_dtype(x.device))
            grams[name] = grams[name] + x.T @ x if name in grams else x.T @ x

        return hook

    watched = [(model.get_submodule(g.members[-1].module), accumulate_into(g.name)) for g in groups]
    devices = [module.weight.device for module, _ in watched]
    with hooked(watched, before=True), exact_products(*devices):
        for run in track(samples.sorted().chunks(_CHUNK_TOKENS), "measuring heads"):
            rows[0] = run.rows() if run.ragged else None
            _forward(model, run)
        return {g.name: _residual_energy(model, g, grams.pop(g.name), samples.total) for g in groups}


def _forward(model: Any, run: Samples) -> None:
    model.get_decoder()(run.tokens.to(model.get_input_embeddings().weight.device), use_cache=False)


def _residual_energy(model: Any, group: Group, gram: Tensor, tokens: int) -> Tensor:
    member = group.members[-1]
    weight = arch.view(model, member, group.units).detach()
    weight = (weight if member.axis == 1 else weight.T).double()
    inverse = torch.cholesky_inverse(cholesky_factor(gram.double(), _RIDGE, member.module))
    size = member.group_size
    blocks = torch.stack([inverse[u : u + size, u : u + size] for u in range(0, group.units * size, size)])
    columns = weight.view(len(weight), group.units, size).transpose(0, 1)  # [units, outputs, size]
    roots = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), columns.transpose(1, 2), upper=False)
    return roots.square().sum((1, 2)).div(tokens).float().cpu()


def rank_heads(scores: Scores, residuals: dict[str, Tensor]) -> Scores:
    """The scores with those of attention groups replaced by their residuals, as `head_residuals` gives them."""
    return replace(scores, values={**scores.values, **residuals}, record={**scores.record, "heads": "leftover"})
