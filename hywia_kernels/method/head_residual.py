"""What the other heads of a layer cannot make up for: how heads are chosen where a refit follows.

Gradients judge a head by what is lost when it goes and all else stays. A refit lets the others take over what they can
predict of it, so what counts is the rest: the energy of its output that a regression on all other heads leaves. It
comes from second moments of the output matrix's inputs alone, in one forward pass (the same quantity decides in optimal
brain surgery, Hassibi and Stork 1993, for a block of weights).
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
from .moments import exact_products, factored, moment_dtype

__all__ = ["head_residuals", "rank_heads"]

_CHUNK_TOKENS = 8192
_RIDGE = 0.01  # of the mean square of the inputs


@torch.no_grad()
def head_residuals(model: Any, batches: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    """Of every attention group, float32 `[units]` on the CPU: `tr(W_u (H⁻¹)_uu⁻¹ W_uᵀ) / tokens`.

    `H = Σ_t x_t x_tᵀ + λ` are the second moments of what enters the output matrix `W`, `u` the unit's inputs; this is
    the least squared error of `W x` without them when all other columns may change. The moments of all layers are held
    at a time, in float32 (float64 on the CPU).

    Args:
        model: a causal language model of a known architecture. batches: token ids, as `calibrate` takes them.

    Raises:
        HywiaError: an unknown architecture, ids beyond the vocabulary, or activations that are NaN or Inf. UsageError:
            malformed batches.
    """
    model = unwrapped(model)
    modules = dict(model.named_modules())
    check_held(modules)
    with apart(modules):
        return _measured(model, batches)


def _measured(model: Any, batches: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    found = [g for g in arch.groups(model) if g.kind == "attention"]
    samples = padded(batches)
    check_tokens(samples.tokens, model)
    grams: dict[str, Tensor] = {}
    rows: list[Tensor | None] = [None]

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1])
            if rows[0] is not None:
                x = x.index_select(0, rows[0].to(x.device))
            x = x.to(moment_dtype(x.device))
            grams[name] = grams[name] + x.T @ x if name in grams else x.T @ x

        return hook

    watched = [(model.get_submodule(g.members[-1].module), watch(g.name)) for g in found]
    devices = [module.weight.device for module, _ in watched]
    with hooked(watched, before=True), exact_products(*devices):
        for run in track(samples.sorted().chunks(_CHUNK_TOKENS), "measuring heads"):
            rows[0] = run.rows() if run.ragged else None
            _forward(model, run)
        return {g.name: _energy(model, g, grams.pop(g.name), samples.total) for g in found}


def _forward(model: Any, run: Samples) -> None:
    model.get_decoder()(run.tokens.to(model.get_input_embeddings().weight.device), use_cache=False)


def _energy(model: Any, group: Group, gram: Tensor, tokens: int) -> Tensor:
    member = group.members[-1]
    weight = arch.view(model, member, group.units).detach()
    weight = (weight if member.axis == 1 else weight.T).double()
    inverse = torch.cholesky_inverse(factored(gram.double(), _RIDGE, member.module))
    size = member.group_size
    blocks = torch.stack([inverse[u : u + size, u : u + size] for u in range(0, group.units * size, size)])
    columns = weight.view(len(weight), group.units, size).transpose(0, 1)  # [units, outputs, size]
    roots = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), columns.transpose(1, 2), upper=False)
    return roots.square().sum((1, 2)).div(tokens).float().cpu()


def rank_heads(scores: Scores, measured: dict[str, Tensor]) -> Scores:
    """Scores whose attention groups are ranked by `head_residuals`."""
    return replace(scores, values={**scores.values, **measured}, record={**scores.record, "heads": "leftover"})
