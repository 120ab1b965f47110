"""Solve the surviving columns of a pruned model's output matrices again, by least squares on calibration text.

A unit leaves through the columns of one matrix (`down`, `o`). What it contributed is partly predictable from the units
that stay, so their columns can take it over: the refit is the linear regression of what the dense model adds to its
hidden states on the activations that the pruned model has. It goes through the layers in order, so that each matrix
sees what the refitted ones before it send, and it also repairs what those left undone ("drift").

Related work: least squares after structured pruning goes back to He et al. (arXiv 1707.06168); sequential layers with
streaming second moments to GPTQ and SparseGPT (arXiv 2210.17323, 2301.00774).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import arch, progress
from .engine.layered import hidden_of
from .engine.patches import forward_replaced, frozen
from .engine.samples import Samples, padded
from .errors import HywiaError, UsageError
from .surgery import _checked_groups, silence_rows
from .text import check_tokens, digest
from .types import Group, Plan
from .weights import fingerprint

__all__ = ["RIDGE", "refit"]

RIDGE = 0.1  # chosen on SmolLM2: README, "The recipe"
_CHUNK_TOKENS = 8192
_TINY = 1e-30


@dataclass
class _Call:
    """A decoder layer's arguments beside the hidden states, for one run of samples."""

    arguments: tuple
    keywords: dict[str, Any]


@dataclass
class _Run:
    """One run of samples on its way through the layers: hidden states of the dense and of the pruned model."""

    calls: list[_Call]
    dense: Tensor
    pruned: Tensor
    rows: Tensor | None  # positions without padding; None: all

    def flat(self, tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1, tensor.shape[-1])
        return flat if self.rows is None else flat.index_select(0, self.rows.to(flat.device))


@dataclass
class _Matrix:
    """One matrix to refit: which inputs stay, and its normal equations."""

    name: str
    linear: Any
    axis: int  # of the stored weight, on which the inputs lie
    kept: Tensor  # int64, ascending, on its device
    removed: Tensor
    sends_on: bool  # its output is only added to what leaves the layer


