"""Solve the surviving columns of a pruned model's output matrices again, by least squares on calibration text.

A unit leaves through the columns of one matrix (`down`, `o`). What it contributed is partly predictable from the units
that stay, so their columns can take it over: the refit is the linear regression of what the dense model adds to its
hidden states on the activations that the pruned model has. It goes through the layers in order, so that each matrix
sees what the refitted ones before it send, and it also repairs what those left undone ("drift"). Then all weights of
the layer can be trained towards what the dense layer sends on (`layer_training`).

Related work: least squares after structured pruning goes back to He et al. (arXiv 1707.06168); sequential layers with
streaming second moments to GPTQ and SparseGPT (arXiv 2210.17323, 2301.00774).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch, progress
from ..arch.facts import fingerprint, weight_bytes
from ..arch.holding import plain_model
from ..engine.memory import free_bytes
from ..engine.passes import apart, put_back
from ..engine.patches import forward_replaced
from ..engine.samples import Samples, padded
from ..errors import HywiaError, UsageError
from ..settings import RIDGE
from ..types import Group, Plan
from .calibration_data import check_tokens, digest
from .equations import Begun, Matrix, NormalEquations, can_hold, equations_of, matrices_of
from .expert_refit import Sent, add_tokens, sent
from .layer_masks import check_transparent, zero_layers
from .layer_runs import CHUNK_TOKENS, Weights
from .layer_targets import Journal, LayerTarget, Run, gap_behind, layer_target, run_of
from .layer_training import LayerTraining
from .moments import exact_products
from .narrow_layers import narrowed
from .surgery import checked_groups, zero_units
from .training_runs import parted, parts_of

__all__ = ["WAITING_SHARE", "Solution", "check_passes", "check_ridge", "reconstruct", "refitted", "through_layers"]

WAITING_SHARE = 0.25  # of the free memory: weights of so many bytes have room beside the model for what is solved


def _expert_equations(
    entry: arch.Architecture, matrix: Matrix, originals: Mapping[int, Tensor], entered: Sequence[Sent]
) -> tuple[NormalEquations, int]:
    """`(equations of one expert's matrix, tokens that reach it)`."""
    assert entry.experts is not None
    assert matrix.expert is not None
    normal = NormalEquations(matrix.name, matrix.kept.numel(), len(matrix.weight), matrix.weight.device)
    count = add_tokens(normal, matrix.module, entry.experts, matrix.expert, matrix.kept, originals, entered)
    return normal, count


@dataclass
class _Solved:
    """What a matrix is to be: the columns that stay `[outputs, kept]`, and the bias."""

    columns: Tensor
    bias: Tensor | None

    def to(self, device: torch.device | None) -> _Solved:
        return _Solved(_waiting(self.columns, device), None if self.bias is None else _waiting(self.bias, device))


def _solved(matrix: Matrix, change: Tensor) -> _Solved:
    """In the weight's dtype, which may not hold it.

    Raises:
        HywiaError: it does not.
    """
    weight, change = matrix.weight, change.to(matrix.weight.device)
    columns = (weight.index_select(1, matrix.kept).double() + change[: matrix.kept.numel()].T).to(weight.dtype)
    bias = None if matrix.bias is None else (matrix.bias.double() + change[-1]).to(weight.dtype)
    if not all(bool(torch.isfinite(x).all()) for x in (columns, bias) if x is not None):
        raise HywiaError(
            f"{matrix.name}: its solution is beyond the range of {str(weight.dtype).removeprefix('torch.')}; load the "
            "model in bfloat16 or float32, or use a larger ridge"
        )
    return _Solved(columns, bias)


@dataclass
class Solution:
    """What a pass found, in the order in which it is to be written: columns of matrices, and whole parameters of layers
    that were trained. They wait on `device`, or, where it is None, each on its own."""

    device: torch.device | None = None
    matrices: list[tuple[Matrix, _Solved]] = field(default_factory=list)
    parameters: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)


def _waiting(values: Tensor, device: torch.device | None) -> Tensor:
    """A copy of what is about to be put back."""
    return values.detach().to(device or values.device, copy=True)


def _waits_on(model: nn.Module) -> torch.device | None:
    """Where what is solved waits: beside the model where that leaves most of its devices' memory free, since copies
    from the host take longer than the solving does; else on the host."""
    devices = {p.device for p in model.parameters()}
    room = all(device.type == "cpu" or weight_bytes(model) <= WAITING_SHARE * free_bytes(device) for device in devices)
    return None if room else torch.device("cpu")


def _apply(matrix: Matrix, solved: _Solved) -> None:
    matrix.weight.index_copy_(1, matrix.kept, solved.columns.to(matrix.weight.device))
    if matrix.bias is not None and solved.bias is not None:
        matrix.bias.copy_(solved.bias)


@contextmanager
def _tried(model: nn.Module, groups: Sequence[Group], more: Sequence[nn.Parameter]) -> Iterator[dict[int, Tensor]]:
    """One layer's cut groups changed for a while: their parameters and `more` have their values again afterwards, and
    routers their forward (a cut router needs no other). Gives the values by their parameters' `id`."""
    members = [(model.get_submodule(m.module), m) for g in groups for m in (*g.members, *g.vectors)]
    named = [(module, name) for module, m in members for name in (m.parameter, "bias")]
    parameters = {id(p): p for module, name in named if (p := module._parameters.get(name)) is not None}
    parameters |= {id(p): p for p in more}
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
        yield {id(parameter): values for parameter, values in before}


