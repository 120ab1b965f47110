"""What the other heads of a layer cannot make up for: how heads are chosen where a refit follows.

Gradients judge a head by what is lost when it goes and all else stays. A refit lets the others take over what they can
predict of it, so what counts is the rest: the energy of its output that a regression on all other heads leaves. It
comes from second moments of the output matrix's inputs alone, in one forward pass (the same quantity decides in optimal
brain surgery, Hassibi and Stork 1993, for a block of weights).

Heads are priced as they are ranked. What several heads cost together is not the sum of what each costs alone: two that
can stand in for each other cost nothing one at a time, and everything when both go. So a head's price counts the heads
that go before it as gone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import arch
from ..arch.holding import check_held, unwrapped
from ..engine.passes import apart
from ..engine.samples import padded
from ..errors import UsageError
from ..progress import track
from ..types import Group, Scores
from .calibration_data import check_tokens
from .layer_runs import CHUNK_TOKENS, entering, entrance
from .moments import TINY, add_products, cholesky_factor, damped, exact_products, zero_moments

__all__ = ["HeadResiduals", "head_residuals", "rank_heads"]

_RIDGE = 0.01  # of the mean square of the inputs


@dataclass(frozen=True, eq=False)
class HeadResiduals(Mapping[str, Tensor]):
    """Attention groups' names -> residuals of their units, float32 `[units]` on the CPU; a mapping like a dictionary.

    Attributes:
        residuals: what the mapping holds: `R({u})`, energy a token that the layer's other heads leave of each unit.
        shares: group name -> float32 `[units]`, what each unit adds to the energy that is lost when the units go one
            after the other, the least residual first: `(R(before and u) − R(before)) / Σ_v E_v`, with `E_v` the energy
            of a unit's own output. Where heads have nothing in common they are their energies' shares and sum to one.
    """

    residuals: Mapping[str, Tensor]
    shares: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.residuals[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.residuals)

    def __len__(self) -> int:
        return len(self.residuals)


@torch.no_grad()
def head_residuals(
    model: Any, batches: Tensor | Sequence[Tensor], *, layers: Collection[int] | None = None
) -> HeadResiduals:
    """Of every attention group, what the others leave of its units: `R(S) = tr(W_S (H⁻¹)_SS⁻¹ W_Sᵀ) / tokens`.

    `H = Σ_t x_t x_tᵀ + λ` are the second moments of what enters the output matrix `W`, `S` the inputs of one unit or of
    several; `R(S)` is the least squared error of `W x` without them when all other columns may change. The layers are
    run one after the other, on all of the text: the hidden states between two of them are held, in the model's dtype,
    and one layer's moments, in float64.

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


def _measured(model: Any, batches: Tensor | Sequence[Tensor], wanted: Collection[int] | None) -> HeadResiduals:
    groups = {g.layer: g for g in arch.groups(model) if g.kind == "attention" and (wanted is None or g.layer in wanted)}
    samples = padded(batches)
    check_tokens(samples.tokens, model)
    layers: Any = model.get_submodule(arch.architecture(model).layers)
    residuals, shares = dict[str, Tensor](), dict[str, Tensor]()
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
                gram = zero_moments(x.shape[1], x.shape[1], x.device) if gram is None else gram
                add_products(gram, x, x)
            assert gram is not None
            residuals[group.name], shares[group.name] = _energies(model, group, gram, samples.total)
    return HeadResiduals(residuals, shares)


def _energies(model: Any, group: Group, gram: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Residuals and shares of a group's units, float32 `[units]` each."""
    member = group.members[-1]
    weight = arch.view(model, member, group.units).detach()
    weight = (weight if member.axis == 1 else weight.T).double()
    size = member.group_size
    factor = cholesky_factor(gram, _RIDGE, member.module)
    # H = L·Lᵀ, so the diagonal's blocks of its inverse are products of the columns of L's.
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    of_units = inverse.view(len(gram), group.units, size).transpose(0, 1)  # [units, inputs, size]
    columns = weight.view(len(weight), group.units, size).transpose(0, 1)  # [units, outputs, size]
    roots = torch.linalg.solve_triangular(
        torch.linalg.cholesky(of_units.transpose(1, 2) @ of_units), columns.transpose(1, 2), upper=False
    )
    residuals = roots.square().sum((1, 2)).div(tokens).float()
    # In the order in which units go, the leading blocks of the inverse's factor are the factors of what is gone so far,
    # so that one substitution holds the residual of every such set: that of the first k is the first k blocks' square.
    # With the order reversed H = L·Lᵀ again, and that factor is L⁻ᵀ read backwards: substituting in it is multiplying
    # by Lᵀ, and no inverse is needed.
    order = torch.sort(residuals, descending=True, stable=True).indices
    entries = (order[:, None] * size + torch.arange(size, device=order.device)).reshape(-1)
    factor = torch.linalg.cholesky_ex(damped(gram, _RIDGE)[entries][:, entries])[0]
    steps = factor.T @ weight[:, entries].T
    added = torch.empty_like(residuals, dtype=torch.float64)
    added[order] = steps.square().sum(1).view(group.units, size).sum(1)
    own = (columns @ _blocks(gram, size) * columns).sum()
    own += _RIDGE * gram.diagonal().mean() * weight.square().sum()  # the residuals' ridge
    return residuals.cpu(), (added / own.clamp(min=TINY)).float().cpu()


def _blocks(matrix: Tensor, size: int) -> Tensor:
    """The diagonal's blocks of a square matrix, `[blocks, size, size]`."""
    return torch.stack([matrix[i : i + size, i : i + size] for i in range(0, len(matrix), size)])


def rank_heads(scores: Scores, measured: HeadResiduals) -> Scores:
    """Scores whose attention groups are ranked by `head_residuals`, and priced by them.

    The loss estimate of a unit becomes its share (`HeadResiduals.shares`) of the sum of the group's estimates. These
    say what it costs when a unit's output goes and nothing makes up for it: half the mean square of a mask's
    derivative, a quadratic form in the output that goes. With one curvature for all heads of a layer that is
    `Σ_v loss_v / Σ_v E_v` per energy, and the energy that counts is what the heads that stay cannot make up for. So the
    sum over the units that go is the price of all of them together, and rank and price follow from the same energies.
    Where heads have nothing in common, the sum over all of them is what it was.

    Raises:
        UsageError: `measured` is not of `head_residuals`.
    """
    if not isinstance(measured, HeadResiduals):
        raise UsageError(f"measured: expected what head_residuals gives, got {type(measured).__name__}")
    loss = dict(scores.loss)
    for name, share in measured.shares.items() if loss else ():
        loss[name] = (loss[name].sum(dtype=torch.float64) * share.double()).float()
    values = {**scores.values, **measured.residuals}
    return replace(scores, values=values, loss=loss, record={**scores.record, "heads": "leftover"})
