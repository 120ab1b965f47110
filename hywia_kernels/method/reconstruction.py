"""Solve the surviving columns of a pruned model's output matrices again, by least squares on calibration text.

A unit's output leaves a layer through the columns of one matrix (`down`, `o`). What it contributed is partly
predictable from the units that stay, so their columns can take it over: the reconstruction is the linear regression of
what the dense model adds to its hidden states on the activations that the pruned model has. It goes through the layers
in order, so that each matrix sees the outputs of the reconstructed ones before it, and it also makes up for the error
that these left in the hidden states (the drift).

Related work: least squares after structured pruning goes back to He et al. (arXiv 1707.06168); sequential layers with
streaming second moments to GPTQ and SparseGPT (arXiv 2210.17323, 2301.00774).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch, progress
from ..arch.facts import fingerprint
from ..arch.holding import plain_model
from ..engine.layered import hidden_of
from ..engine.passes import apart, put_back
from ..engine.patches import forward_replaced, hooked
from ..engine.samples import Samples, padded
from ..errors import HywiaError, UsageError
from ..settings import RIDGE
from ..types import Group, Plan
from .calibration_data import check_tokens, digest
from .moments import cholesky_factor, exact_products, moment_dtype
from .surgery import checked_groups, zero_units

__all__ = ["reconstruct"]

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
    """One matrix to reconstruct, and which of its inputs stay."""

    module: nn.Module
    name: str
    weight: Tensor  # [outputs, inputs], shares the parameter's memory
    bias: Tensor | None
    kept: Tensor  # int64, ascending, on its device
    additive: bool  # the layer only adds its output to the hidden states that it returns


class _NormalEquations:
    """`Σ w·x xᵀ` and `Σ w·r xᵀ` of a weighted regression of residuals `r` on inputs `x`, added up chunk by chunk.

    float64 on the CPU, float32 products elsewhere; a matrix with a bias has a constant input at the end.
    """

    def __init__(self, name: str, inputs: int, outputs: int, device: torch.device) -> None:
        self.name = name
        self.dtype = moment_dtype(device)
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
        """`(change of the weight [inputs, outputs], relative squared error before, and after)`, in float64.

        Raises:
            HywiaError: activations that are NaN or Inf, or equations without a solution.
        """
        gram, cross = self.gram.double(), self.cross.double()
        change = torch.cholesky_solve(cross, cholesky_factor(gram, ridge, self.name))
        after = self.energy - 2 * (change * cross).sum() + (change * (gram @ change)).sum()
        scale = self.target.clamp(min=_TINY)
        return change, float(self.energy / scale), float(after / scale)


@contextmanager
def _recorded(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """The first input and the output of each module, filled in while a layer runs."""
    records: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        records[module] = (arguments[0], output)

    with hooked([(module, keep) for module in modules]):
        yield records


def _start_run(model: Any, layers: nn.ModuleList, samples: Samples) -> _Run:
    """Record what enters the first layer, and what else each layer is called with; only the first layer computes."""
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


def _matrices(model: Any, plan: Plan, groups: Sequence[Group]) -> list[_Matrix]:
    """The matrices that the removed units' output went through, in the order of the forward pass.

    Matrices of stacked experts are left as they are, since each reads only the tokens that are routed to it.
    """
    entry = arch.architecture(model)
    residual = None if entry.residual is None else f"{entry.layers}.{groups[0].layer}.{entry.residual}"
    chosen = []
    for group in groups:
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
class _LayerTarget:
    """What the dense layer makes of one run of samples, which the pruned layer is to come near to."""

    hidden: Tensor  # the layer's output
    outputs: dict[nn.Module, Tensor]  # of each matrix to reconstruct
    token_weights: Tensor  # [tokens without padding]
    include_drift: bool  # whether the residual includes the error of the hidden states that enter the layer


def _equations(
    layer: nn.Module, index: int, matrix: _Matrix, runs: Sequence[_Run], targets: Sequence[_LayerTarget]
) -> _NormalEquations:
    """Normal equations of one matrix: the regression of the dense model's residual on the pruned model's inputs."""
    bias = matrix.bias is not None
    equations = _NormalEquations(matrix.name, matrix.kept.numel() + bias, len(matrix.weight), matrix.weight.device)
    for run, layer_target in zip(runs, targets, strict=True):
        with _recorded([matrix.module]) as records:
            hidden = run.calls[index](layer, run.pruned)
        x, output = records[matrix.module]
        target = layer_target.outputs[matrix.module].float()
        residual = target - output.float()
        if layer_target.include_drift:
            if matrix.additive:  # the whole difference of the layers' outputs is then within the matrix's reach
                residual = layer_target.hidden.float() - hidden.float()
            else:
                residual = residual + (run.dense.float() - run.pruned.float())
        x = run.flat(x).index_select(1, matrix.kept)
        if bias:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        equations.add(x, run.flat(residual), run.flat(target), layer_target.token_weights)
    return equations


def _layer_target(
    layer: nn.Module, index: int, matrices: Sequence[_Matrix], run: _Run, include_drift: bool
) -> _LayerTarget:
    with _recorded([m.module for m in matrices]) as records:
        hidden = run.calls[index](layer, run.dense)
    # The next norm divides by a token's rms, so errors count relative to it; tokens with huge activations (the first of
    # a text, usually) would decide the regression otherwise.
    token_weights = 1.0 / run.flat(hidden).float().square().mean(1).clamp(min=_TINY)
    outputs = {module: output for module, (_, output) in records.items()}
    return _LayerTarget(hidden, outputs, token_weights, include_drift)


@dataclass
class _Solved:
    """New values of a matrix, on the host: the columns that stay `[outputs, kept]`, and the bias."""

    columns: Tensor
    bias: Tensor | None


def _solved(matrix: _Matrix, change: Tensor) -> _Solved:
    """The matrix with a change `[inputs, outputs]` added, rounded to the weight's dtype.

    Raises:
        HywiaError: the dtype cannot hold the values.
    """
    weight, change = matrix.weight, change.to(matrix.weight.device)
    columns = (weight.index_select(1, matrix.kept).double() + change[: matrix.kept.numel()].T).to(weight.dtype)
    bias = None if matrix.bias is None else (matrix.bias.double() + change[-1]).to(weight.dtype)
    if not all(bool(torch.isfinite(x).all()) for x in (columns, bias) if x is not None):
        raise HywiaError(
            f"{matrix.name}: its solution is beyond the range of {str(weight.dtype).removeprefix('torch.')}; load the "
            "model in bfloat16 or float32, or use a larger ridge"
        )
    return _Solved(columns.cpu(), None if bias is None else bias.cpu())


def _apply(matrix: _Matrix, solved: _Solved) -> None:
    matrix.weight.index_copy_(1, matrix.kept, solved.columns.to(matrix.weight.device))
    if matrix.bias is not None and solved.bias is not None:
        matrix.bias.copy_(solved.bias)


@contextmanager
def _restored_afterwards(model: nn.Module, groups: Sequence[Group]) -> Iterator[None]:
    """Within the context the groups' parameters may change; afterwards they have their values again, and routers their
    `forward` (`prune` cuts the router itself, so that its class's own `forward` serves again)."""
    members = [(model.get_submodule(m.module), m) for g in groups for m in (*g.members, *g.vectors)]
    named = [(module, name) for module, m in members for name in (m.parameter, "bias")]
    parameters = {id(p): p for module, name in named if (p := module._parameters.get(name)) is not None}
    before = [(parameter, parameter.clone()) for parameter in parameters.values()]
    routers = [vars(model.get_submodule(g.members[0].module)) for g in groups if g.kind == "experts"]
    forwards = [(router, router.get("forward")) for router in routers]

    def restore() -> None:
        for parameter, values in before:
            parameter.copy_(values)
        for router, forward in forwards:
            router.pop("forward", None)
            if forward is not None:
                router["forward"] = forward

    with put_back(restore):
        yield


def _write(model: Any, plan: Plan, groups: Sequence[Group], solved: Sequence[tuple[_Matrix, _Solved]]) -> None:
    """Write all solved values into the model; an interrupt is raised once all of them are written."""
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            for group in groups:
                zero_units(model, group, plan.keep[group.name])  # a router's replaced forward ends with the pass
            for matrix, values in solved:
                _apply(matrix, values)
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


@torch.no_grad()
def reconstruct(model: Any, plan: Plan, batches: Tensor | Sequence[Tensor], *, ridge: float = RIDGE) -> Plan:
    """Reconstruct a model's outputs for a plan, before `prune` cuts it: removed units become zero, and the surviving
    columns of output matrices are solved.

    For every matrix `W` that the removed units' output went through, in the order of the forward pass,

        min over ΔW of  Σ_t w_t · |r_t − ΔW x̃_t|² + λ |ΔW|²,
        λ = ridge · inputs / tokens · mean(diag(Σ_t w_t x̃_t x̃_tᵀ)),

    with `x̃` the surviving inputs of the matrix in the pruned and so far reconstructed model, `r` the dense model's
    output of the matrix minus the pruned model's, and `w_t` one over the mean square of the dense layer's output. Where
    the architecture only adds the output to the hidden states (`Architecture.residual`), `r` includes the error that
    these have already. Biases are solved too. Stacked experts are cut without reconstruction, since each reads only the
    tokens that are routed to it.

    The hidden states of the text between two layers are held for both models, in the model's dtype, and wide
    activations for a few thousand tokens at a time. Solved columns wait on the host until all are solved. Until then
    the model is as it was, but for the layer at work, of whose cut parameters a copy is held.

    Args:
        model: the model the plan is for, not cut yet; its surviving columns change in place.
        plan: of `selection.plan`.
        batches: token ids int64 `[samples, length]`, or a sequence of such, as `calibrate` takes them. More samples
            than were scored improve the result (README has figures).
        ridge: the factor of λ, positive. The best penalty of a regression of many inputs is their number over that of
            observations, divided by the share of the target that they explain, so `ridge` is about that share's
            inverse. It pulls towards the weights as they were, not towards zero.

    Returns:
        The same plan for the reconstructed model: hand this one to `prune`. Its record says what was done, and for
        every matrix the relative squared error of its output before and after.

    Raises:
        HywiaError: the plan is not this model's, or the equations cannot be solved. UsageError: malformed batches or
            a ridge that is not positive. After these, and after any other error or interrupt while it solves, the model
            is as it was. Writing the solved weights comes last, and takes about as long as copying them. An interrupt
            there is raised when all are written: hand the model to nothing but `prune` then, or load it again.
    """
    began = time.monotonic()
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0.0 < ridge < math.inf:
        raise UsageError(f"ridge: expected a positive number, got {ridge!r}")
    model = plain_model(model, changing=True)
    with apart(dict(model.named_modules())):
        samples = padded(batches)
        errors = _reconstruct_layers(model, plan, samples, ridge)
        record = {
            "samples": len(samples),
            "tokens": samples.total,
            "ridge": ridge,
            "calibration_sha256": digest(samples.tokens),
            "relative_error": errors,
            "seconds": round(time.monotonic() - began, 3),
        }
        return replace(plan, fingerprint=fingerprint(model), record={**plan.record, "refit": record})


def _reconstruct_layers(model: Any, plan: Plan, samples: Samples, ridge: float) -> dict[str, list[float]]:
    """Do the work of `reconstruct`; return each matrix's relative squared error, before and after."""
    groups = checked_groups(model, plan)
    check_tokens(samples.tokens, model)
    entry = arch.architecture(model)
    layers: Any = model.get_submodule(entry.layers)
    devices = dict.fromkeys(p.device for p in layers.parameters())
    errors: dict[str, list[float]] = {}
    solved: list[tuple[_Matrix, _Solved]] = []
    with exact_products(*devices):
        runs = [_start_run(model, layers, chunk) for chunk in samples.sorted().chunks(_CHUNK_TOKENS)]
        identical = True  # both models have the same hidden states so far
        for index, layer in enumerate(progress.track(layers, "reconstructing")):
            in_layer = [g for g in groups if g.layer == index]
            cut = [g for g in in_layer if plan.keep[g.name].numel() < g.units]
            targets: list[_LayerTarget] = []
            matrices = _matrices(model, plan, in_layer)
            if cut or not identical:
                include_drift = entry.residual is not None
                targets = [_layer_target(layer, index, matrices, run, include_drift) for run in runs]
            with _restored_afterwards(model, cut):
                for group in in_layer:
                    zero_units(model, group, plan.keep[group.name])
                for matrix in matrices:
                    change, before, after = _equations(layer, index, matrix, runs, targets).solve(
                        ridge * matrix.kept.numel() / samples.total
                    )
                    solved.append((matrix, _solved(matrix, change)))
                    _apply(*solved[-1])
                    errors[matrix.name] = [before, after]
                identical = identical and not cut
                for i, run in enumerate(runs):
                    run.pruned = run.calls[index](layer, run.pruned)
                    run.dense = run.pruned if identical else targets[i].hidden
        del runs, targets
    _write(model, plan, groups, solved)
    return errors
