"""Statistics of every unit from one forward and one backward over the calibration set.

The passes themselves are in `engine`: the decoder's linear layers get a custom backward that scores units instead of
making a weight gradient, and nothing else in the model asks for gradients. Here the arguments are checked, engine and
memory mode are chosen, and the record is written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch, ops
from ..arch.facts import check_finite, fingerprint_and_count_after, queued
from ..arch.holding import check_held, unwrapped
from ..engine import autograd, layered, loss, whole
from ..engine.experts import whole_experts
from ..engine.instrument import instrument
from ..engine.kernels import usable
from ..engine.linear import Scorer
from ..engine.memory import MODES, MemoryPlan, plan_memory, plan_whole
from ..engine.passes import apart
from ..engine.patches import forward_replaced, reproducible, reproducibly, without_collections
from ..engine.results import Results
from ..engine.rotary import rotary_replaced
from ..engine.samples import Samples, padded
from ..errors import BackendError, HywiaError, UsageError
from ..progress import Bar
from ..settings import ENGINES, MEMORY, ORDERS
from ..types import Group, Statistics
from ..versions import versions
from .calibration_data import check_tokens, digest

__all__ = ["calibrate", "checked_orders", "measure"]

log = logging.getLogger(__name__)


# Powers of two, so that scaling and unscaling are exact. float16 activations' gradients underflow without one: a mean
# over a thousand tokens puts them near 1e-7, below float16's normal range.
_FLOAT16_SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)

# Fine and coarse statistics, mean loss, loss scale, and whether every run gives the same bits.
_Outcome = tuple[dict, dict, float, float, bool]


@dataclass(frozen=True)
class _Job:
    """The arguments of one pass over the calibration set."""

    model: Any
    groups: tuple[Group, ...]
    modules: dict[str, nn.Module]  # all of the model's, by name
    linears: dict[str, nn.Module]  # those that hold the groups' matrices
    samples: Samples
    engine: str
    plan: MemoryPlan
    backend: str | None
    orders: tuple[str, ...]  # all of them, or one

    @property
    def order(self) -> Tensor:
        """int64 `[samples]`: the sample that each row of the results belongs to."""
        return torch.cat([chunk.index for chunk in self.plan.chunks])

    @cached_property
    def devices(self) -> list[torch.device]:
        """The devices that hold the groups' matrices."""
        parameters = (p for m in self.linears.values() for p in m._parameters.values() if p is not None)
        return list(dict.fromkeys(p.device for p in parameters))


def _chosen_engine(engine: str, backend: str | None, weight: Tensor) -> tuple[str, str, str | None]:
    """`(engine, backend of its op, why it is not fused)`.

    "auto" takes autograd only where the named backend lacks the fused op.
    """
    reason = None
    if engine != "autograd":
        try:
            return "fused", ops.choose("linear_importance", backend, weight, weight, weight), None
        except BackendError as error:
            if engine == "fused":
                raise
            reason = str(error)
            log.info("scoring with plain autograd: %s", reason)
    chosen = ops.choose("taylor_importance", backend, weight, weight.new_empty(0, dtype=torch.float32))
    return "autograd", chosen, reason


def _run(job: _Job, scale: float, strict: bool) -> tuple[Results, Tensor]:
    """One forward and one backward, without waiting for the device. `strict` asks CUDA for the same bits every run."""
    model, samples = job.model, job.samples
    results = Results(job.modules, job.groups, len(samples), job.orders)
    layers: Any = model.get_submodule(arch.architecture(model).layers)
    with Bar("scoring", sum(len(g.members) for g in job.groups)) as bar:
        if job.engine == "autograd":
            lean = job.plan.mode == "lean"
            with reproducible(strict):
                total = autograd.run(model, layers, job.groups, samples, results, scale, job.backend, bar, lean)
            return results, total
        ordered = job.plan.chunks[0] if len(job.plan.chunks) == 1 else samples.sorted()
        scorer = Scorer(results, ordered, scale, job.backend, bar)
        # torch's strict mode slows every cuBLAS call down, so whole layers ask for it where they need it.
        scorer.strict = strict
        replacements, asked = instrument(model, job.modules, job.groups, scorer)
        whole_pass = reproducible(strict and not asked)
        with forward_replaced(replacements), rotary_replaced(model, job.backend), whole_pass:
            if job.plan.mode == "fast":
                total = whole.run(model, samples, scale)
            else:
                plan = job.plan
                total = layered.run(model, layers, plan.chunks, scorer, scale, plan.offload, plan.kept_layers)
    whole_experts(results.fine, results.coarse, job.groups)
    return results, total