def _write(model: Any, plan: Plan, groups: Sequence[Group], solution: Solution) -> None:
    """All that was solved, into the model; an interrupt waits until all of it is there."""
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            if plan.depth is not None:
                zero_layers(model, plan.depth)
            for group in groups:
                zero_units(model, group, plan.keep[group.name])  # a router's forward ends with the pass
            for matrix, values in solution.matrices:
                _apply(matrix, values)
            for parameter, trained in solution.parameters:
                parameter.copy_(trained)
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


def _give_up_dense(runs: Sequence[Run]) -> None:
    """The dense model's hidden states before the layer, in whose place those behind it are about to come."""
    for run in runs:
        run.dense = run.pruned


@torch.no_grad()
def reconstruct(
    model: Any, plan: Plan, batches: Tensor | Sequence[Tensor], *, ridge: float = RIDGE, passes: int = 0
) -> Plan:
    """Refit a model to a plan, before `prune` cuts it: removed units become zero, surviving output columns are solved.

    For every matrix `W` through which removed units sent their output on, in the order of the forward pass,

        min over ΔW of  Σ_t w_t · |r_t − ΔW x̃_t|² + λ |ΔW|²,
        λ = ridge · inputs / tokens · mean(diag(Σ_t w_t x̃_t x̃_tᵀ)),

    with `x̃` the surviving inputs of the matrix in the pruned and so far refitted model, `r` what its output lacks of
    the dense model's, and `w_t` one over the mean square of the dense layer's output. Where the architecture only adds
    the output to the hidden states (`Architecture.residual`), `r` includes what these lack already. Biases are solved
    too. Of a stacked expert, `t` are the tokens that the pruned model sends to it, `r` is what its removed channels
    give for them, and `w_t` has the square of its share; an expert that no token reaches is cut as it is.

    With `passes`, each layer whose input or width differs from the dense one's is then trained, all of its weights, see
    `layer_training.LayerTraining`; what it sends on is what the next layer's equations are about.

    The hidden states of the text between two layers are held, in the model's dtype, for both models, and inside a layer
    what leaves the dense one and what its attention adds, until the attention's equations are there; wide activations
    only for a few thousand tokens at a time, but for those that enter a layer's last matrix, where they are few beside
    the weights. Solved columns wait until all are solved, on the host where a quarter of the device's free memory has
    no room for all of the weights: the model is as it was until then, but for the layer that is at work, of whose cut
    parameters a copy is held.

    Args:
        model: the model the plan is for, not cut yet; its surviving columns change in place.
        plan: of `selection.plan`.
        batches: token ids, as `calibrate` takes them; more than were scored pay (docs/recipe.md).
        ridge: of λ. The best penalty of a regression of many inputs is their number over that of observations, divided
            by the share of the target they explain, so this is about the latter's inverse. It pulls towards the weights
            as they were, not towards zero.
        passes: over the text in which each layer is trained; 0: none is. While a layer is trained, sixteen bytes for
            each of its parameters are held beside it and its values as they were, and the values of all layers that
            were trained wait with what was solved.

    Returns:
        The same plan for the refitted model: hand this one to `prune`. Its record says what was done, and for every
        matrix, and every layer that was trained, the relative squared error of its output before and after.

    Raises:
        HywiaError: the plan is not this model's, or the equations cannot be solved. UsageError: malformed batches, a
            ridge that is not positive, or passes below zero. After these, and after any other error or interrupt while
            it solves, the model is as it was. Writing the solved weights comes last, and takes about as long as copying
            them: an interrupt there is raised when all are written; hand the model to nothing but `prune` then, or load
            it again.
    """
    began = time.monotonic()
    check_ridge(ridge)
    check_passes(passes)
    model = plain_model(model, changing=True)
    with apart(dict(model.named_modules())):
        samples = padded(batches)
        groups, solution = checked_groups(model, plan), Solution(_waits_on(model))
        errors = through_layers(model, plan, groups, samples, ridge, passes=passes, solution=solution)
        _write(model, plan, groups, solution)
        return refitted(plan, fingerprint(model), samples, ridge, passes, errors, began)


