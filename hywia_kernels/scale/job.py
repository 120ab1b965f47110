"""calibrate_streamed: statistics of a model that need not fit into a device's memory, by one process or several."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch, ops
from ..arch.holding import check_held, unwrapped
from ..checkpoint.stored_model import StoredModel
from ..engine import loss
from ..engine.layered import refuse_hooks
from ..engine.passes import apart
from ..engine.patches import without_collections
from ..engine.samples import padded
from ..errors import HywiaError, UsageError
from ..method.calibration_data import check_tokens
from ..method.derivation import prove
from ..method.statistics import checked_orders
from ..settings import STATE_SECONDS, WEIGHTS
from ..types import Statistics
from .ranks import Ranks
from .runs import runs_of
from .scoring import Scoring
from .stored import FileWeights
from .weights import Table, tables

__all__ = ["calibrate_streamed"]


def calibrate_streamed(
    model: Any,
    batches: Tensor | Sequence[Tensor],
    *,
    orders: Sequence[str] = ("second",),
    device: torch.device | str | None = None,
    weights: str = "auto",
    ranks: Ranks | None = None,
    backend: str | None = None,
    work: str | Path | None = None,
    keep_work: bool = False,
    asked: dict[str, str] | None = None,
    every: float = STATE_SECONDS,
) -> Statistics:
    """Statistics of every unit, as `calibrate`'s, with one layer's weights at a time, and the moments of `h_s` in the
    place of the samples' own values.

    The same model, set and kind of device give the same bits, whatever the number of processes and wherever the weights
    are. (On CPUs the number of torch's threads enters the last bits of matrix products; torchrun sets it to one.)

    Args:
        model: a loaded model, on one device, or what `open_stored` gave; left as it was.
        batches: as `calibrate` takes them; the same on all processes.
        orders: of the fine sums, some of ORDERS. Sums of "second" alone add up over samples; for the others the
            processes exchange operands, layer by layer (see `scale.exchange`).
        device: where the layers run; None: where the model's embedding is, of a stored model the CPU.
        weights: where they stay meanwhile: "device", "host" (of a model in the host's memory; or of a stored one, which
            the processes of a host then hold together), "files", or "auto": where the model has them.
        ranks: the processes that share the samples; None: this one alone. One of several must be given a device of its
            own.
        backend: of the ops.
        work: folder that a stopped run leaves, and from which the same call goes on; None: nothing is kept.
        keep_work: leave the folder of a finished one too, for a caller who has yet to write the statistics.
        asked: further facts that all processes must agree on, name -> value: what was asked for.
        every: seconds between two states of that folder.

    Returns:
        Statistics, on the CPU; the same on every process. The record says where the weights were and what moved.

    Raises:
        HywiaError: as `calibrate`; a process is gone or hangs; processes were asked for different things.
        UsageError: orders or a place that do not go.
    """
    wanted = checked_orders(orders)
    if weights not in WEIGHTS:
        raise UsageError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
    source = None
    if isinstance(model, StoredModel):
        source, model = FileWeights(model), model.model
        prove(model)
    model = unwrapped(model)
    modules = dict(model.named_modules())
    if source is None:
        check_held(modules)
    ranks = ranks or Ranks()
    here = model.get_input_embeddings().weight.device if source is None else torch.device("cpu")
    target = here if device is None else torch.device(device)
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    with ExitStack() as stack:
        if target.type == "cuda":
            stack.enter_context(torch.cuda.device(target))
        stack.enter_context(apart(modules))
        stack.enter_context(without_collections())
        job = _job(model, modules, source, batches, wanted, target, weights, ranks, backend)
        return job.statistics(Path(work) if work is not None else None, keep_work, asked or {}, every)


def _job(
    model: Any,
    modules: dict[str, nn.Module],
    source: FileWeights | None,
    batches: Any,
    orders: tuple[str, ...],
    device: torch.device,
    weights: str,
    ranks: Ranks,
    backend: str | None,
) -> Scoring:
    groups = arch.groups(model, modules)
    samples = padded(batches)
    check_tokens(samples.tokens, model)
    loss.check_head(model)
    refuse_hooks(arch.layers_of(model))
    of_layers, outside = tables(model, modules)
    place = _place(source, of_layers, device, weights)
    first: Any = of_layers[0].originals[0]
    example = torch.empty(1, 1, dtype=first.dtype, device=device)
    ran_on = ops.choose("linear_importance", backend, example, example, example)
    largest = max(sum(p.numel() for p in table.originals) for table in of_layers)
    runs = runs_of(samples, largest)
    return Scoring(
        model,
        modules,
        groups,
        samples,
        runs,
        orders,
        device,
        first.dtype,
        place,
        source,
        of_layers,
        outside,
        ranks,
        backend,
        ran_on,
    )


def _place(source: FileWeights | None, layers: Sequence[Table], device: torch.device, weights: str) -> str:
    """Where the weights stay: where they are, or where they are asked to be.

    Raises:
        UsageError: they are not there. HywiaError: they are on several devices.
    """
    devices = {p.device for table in layers for p in table.originals}
    if source is not None:
        if weights not in ("auto", "host", "files"):
            raise UsageError(f"weights: expected auto, host or files for a stored model, got {weights!r}; load it")
        return "host" if weights == "host" else "files"
    if len(devices) > 1:
        raise HywiaError(
            f"model: expected all layers on one device for a streamed scoring, got them on "
            f"{', '.join(sorted(map(str, devices)))}; load it on the CPU, and say which device the layers are to run on"
        )
    where = devices.pop()
    if weights == "files":
        raise UsageError("weights: 'files' goes with a model that open_stored gave; this one is loaded")
    if weights == "device" and where != device:
        raise UsageError(f"weights: 'device' goes with a model on {device}, got one on {where}; load it there")
    if weights == "host" and where.type != "cpu":
        raise UsageError(f"weights: 'host' goes with a model in the host's memory, got one on {where}")
    if where != device and where.type != "cpu":
        raise UsageError(f"device: expected {where}, where the model is, or a model on the CPU, got {device}")
    return weights if weights != "auto" else "device" if where == device else "host"
