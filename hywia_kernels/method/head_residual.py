"""What the other heads of a layer cannot make up for: how heads are chosen where a refit follows.

Gradients judge a head by what is lost when it goes and all else stays. A refit lets the others take over what they can
predict of it, so what counts is the rest: the energy of its output that a regression on all other heads leaves. It
comes from second moments of the output matrix's inputs alone, in one forward pass (the same quantity decides in optimal
brain surgery, Hassibi and Stork 1993, for a block of weights).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import arch
from ..arch.holding import check_held, unwrapped
from ..engine.passes import apart
from ..engine.samples import padded
from ..progress import track
from ..types import Group, Scores
from .calibration_data import check_tokens
from .layer_runs import CHUNK_TOKENS, entering, entrance
from .moments import cholesky_factor, exact_products, moment_dtype

__all__ = ["head_residuals", "rank_heads"]

_RIDGE = 0.01  # of the mean square of the inputs


@torch.no_grad()
def head_residuals(
    model: Any, batches: Tensor | Sequence[Tensor], *, layers: Collection[int] | None = None
) -> dict[str, Tensor]:
    """Of every attention group, float32 `[units]` on the CPU: `tr(W_u (H⁻¹)_uu⁻¹ W_uᵀ) / tokens`.

    `H = Σ_t x_t x_tᵀ + λ` are the second moments of what enters the output matrix `W`, `u` the unit's inputs; this is
    the least squared error of `W x` without them when all other columns may change. The layers are
    run one after the other, on all of the text: the hidden states between two of them are held, in the model's dtype,
    and one layer's moments, in float32 (float64 on the CPU).

    Args:
        model: a causal language model of a known architecture. batches: token ids, as `calibrate` takes them.
        layers: indices of the layers whose heads are wanted; None: all. No layer behind the last of them is run.

    Raises:
        HywiaError: an unknown architecture, ids beyond the vocabulary, or activations that are NaN or Inf. UsageError:
            malformed batches.
    """
    model = unwrapped(model)
    modules = dict(model.named_modules())
    check_held(modules)
    with apart(modules):
        return _measured(model, batches, layers)


def _measured(model: Any, batches: Tensor | Sequence[Tensor], wanted: Collection[int] | None) -> dict[str, Tensor]:
    groups = {g.layer: g for g in arch.groups(model) if g.kind == "attention" and (wanted is None or g.layer in wanted)}
    samples = padded(batches)
    check_tokens(samples.tokens, model)
    layers: Any = model.get_submodule(arch.architecture(model).layers)
    measured: dict[str, Tensor] = {}
    last = max(groups, default=-1)
    with exact_products(*dict.fromkeys(p.device for p in layers.parameters())):
        chunks = samples.sorted().chunks(CHUNK_TOKENS) if groups else []
        runs = [entrance(model, layers, chunk) for chunk in chunks]
        for index, layer in enumerate(track(layers[: last + 1], "measuring heads")):
            group = groups.get(index)
            if group is None:
                for run in runs:
                    run.hidden = run.calls[index](layer, run.hidden)
                continue
            module = model.get_submodule(group.members[-1].module)
            gram: Tensor | None = None
            for run in runs:
                x, run.hidden = entering(run.calls[index], layer, module, run.hidden, stop=index == last)
                x = x.reshape(-1, x.shape[-1])
                if run.rows is not None:
                    x = x.index_select(0, run.rows.to(x.device))
                x = x.to(moment_dtype(x.device))
                gram = x.T @ x if gram is None else gram + x.T @ x
            assert gram is not None
            measured[group.name] = _energy(model, group, gram, samples.total)
    return measured


def _energy(model: Any, group: Group, gram: Tensor, tokens: int) -> Tensor:
    member = group.members[-1]
    weight = arch.view(model, member, group.units).detach()
    weight = (weight if member.axis == 1 else weight.T).double()
    inverse = torch.cholesky_inverse(cholesky_factor(gram.double(), _RIDGE, member.module))
    size = member.group_size
    blocks = torch.stack([inverse[u : u + size, u : u + size] for u in range(0, group.units * size, size)])
    columns = weight.view(len(weight), group.units, size).transpose(0, 1)  # [units, outputs, size]
    roots = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), columns.transpose(1, 2), upper=False)
    return roots.square().sum((1, 2)).div(tokens).float().cpu()


def rank_heads(scores: Scores, measured: dict[str, Tensor]) -> Scores:
    """Scores whose attention groups are ranked by `head_residuals`."""
    return replace(scores, values={**scores.values, **measured}, record={**scores.record, "heads": "leftover"})
