"""calibrate_streamed: statistics of a model that need not fit into a device's memory, by one process or several."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch, ops
from ..arch.facts import mathematics
from ..arch.holding import check_held, unwrapped
from ..engine import loss
from ..engine.host import free_on_host
from ..engine.layered import refuse_hooks
from ..engine.passes import apart
from ..engine.patches import without_collections
from ..engine.rotary import rotary_replaced
from ..engine.samples import Samples, padded
from ..errors import HywiaError, UsageError
from ..method.calibration_data import check_tokens, digest
from ..settings import ORDERS, WEIGHTS
from ..types import Group, Statistics
from ..versions import versions
from .layers import NotFinite, Streamed
from .mapped import stored_of
from .ranks import Ranks
from .runs import runs_of
from .slots import Slots
from .stored import Pinned, Views
from .weights import Resident, Table, Weights, moved_to, tables
from .work import EVERY, Work

__all__ = ["calibrate_streamed"]

_FLOAT16_SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)  # as `calibrate`'s, and for the same reason
_HOST_SHARE = 0.5  # of the host's free memory, for what enters the layers


def calibrate_streamed(
    model: Any,
    batches: Tensor | Sequence[Tensor],
    *,
    order: str = "second",
    device: torch.device | str | None = None,
    weights: str = "auto",
    ranks: Ranks | None = None,
    backend: str | None = None,
    work: str | Path | None = None,
    keep_work: bool = False,
    asked: dict[str, str] | None = None,
    every: float = EVERY,
) -> Statistics:
    """Statistics of every unit, as `calibrate`'s, with one layer's weights at a time: fine sums of the second order,
    and the moments of `h_s` in the place of the samples' own values.

    The same model, set and kind of device give the same bits, whatever the number of processes and wherever the weights
    are. (On CPUs the number of torch's threads enters the last bits of matrix products; torchrun sets it to one.)

    Args:
        model: a loaded model, on one device, or one whose weights are in files, as `open_mapped` gives it; left as it
            was.
        batches: as `calibrate` takes them; the same on all processes.
        order: "second". The fine sums of the others need all samples' gradients of a weight together, which no process
            has.
        device: where the layers run; None: where the model's embedding is.
        weights: where they stay meanwhile: "device", "host" (of a model in the host's memory), "files", or "auto":
            where the model has them.
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
        UsageError: an order or a place that does not go.
    """
    if order not in ORDERS:
        raise UsageError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    if order != "second":
        raise UsageError(
            "order: expected second for a streamed scoring, since sums of other orders do not add up over samples, got "
            f"{order!r}; use --order second, or --memory layerwise on one device that holds the model"
        )
    if weights not in WEIGHTS:
        raise UsageError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
    model = unwrapped(model)
    modules = dict(model.named_modules())
    stored = stored_of(model)
    if stored is None:
        check_held(modules)
    ranks = ranks or Ranks()
    target = model.get_input_embeddings().weight.device if device is None else torch.device(device)
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    with ExitStack() as stack:
        if target.type == "cuda":
            stack.enter_context(torch.cuda.device(target))
        stack.enter_context(apart(modules))
        stack.enter_context(without_collections())
        job = _job(model, modules, batches, order, target, weights, ranks, backend)
        return job.statistics(Path(work) if work is not None else None, keep_work, asked or {}, every)


@dataclass
class _Job:
    """The arguments of one scoring, checked."""

    model: Any
    modules: dict[str, nn.Module]
    groups: tuple[Group, ...]
    samples: Samples
    runs: list[Samples]
    order: str
    device: torch.device
    dtype: torch.dtype
    place: str
    layers: list[Table]
    outside: Table
    ranks: Ranks
    backend: str | None
    ran_on: str

    def weights(self) -> Weights:
        if self.place == "device":
            return Resident()
        source = stored_of(self.model)
        if self.place == "host" and source is None:
            return Slots(self.layers, Pinned(self.layers, self.device), self.device, "host")
        assert source is not None
        if self.device.type == "cpu":
            return Views(self.layers, source)
        return Slots(self.layers, source, self.device, "files")

    def offload(self) -> bool:
        """Whether what enters the layers is kept on the host: where the device has no room for it beside two layers."""
        if self.device.type != "cuda":
            return False
        element = self.dtype.itemsize
        hidden = self.model.get_output_embeddings().weight.shape[1]
        tokens = self.samples.tokens.numel() / self.ranks.size
        kept = int(tokens * hidden * element * len(self.layers))
        free = torch.cuda.mem_get_info(self.device)[0]
        coming = 0 if self.place == "device" else 2 * max(t.bytes for t in self.layers)
        if kept <= 0.5 * (free - coming):
            return False
        if kept * self.ranks.here > _HOST_SHARE * free_on_host():
            raise HywiaError(
                f"batches: what enters the layers takes {kept / 1e9:.1f} GB a process, which neither {self.device} nor "
                "the host has free; pass fewer samples, or share them among more processes"
            )
        return True

    def request(self) -> dict[str, Any]:
        """What must be the same for a stopped run to go on, whatever the number of processes."""
        shapes = [
            (n, list(p.shape), str(p.dtype)) for t in self.layers for n, p in zip(t.names, t.originals, strict=True)
        ]
        return {
            "tokens": digest(self.samples.tokens),
            "samples": len(self.samples),
            "runs": len(self.runs),
            "structure": hashlib.sha256(str(shapes).encode()).hexdigest(),
            "config": hashlib.sha256(mathematics(self.model)).hexdigest(),
            "order": self.order,
            "backend": self.ran_on,
            "device": self.device.type,
            "versions": versions(),
        }

    def statistics(self, folder: Path | None, keep: bool, asked: dict[str, str], every: float) -> Statistics:
        began = time.monotonic()
        request = self.request()
        self.ranks.agree({**asked, **{name: str(value) for name, value in request.items()}}, "the agreement")
        work = Work(folder, request, self.ranks, every)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        outside: Any = nullcontext()
        if self.model.get_input_embeddings().weight.device != self.device:
            outside = moved_to(self.device, self.outside, self.modules)
        with outside, rotary_replaced(self.model, self.backend):
            offload, resumed = self.offload(), work.state.get("layer")
            with closing(self.weights()) as weights:
                done, scale, same = self._run(weights, work, offload)
        fine: dict[str, dict[str, Tensor]] = {}
        moments: dict[str, Tensor] = {}
        for i, layout in enumerate(done.layouts):
            of_fine, of_moments = layout.finished(done.totals[i], len(self.samples))
            fine |= of_fine
            moments |= of_moments
        cuda = self.device.type == "cuda"
        record = {
            "samples": len(self.samples),
            "seq_len": self.samples.longest,
            "loss": done.facts["loss"],
            "calibration_sha256": digest(self.samples.tokens),
            "versions": versions(),
            "engine": "fused",
            "not_fused": None,
            "left_alone": arch.left_alone(self.model),
            "memory": "streamed",
            "weights": weights.place,
            "ranks": self.ranks.size,
            "runs": len(self.runs),
            "offloaded": offload,
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else None,
            "bytes_moved": weights.moved,
            "seconds_waited": round(weights.waited, 3),
            "seconds_forward": done.seconds["forward"],
            "seconds_backward": done.seconds["backward"],
            "resumable": work.folder is not None,
            "resumed_at": resumed,
            "reproducible": same,
            "backend": self.ran_on,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "loss_scale": scale,
            "seconds": round(time.monotonic() - began, 3),
        }
        facts = {name: done.facts[name] for name in ("fingerprint", "parameters")}
        result = Statistics(self.groups, fine, {}, record=record, known_finite=True, moments=moments, **facts)
        self.ranks.meet("the end of the scoring")
        if not keep:
            work.done()
        return result

    def _run(self, weights: Weights, work: Work, offload: bool) -> tuple[Streamed, float, bool]:
        """`(the pass, its loss scale, whether every run gives the same bits)` at the largest scale without overflow."""
        float16 = any(p.dtype == torch.float16 for table in self.layers for p in table.originals)
        scales = list(_FLOAT16_SCALES if float16 else (1.0,))
        strict = self.device.type == "cuda"
        if work.state:
            scales = [s for s in scales if s <= work.state.get("scale", scales[0])]
            strict = strict and work.state.get("strict", True)
        while True:
            done = Streamed(
                self.model,
                self.modules,
                self.groups,
                self.runs,
                weights,
                self.ranks,
                work,
                device=self.device,
                order=self.order,
                scale=scales[0],
                backend=self.backend,
                strict=strict,
                offload=offload,
            )
            done.facts |= {"scale": scales[0], "strict": strict}
            try:
                done.run()
                return done, scales[0], strict or self.device.type != "cuda"
            except NotFinite:
                if len(scales) == 1:
                    raise
                scales.pop(0)
            except RuntimeError as error:
                # Every process that has runs meets the op in the same layer, before it waits for others.
                if not strict or "deterministic" not in str(error) or len(self.runs) < self.ranks.size:
                    raise
                strict = False
            work.forget()


def _job(
    model: Any,
    modules: dict[str, nn.Module],
    batches: Any,
    order: str,
    device: torch.device,
    weights: str,
    ranks: Ranks,
    backend: str | None,
) -> _Job:
    groups = arch.groups(model, modules)
    samples = padded(batches)
    check_tokens(samples.tokens, model)
    loss.check_head(model)
    refuse_hooks(arch.layers_of(model))
    of_layers, outside = tables(model, modules)
    place = _place(model, of_layers, device, weights)
    first: Any = of_layers[0].originals[0]
    example = torch.empty(1, 1, dtype=first.dtype, device=device)
    ran_on = ops.choose("linear_importance", backend, example, example, example)
    largest = max(sum(p.numel() for p in table.originals) for table in of_layers)
    runs = runs_of(samples, largest)
    return _Job(
        model,
        modules,
        groups,
        samples,
        runs,
        order,
        device,
        first.dtype,
        place,
        of_layers,
        outside,
        ranks,
        backend,
        ran_on,
    )


def _place(model: Any, layers: Sequence[Table], device: torch.device, weights: str) -> str:
    """Where the weights stay: where they are, or where they are asked to be.

    Raises:
        UsageError: they are not there. HywiaError: they are on several devices.
    """
    devices = {p.device for table in layers for p in table.originals}
    if stored_of(model) is not None:
        if weights not in ("auto", "files"):
            raise UsageError(f"weights: expected auto or files for a model whose weights are in files, got {weights!r}")
        return "files"
    if len(devices) > 1:
        raise HywiaError(
            f"model: expected all layers on one device for a streamed scoring, got them on "
            f"{', '.join(sorted(map(str, devices)))}; load it on the CPU, and say which device the layers are to run on"
        )
    where = devices.pop()
    if weights == "files":
        raise UsageError("weights: 'files' goes with a model that open_mapped gave; this one is loaded")
    if weights == "device" and where != device:
        raise UsageError(f"weights: 'device' goes with a model on {device}, got one on {where}; load it there")
    if weights == "host" and where.type != "cpu":
        raise UsageError(f"weights: 'host' goes with a model in the host's memory, got one on {where}")
    if where != device and where.type != "cpu":
        raise UsageError(f"device: expected {where}, where the model is, or a model on the CPU, got {device}")
    return weights if weights != "auto" else "device" if where == device else "host"
