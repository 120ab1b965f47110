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
from .surgery import checked_groups, silence
from .text import check_tokens, digest
from .types import Group, Plan
from .weights import fingerprint

__all__ = ["RIDGE", "refit"]

RIDGE = 4.0  # chosen on SmolLM2: README, "The recipe"
_CHUNK_TOKENS = 8192
_TINY = 1e-30


@dataclass
class _Call:
    """A decoder layer's arguments beside the hidden states, for one run of samples."""

    arguments: tuple
    keywords: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        return hidden_of(layer(hidden, *self.arguments, **self.keywords))


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
    """One matrix to refit: which inputs stay."""

    module: nn.Module
    name: str
    weight: Tensor  # [outputs, inputs], shares the parameter's memory
    bias: Tensor | None
    kept: Tensor  # int64, ascending, on its device
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
    """What enters the first layer, and what else each layer is called with; only the first one computes."""
    calls: list[_Call] = []
    entered: list[Tensor] = []
    rest: list[tuple | None] = []  # what the first layer returns beside the hidden states, if it returns a tuple
    first = layers[0].forward

    def passing(hidden: Tensor, *arguments: Any, **keywords: Any) -> Any:
        if not calls:
            entered.append(hidden)
            out: Any = first(hidden, *arguments, **keywords)
            rest.append(out[1:] if isinstance(out, tuple) else None)
        calls.append(_Call(arguments, keywords))
        return hidden if rest[0] is None else (hidden, *rest[0])

    tokens = samples.tokens.to(model.get_input_embeddings().weight.device)
    with forward_replaced([(layer, passing) for layer in layers]):
        model.get_decoder()(tokens, use_cache=False)
    return _Run(calls, entered[0], entered[0], samples.rows() if samples.ragged else None)


def _matrices(model: Any, plan: Plan, found: Sequence[Group]) -> list[_Matrix]:
    """The matrices through which the removed units sent their output on, in the order of the forward pass.

    Matrices of stacked experts are left as they are: each sees only the tokens that are sent to it.
    """
    entry = arch.architecture(model)
    residual = None if entry.residual is None else f"{entry.layers}.{found[0].layer}.{entry.residual}"
    chosen = []
    for group in found:
        member, keep = group.members[-1], plan.keep[group.name]
        if keep.numel() == group.units or group.kind == "experts" or member.index is not None:
            continue
        module = model.get_submodule(member.module)
        weight = arch.view(model, member, group.units)
        weight = weight if member.axis == 1 else weight.T  # transformers' Conv1D stores [in, out]
        kept = (keep[:, None] * member.group_size + torch.arange(member.group_size)).reshape(-1).to(weight.device)
        chosen.append(_Matrix(module, member.module, weight, module.bias, kept, member.module == residual))
    return chosen


@dataclass
class _Aim:
    """What the dense layer does with one run of samples."""

    out: Tensor
    outputs: dict[nn.Module, Tensor]
    weight: Tensor  # [tokens without padding]
    drift: bool


def _equations(layer: nn.Module, index: int, matrix: _Matrix, runs: Sequence[_Run], aims: Sequence[_Aim]) -> _Normal:
    """Normal equations of one matrix: the pruned model's inputs against what the dense one has and it lacks."""
    bias = matrix.bias is not None
    normal = _Normal(matrix.kept.numel() + bias, len(matrix.weight), matrix.weight.device)
    for run, aim in zip(runs, aims, strict=True):
        with _seen([matrix.module]) as seen:
            out = run.calls[index](layer, run.pruned)
        x, got = seen[matrix.module]
        target = aim.outputs[matrix.module].float()
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


def _aim(layer: nn.Module, index: int, matrices: Sequence[_Matrix], run: _Run, drift: bool) -> _Aim:
    with _seen([m.module for m in matrices]) as seen:
        out = run.calls[index](layer, run.dense)
    # The next norm divides by a token's rms, so errors count relative to it; tokens with huge activations (the first of
    # a text, usually) would decide the regression otherwise.
    weight = 1.0 / run.flat(out).float().square().mean(1).clamp(min=_TINY)
    return _Aim(out, {module: pair[1] for module, pair in seen.items()}, weight, drift)