def refitted(
    plan: Plan, after: str, samples: Samples, ridge: float, passes: int, errors: dict[str, list[float]], began: float
) -> Plan:
    """The plan of a refitted model.

    Args:
        plan: of the model before. after: the refitted one's fingerprint. errors: of `through_layers`.
        began: when the work did, by `time.monotonic`.
    """
    record = {
        "samples": len(samples),
        "tokens": samples.total,
        "ridge": ridge,
        "calibration_sha256": digest(samples.tokens),
        "passes": passes,
        "relative_error": {name: both for name, both in errors.items() if not name.isdigit()},
        "layer_error": {name: both for name, both in errors.items() if name.isdigit()},
        "seconds": round(time.monotonic() - began, 3),
    }
    return replace(plan, fingerprint=after, record={**plan.record, "refit": record})


def check_ridge(ridge: Any) -> None:
    """Raise UsageError where the ridge of a reconstruction is not a positive number."""
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0.0 < ridge < math.inf:
        raise UsageError(f"ridge: expected a positive number, got {ridge!r}")


def check_passes(passes: Any) -> None:
    """Raise UsageError where the passes in which layers are trained are not a number from 0 on."""
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 0:
        raise UsageError(f"passes: expected a whole number from 0, got {passes!r}")


def through_layers(
    model: Any,
    plan: Plan,
    groups: Sequence[Group],
    samples: Samples | None,
    ridge: float,
    *,
    passes: int = 0,
    solution: Solution | None = None,
    while_changed: Callable[[int, nn.Module], None] | None = None,
    weights: Weights | None = None,
    journal: Journal | None = None,
) -> dict[str, list[float]]:
    """Mask each layer to a plan, refit it and put it back, one after the other: the pass of `reconstruct`, before it
    writes anything. To be run in `apart`.

    Args:
        samples: to refit on; None: the removed units are masked, and nothing is solved.
        passes: see `reconstruct`. solution: is filled with what was found; None: it is not kept.
        while_changed: called with a layer's index and the layer while that is masked and refitted.
        weights: where they are, if not in the model. journal: of the pass, which may go on with an earlier one.

    Returns:
        For every matrix the relative squared error of its output before and after; for every layer that was trained
        the same of what leaves it, under its index.
    """
    entry = arch.architecture(model)
    layers: Any = model.get_submodule(entry.layers)
    weights = Weights(layers) if weights is None else weights
    gone = () if plan.depth is None else plan.depth.gone
    if gone:
        check_transparent(model)
    errors: dict[str, list[float]] = {}
    size = weight_bytes(model)
    if samples is not None:
        check_tokens(samples.tokens, model)
    with exact_products(*weights.devices):
        chunks = [] if samples is None else samples.sorted().chunks(CHUNK_TOKENS)
        with weights.entrance():
            runs = [run_of(model, layers, chunk) for chunk in chunks]
            parts = [parts_of(model, layers, chunk) for chunk in chunks if passes]
        tokens = sum(run.pruned[..., 0].numel() for run in runs)
        what = "judging" if solution is None and journal is None else "reconstructing"
        journal = journal or Journal()
        begin, same = journal.resumed(runs, errors)  # same: both models have the same hidden states so far
        targets: list[LayerTarget] = []
        training = LayerTraining(passes)
        for index, layer in enumerate(progress.track(layers, what)):
            if index < begin:
                continue
            if index in gone:
                if not any(i not in gone for i in range(index)):  # no layer is before it that could take its part over
                    with weights.of([index]):
                        for run in runs:
                            run.dense = run.calls[index](layer, run.dense)
                    same = False
                continue
            gap = gap_behind(layers, index, gone)
            with weights.of([index, *(place for place, _ in gap)]):
                here = [g for g in groups if g.layer == index]
                cut = [g for g in here if gap or plan.keep[g.name].numel() < g.units]
                targets = []
                matrices = [] if samples is None else matrices_of(model, plan, here, before_gap=bool(gap))
                if cut or gap or not same:
                    additive = {m.module: m.additive for m in matrices if m.expert is None}
                    targets = [
                        layer_target(layer, index, additive, run, entry.residual is not None, gap) for run in runs
                    ]
                narrow = narrowed(model, cut, plan.keep)
                entered: list[Sent] | None = None
                trains = bool(passes and targets)
                more = list(layer.parameters()) if trains else []
                at_width = forward_replaced([(linear.module, linear.forward) for linear in narrow])
                with _tried(model, cut, more) as originals, at_width:
                    for group in here:
                        zero_units(model, group, plan.keep[group.name])
                    begun: list[Begun] = []
                    for at, matrix in enumerate(matrices):
                        ends = entry.residual is not None and matrix.additive
                        assert samples is not None
                        if entry.residual is None or all(m.additive for m in matrices[at:]):
                            _give_up_dense(runs)  # no equations to come are about what entered the dense layer
                        held = tokens * matrix.kept.numel() * matrix.weight.element_size()
                        hold = ends and at + 1 == len(matrices) and not trains and can_hold(held, size)
                        count = samples.total
                        if matrix.expert is None:
                            equations, begun = equations_of(layer, index, matrix, runs, targets, hold)
                        else:  # all experts of a layer see what entered them once
                            if entered is None:
                                both = zip(runs, targets, strict=True)
                                entered = [sent(layer, index, matrix.module, *one) for one in both]
                            equations, count = _expert_equations(entry, matrix, originals, entered)
                            if not count:
                                continue
                        change, before, after = equations.solve(ridge * matrix.kept.numel() / count)
                        values = _solved(matrix, change)
                        _apply(matrix, values)
                        if solution is not None:
                            solution.matrices.append((matrix, values.to(solution.device)))
                        errors[matrix.name] = [before, after]
                    if trains:
                        steps = parted(parts, runs, targets)
                        changed, errors[str(index)] = training.train(layer, index, *steps, narrow)
                        del steps
                        if solution is not None:
                            solution.parameters += [(p, _waiting(p, solution.device)) for p in changed]
                    same = same and not cut and not gap
                    for i, run in enumerate(runs):
                        run.pruned = begun[i].ended(matrices[-1]) if begun else run.calls[index](layer, run.pruned)
                        run.dense = run.pruned if same else targets[i].out
                    if while_changed is not None:
                        while_changed(index, layer)
            journal.finished(index, runs, same, errors)
        del runs, parts, targets, training
    return errors