def _finite(job: _Job, meanwhile: Callable[[], None]) -> _Outcome:
    """`(fine, coarse, mean loss, loss scale, same bits every run)` at the largest loss scale that does not overflow.

    `meanwhile` is called while the device works.

    Raises:
        HywiaError: NaN or Inf in weights or gradients.
    """
    float16 = any(p.dtype == torch.float16 for m in job.linears.values() for p in m.parameters())
    scales = _FLOAT16_SCALES if float16 else (1.0,)
    cuda = any(d.type == "cuda" for d in job.devices)
    bad: str | None = None
    for scale in scales:
        (results, total), same = reproducibly(partial(_run, job, scale), cuda)
        results.fetch()
        meanwhile()
        fine, coarse = results.download(job.order)
        bad = results.first_bad()
        if bad is None:
            return fine, coarse, float(total) / len(job.samples), scale, same
        del results, fine, coarse
        check_finite(job.model)
    raise HywiaError(
        f"{bad}: expected finite gradients, got NaN or Inf; load the model in float32 or bfloat16, "
        "and look for calibration text that gives an infinite loss"
    )


def _attempt(job: _Job, meanwhile: Callable[[], None]) -> _Outcome | None:
    """`_finite`, or None when a device ran out of memory."""
    try:
        return _finite(job, meanwhile)
    except torch.OutOfMemoryError:
        return None


def _peak(devices: Sequence[torch.device]) -> int | None:
    cuda = [d for d in devices if d.type == "cuda"]
    return sum(torch.cuda.max_memory_allocated(d) for d in cuda) if cuda else None


def calibrate(
    model: Any,
    batches: Tensor | Sequence[Tensor],
    *,
    backend: str | None = None,
    engine: str = "auto",
    memory: str = "auto",
    orders: Sequence[str] = ORDERS,
) -> Statistics:
    """Fine and per-sample coarse statistics of every unit of a model.

    With `L_s` the mean next-token loss of sample `s`, `G_s = dL_s/dW`, `G = mean_s G_s`, `F = mean_s G_s²`: fine sums
    of `|G·w|`, `½·F·w²` and `|G·w − ½·F·w²|` over each unit, and `h_s = Σ G_s·w` over each unit's part of each matrix.
    Gradients are float32 sums whatever the weights' dtype; float16 models run with an exact power-of-two loss scale.

    Args:
        model: a causal language model of a known architecture, on any device; left as it was, `.grad` untouched.
        batches: token ids int64 `[samples, length]`, or a sequence of such or of single `[length]` samples.
        backend: of the ops.
        engine: "fused" (`ops.linear_importance` in one backward over all samples), "autograd" (the reference:
            per-sample gradients of one matrix at a time), or "auto": fused, unless the named backend lacks its op
            (the record's "not_fused" says so).
        memory: "fast" keeps what backward needs. "lean" keeps what enters the decoder layers and runs each layer again
            (but for the last ones, where a twentieth of the weights' bytes has room for what their backward needs).
            "layerwise" (of the fused engine) does that for a part of the samples at a time, and collects one layer's
            gradients. "auto" is the first of these that fits into the free memory, and the next one when a CUDA device
            runs out all the same; it is lean also where fast would keep more than 0.6 of the weights' bytes (and
            2 GiB), and layerwise for very ragged samples.
        orders: of the fine sums, those that are asked for; one alone can take less time.

    Returns:
        Statistics, on the CPU. The record names engine, memory mode, the estimate of the bytes needed beside the
        weights and, on CUDA, the peak of allocated bytes (torch's own peak counter is reset for that).

    Raises:
        HywiaError: unknown architecture, ids beyond the vocabulary, too little memory, or NaN or Inf in weights that
            take part or in gradients (named by module). UsageError: malformed batches, unknown engine or memory mode.
    """
    return measure(model, batches, None, backend=backend, engine=engine, memory=memory, orders=orders)