def _apply(matrix: _Matrix, change: Tensor) -> None:
    weight = matrix.weight
    columns = change[: matrix.kept.numel()].T.to(weight.device)
    fresh = weight.index_select(1, matrix.kept).double() + columns
    weight.index_copy_(1, matrix.kept, fresh.to(weight.dtype))
    if matrix.bias is not None:
        matrix.bias.copy_((matrix.bias.double() + change[-1].to(weight.device)).to(weight.dtype))


@torch.no_grad()
def refit(model: Any, plan: Plan, batches: Tensor | Sequence[Tensor], *, ridge: float = RIDGE) -> Plan:
    """Refit a model to a plan, before `prune` cuts it: removed units become zero, surviving output columns are solved.

    For every matrix `W` through which removed units sent their output on, in the order of the forward pass,

        min over ΔW of  Σ_t w_t · |r_t − ΔW x̃_t|² + λ |ΔW|²,
        λ = ridge · inputs / tokens · mean(diag(Σ_t w_t x̃_t x̃_tᵀ)),

    with `x̃` the surviving inputs of the matrix in the pruned and so far refitted model, `r` what its output lacks of
    the dense model's, and `w_t` one over the mean square of the dense layer's output. Where the architecture only adds
    the output to the hidden states (`Architecture.residual`), `r` includes what these lack already. Biases are solved
    too. Stacked experts are cut without a refit: each sees only the tokens that are sent to it.

    The hidden states of the text between two layers are held, in the model's dtype, for both models; wide activations
    only for a few thousand tokens at a time.

    Args:
        model: the model the plan is for, not cut yet; its surviving columns change in place.
        plan: of `selection.plan`.
        batches: token ids, as `calibrate` takes them; more than were scored pay (README).
        ridge: of λ. The best penalty of a regression of many inputs is their number over that of observations, divided
            by the share of the target they explain, so this is about the latter's inverse. It pulls towards the weights
            as they were, not towards zero.

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
    found = checked_groups(model, plan)
    samples = padded(batches)
    check_tokens(samples.tokens, model)
    entry = arch.architecture(model)
    layers: Any = model.get_submodule(entry.layers)
    device = model.get_input_embeddings().weight.device
    errors: dict[str, list[float]] = {}
    with frozen(model), _exact_products(device):
        runs = [_arguments(model, layers, chunk) for chunk in samples.sorted().chunks(_CHUNK_TOKENS)]
        same = True  # both models have the same hidden states so far
        for index, layer in enumerate(progress.track(layers, "refitting")):
            here = [g for g in found if g.layer == index]
            cut = any(plan.keep[g.name].numel() < g.units for g in here)
            aims: list[_Aim] = []
            matrices = _matrices(model, plan, here)
            if cut or not same:
                aims = [_aim(layer, index, matrices, run, entry.residual is not None) for run in runs]
            routers = [model.get_submodule(g.members[0].module) for g in here if g.kind == "experts"]
            before_cut = [(router, vars(router).get("forward")) for router in routers]
            for group in here:
                silence(model, group, plan.keep[group.name])
            for matrix in matrices:
                change, before, after = _equations(layer, index, matrix, runs, aims).solve(
                    ridge * matrix.kept.numel() / samples.total
                )
                _apply(matrix, change)
                errors[matrix.name] = [before, after]
            same = same and not cut
            for i, run in enumerate(runs):
                run.pruned = run.calls[index](layer, run.pruned)
                run.dense = run.pruned if same else aims[i].out
            for router, forward in before_cut:  # a cut router needs no other forward
                vars(router).pop("forward", None)
                if forward is not None:
                    router.forward = forward
    record = {
        "samples": len(samples),
        "tokens": samples.total,
        "ridge": ridge,
        "calibration_sha256": digest(samples.tokens),
        "relative_error": errors,
        "seconds": round(time.monotonic() - began, 3),
    }
    return replace(plan, fingerprint=fingerprint(model), record={**plan.record, "refit": record})