class _Normal:
    """`Σ w·x xᵀ` and `Σ w·r xᵀ` of a weighted regression of residuals `r` on inputs `x`, added up chunk by chunk.

    float64 on the CPU, float32 products elsewhere; a matrix with a bias has a constant input at the end.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.gram = torch.zeros(inputs, inputs, dtype=self.dtype, device=device)
        self.cross = torch.zeros(inputs, outputs, dtype=self.dtype, device=device)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)
        self.target = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor, residual: Tensor, target: Tensor, weight: Tensor) -> None:
        x, residual, weight = x.to(self.dtype), residual.to(self.dtype), weight.to(self.dtype)[:, None]
        weighted = x * weight
        self.gram += weighted.T @ x
        self.cross += weighted.T @ residual
        self.energy += (residual.square() * weight).sum(dtype=torch.float64)
        self.target += (target.to(self.dtype).square() * weight).sum(dtype=torch.float64)

    def solve(self, ridge: float) -> tuple[Tensor, float, float]:
        """`(change of the weight [inputs, outputs], relative squared error before, and after)`, in float64."""
        gram, cross = self.gram.double(), self.cross.double()
        damped = gram.clone()
        damped.diagonal().add_(ridge * gram.diagonal().mean() + _TINY)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            raise HywiaError("refit: normal equations are singular; use a larger ridge or more calibration text")
        change = torch.cholesky_solve(cross, factor)
        after = self.energy - 2 * (change * cross).sum() + (change * (gram @ change)).sum()
        scale = self.target.clamp(min=_TINY)
        return change, float(self.energy / scale), float(after / scale)


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """float32 products in float32: second moments of correlated inputs do not survive TF32's eleven bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def _seen(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """What modules get and give while a layer runs."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        seen[module] = (arguments[0], output)

    handles = [m.register_forward_hook(keep) for m in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _arguments(model: Any, layers: nn.ModuleList, samples: Samples) -> _Run:
    """What enters the first layer, and what else each layer is called with; no layer but the first computes, and that
    one to tell whether layers return their hidden states alone."""
    calls: list[_Call] = []
    entered: list[Tensor] = []

    first, alone = layers[0].forward, True

    def passing(hidden: Tensor, *arguments: Any, **keywords: Any) -> Any:
        nonlocal alone
        if not calls:
            entered.append(hidden)
            alone = isinstance(first(hidden, *arguments, **keywords), Tensor)
        calls.append(_Call(arguments, keywords))
        return hidden if alone else (hidden,)

    tokens = samples.tokens.to(model.get_input_embeddings().weight.device)
    with forward_replaced([(layer, passing) for layer in layers]):
        model.get_decoder()(tokens, use_cache=False)
    return _Run(calls, entered[0], entered[0], samples.rows() if samples.ragged else None)


def _matrices(model: Any, plan: Plan, found: Sequence[Group]) -> list[_Matrix]:
    """The matrices through whose columns the removed units left, in the order of the forward pass."""
    entry = arch.architecture(model)
    residual = None if entry.residual is None else f"{entry.layers}.{found[0].layer}.{entry.residual}"
    chosen = []
    for group in found:
        keep = plan.keep[group.name]
        if keep.numel() == group.units:
            continue
        stays = torch.zeros(group.units, dtype=torch.bool)
        stays[keep] = True
        member = group.members[-1]
        linear: Any = model.get_submodule(member.module)
        if member.index is not None or getattr(linear, member.parameter).dim() != 2:
            raise HywiaError(
                f"refit: {member.module} holds experts, whose matrices are not refitted; "
                "plan with units=('attention',), or prune without refit"
            )
        lines = stays.repeat_interleave(member.group_size).to(linear.weight.device)
        kept, removed = lines.nonzero()[:, 0], (~lines).nonzero()[:, 0]
        chosen.append(_Matrix(member.module, linear, member.axis, kept, removed, member.module == residual))
    return chosen


def _equations(layer: nn.Module, index: int, matrix: _Matrix, runs: Sequence[_Run], aims: Sequence[_Aim]) -> _Normal:
    """Normal equations of one matrix: the pruned model's inputs against what the dense one has and it lacks."""
    linear = matrix.linear
    bias = linear.bias is not None
    outputs = linear.weight.shape[1 - matrix.axis]
    normal = _Normal(matrix.kept.numel() + bias, outputs, linear.weight.device)
    for run, aim in zip(runs, aims, strict=True):
        call = run.calls[index]
        with _seen([linear]) as seen:
            out = hidden_of(layer(run.pruned, *call.arguments, **call.keywords))
        x, got = seen[linear]
        target = aim.outputs[linear].float()
        lacking = target - got.float()
        if aim.drift:
            if matrix.sends_on:  # all that the dense layer sends on, less what this one sends on beside the matrix
                lacking = aim.out.float() - out.float()
            else:
                lacking = lacking + (run.dense.float() - run.pruned.float())
        x = run.flat(x).index_select(1, matrix.kept)
        if bias:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        normal.add(x, run.flat(lacking), run.flat(target), aim.weight)
    return normal


@dataclass
class _Aim:
    """What the dense layer does with one run of samples."""

    out: Tensor
    outputs: dict[nn.Module, Tensor]
    weight: Tensor  # [tokens without padding]
    drift: bool


def _aim(layer: nn.Module, index: int, matrices: Sequence[_Matrix], run: _Run, drift: bool) -> _Aim:
    call = run.calls[index]
    with _seen([m.linear for m in matrices]) as seen:
        out = hidden_of(layer(run.dense, *call.arguments, **call.keywords))
    # The next norm divides by a token's rms, so errors count relative to it; tokens with huge activations (the first of
    # a text, usually) would decide the regression otherwise.
    weight = 1.0 / run.flat(out).float().square().mean(1).clamp(min=_TINY)
    return _Aim(out, {module: pair[1] for module, pair in seen.items()}, weight, drift)


def _apply(matrix: _Matrix, change: Tensor) -> None:
    linear = matrix.linear
    weight = linear.weight
    columns = change[: matrix.kept.numel()].to(weight.device)
    fresh = weight.index_select(matrix.axis, matrix.kept).double() + (columns.T if matrix.axis else columns)
    weight.index_copy_(matrix.axis, matrix.kept, fresh.to(weight.dtype))
    if linear.bias is not None:
        linear.bias.copy_((linear.bias.double() + change[-1]).to(linear.bias.dtype))


@torch.no_grad()
def refit(model: Any, plan: Plan, batches: Tensor | Sequence[Tensor], *, ridge: float = RIDGE) -> Plan:
    """Refit a model to a plan, before `prune` cuts it: the removed columns become zero, the surviving ones are solved.

    For every matrix `W` through whose columns removed units left, in the order of the forward pass,

        min over ΔW of  Σ_t w_t · |r_t − ΔW x̃_t|² + λ |ΔW|²,     λ = ridge · mean(diag(Σ_t w_t x̃_t x̃_tᵀ)),

    with `x̃` the surviving inputs of the matrix in the pruned and so far refitted model, `r` what its output lacks of
    the dense model's, and `w_t` one over the mean square of the dense layer's output. Where the architecture only adds
    the output to the hidden states (`Architecture.residual`), `r` includes what these lack already. Biases are solved
    too.
    The hidden states of the text between two layers are held, in the model's dtype, for both models; wide activations
    only for a few thousand tokens at a time.

    Args:
        model: the model the plan is for, not cut yet; its surviving columns change in place.
        plan: of `selection.plan`.
        batches: token ids, as `calibrate` takes them; more than were scored pay (README).
        ridge: λ, relative to the inputs' mean square. It pulls towards the weights as they were, not towards zero.

    Returns:
        The same plan for the refitted model: hand this one to `prune`. Its record says what was done, and for every
        matrix the relative squared error of its output before and after.

    Raises:
        HywiaError: the plan is not this model's, or the equations cannot be solved. UsageError: malformed batches or
            a ridge that is not positive.
    """
    began = time.monotonic()
    if not ridge > 0.0:
        raise UsageError(f"ridge: expected a positive number, got {ridge}")
    found = _checked_groups(model, plan)
    samples = padded(batches)
    check_tokens(samples.tokens, model.get_input_embeddings().num_embeddings)
    entry = arch.architecture(model)
    layers: Any = model.get_submodule(entry.layers)
    device = model.get_input_embeddings().weight.device
    errors: dict[str, list[float]] = {}
    with frozen(model), _exact_products(device):
        runs = [_arguments(model, layers, chunk) for chunk in samples.sorted().chunks(_CHUNK_TOKENS)]
        same = True  # both models have the same hidden states so far
        for index, layer in enumerate(progress.track(layers, "refitting")):
            matrices = _matrices(model, plan, [g for g in found if g.layer == index])
            aims = (
                []
                if same and not matrices
                else [_aim(layer, index, matrices, r, entry.residual is not None) for r in runs]
            )
            for matrix in matrices:
                matrix.linear.weight.index_fill_(matrix.axis, matrix.removed, 0.0)
            if entry.attention.wide_norms:  # they see the removed heads' queries and keys
                silence_rows(model, [g for g in found if g.layer == index and g.kind == "attention"], plan)
            for matrix in matrices:
                change, before, after = _equations(layer, index, matrix, runs, aims).solve(ridge)
                _apply(matrix, change)
                errors[matrix.name] = [before, after]
            same = same and not matrices
            for i, run in enumerate(runs):
                call = run.calls[index]
                run.pruned = hidden_of(layer(run.pruned, *call.arguments, **call.keywords))
                run.dense = run.pruned if same else aims[i].out
    record = {
        "samples": len(samples),
        "tokens": samples.total,
        "ridge": ridge,
        "calibration_sha256": digest(samples.tokens),
        "relative_error": errors,
        "seconds": round(time.monotonic() - began, 3),
    }
    return replace(plan, fingerprint=fingerprint(model), record={**plan.record, "refit": record})