def measure(
    model: Any,
    batches: Tensor | Sequence[Tensor],
    groups: tuple[Group, ...] | None,
    *,
    backend: str | None = None,
    engine: str = "auto",
    memory: str = "auto",
    orders: Sequence[str] = ORDERS,
) -> Statistics:
    """`calibrate` for other groups than the architecture's own, over the same matrices.

    Each matrix must be in one group along the axis that it has in the architecture's groups. With the fused engine it
    may be in a second group, along its other axis. The estimate of memory is that of the architecture's groups.

    Args:
        groups: to be measured; None: the architecture's own. The other arguments are those of `calibrate`.

    Raises:
        UsageError, HywiaError: as `calibrate`.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    if memory not in MEMORY:
        raise UsageError(f"memory: expected one of {', '.join(MEMORY)}, got {memory!r}")
    asked = checked_orders(orders)
    model = unwrapped(model)
    modules = dict(model.named_modules())
    check_held(modules)
    with apart(modules):
        return _measured(model, modules, batches, groups, backend, engine, memory, asked)


def checked_orders(orders: Sequence[str]) -> tuple[str, ...]:
    """The orders that are asked for, in the order of ORDERS.

    Raises:
        UsageError: they are no orders, or none.
    """
    asked = tuple(order for order in ORDERS if order in orders)
    if isinstance(orders, str) or not asked or set(orders) - set(asked):
        raise UsageError(f"orders: expected some of {', '.join(ORDERS)}, got {orders!r}")
    return asked


def _measured(
    model: Any,
    modules: dict[str, nn.Module],
    batches: Tensor | Sequence[Tensor],
    groups: tuple[Group, ...] | None,
    backend: str | None,
    engine: str,
    memory: str,
    orders: tuple[str, ...],
) -> Statistics:
    began = time.monotonic()
    own_groups = arch.groups(model, modules)
    groups = own_groups if groups is None else groups
    samples = padded(batches)
    check_tokens(samples.tokens, model)
    loss.check_head(model)
    linears = arch.linears(modules, groups)
    weight: Any = arch.view(modules, groups[0].members[0], groups[0].units)
    engine, ran_on, reason = _chosen_engine(engine, backend, weight.detach())
    experts = next((g.members[0].module for g in groups if g.tied_width), None)
    modes: tuple[str, ...] = MODES if engine == "fused" and experts is None else MODES[:-1]
    if arch.architecture(model).together:
        if memory not in ("auto", "fast"):
            raise UsageError(
                f"memory: expected auto or fast where layers hand on more than hidden states, got {memory!r}"
            )
        modes, memory = MODES[:1], "fast"
    if memory == "layerwise" and memory not in modes:
        raise UsageError(
            f"memory: expected auto, fast or lean with engine {engine!r}"
            + (f" and {experts}, whose tokens come from all samples at once" if experts is not None else "")
            + ", got 'layerwise'"
        )
    kernels = usable(weight.device, backend)

    def job_for(requested: str) -> _Job:
        if engine == "autograd":
            plan = plan_whole(model, linears, own_groups, samples, requested)
        else:
            plan = plan_memory(
                model,
                linears,
                own_groups,
                samples,
                requested,
                float64=ran_on == "reference",
                kernels=kernels,
                layerwise=MODES[-1] in modes,
            )
        # The reference pass has all orders from the same gradients.
        measured = orders if len(orders) == 1 and engine == "fused" else ORDERS
        return _Job(model, groups, modules, linears, samples, engine, plan, backend, measured)

    job = job_for(memory)
    for device in job.devices:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
    record: dict[str, Any] = {}
    facts: dict[str, Any] = {}  # of the model, taken while its devices work
    written = queued(job.devices)  # events of work that may still write weights, from before the pass

    def meanwhile() -> None:
        if not facts:
            facts["fingerprint"], facts["parameters"] = fingerprint_and_count_after(written, model, modules)
            record.update(calibration_sha256=digest(samples.tokens), versions=versions())

    with without_collections():
        outcome = _attempt(job, meanwhile)
        while outcome is None and memory == "auto" and engine == "fused" and job.plan.mode != modes[-1]:
            torch.cuda.empty_cache()
            job = job_for(MODES[MODES.index(job.plan.mode) + 1])
            outcome = _attempt(job, meanwhile)
    if outcome is None:
        raise HywiaError(
            f"batches: {len(samples)} samples do not fit into the memory of {weight.device} in mode {job.plan.mode!r}, "
            f"which was to take about {job.plan.estimate / 1e9:.2f} GB beside the weights; pass fewer samples, or "
            "memory='lean' or 'layerwise'"
        )
    fine, coarse, mean_loss, scale, same = outcome
    record |= {
        "samples": len(samples),
        "seq_len": samples.longest,
        "loss": mean_loss,
        "engine": engine,
        "not_fused": reason,
        "left_alone": arch.left_alone(model),
        "memory": job.plan.mode,
        "runs": len(job.plan.chunks),
        "offloaded": job.plan.offload,
        "estimate_bytes": job.plan.estimate,
        "peak_bytes": _peak(job.devices),
        "reproducible": same,
        "backend": ran_on,
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "loss_scale": scale,
        "seconds": round(time.monotonic() - began, 3),
    }
    return Statistics(
        groups=groups,
        fine={name: {order: of[order] for order in orders} for name, of in fine.items()},
        coarse=coarse,
        record=record,
        known_finite=True,
        **facts,
    )
