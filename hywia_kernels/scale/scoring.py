"""One scoring whose arguments have been checked: what its processes agree on, the pass, and its statistics."""

from __future__ import annotations

import hashlib
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch
from ..arch.facts import mathematics
from ..engine.host import free_on_host
from ..engine.patches import lacks_deterministic_kernel
from ..engine.rotary import rotary_replaced
from ..engine.samples import Samples
from ..errors import HywiaError
from ..method.calibration_data import digest
from ..settings import ORDERS
from ..types import Group, Statistics
from ..versions import versions
from .exchange import exchanged, kept_columns
from .layers import NotFinite, Streamed
from .ranks import Ranks
from .shards import Shards
from .slots import Slots
from .stored import FileWeights, Pinned, Views
from .weights import Resident, Table, Weights, moved_to
from .work import Work

__all__ = ["Scoring"]

_FLOAT16_SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)  # as `calibrate`'s, and for the same reason
_HOST_SHARE = 0.5  # of the host's free memory, for what enters the layers


@dataclass
class Scoring:
    """The arguments of one scoring, checked.

    Attributes:
        modules: all of the model's, by name. runs: of the samples. device: this process's. dtype: of the layers.
        place: where their weights stay. source: of a stored model's. layers, outside: parameters of each layer, and of
            the rest. orders: of the fine sums. backend: that was asked for. ran_on: that was chosen.
    """

    model: Any
    modules: dict[str, nn.Module]
    groups: tuple[Group, ...]
    samples: Samples
    runs: list[Samples]
    orders: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    place: str
    source: FileWeights | None
    layers: list[Table]
    outside: Table
    ranks: Ranks
    backend: str | None
    ran_on: str

    @property
    def measured(self) -> tuple[str, ...]:
        """One order, or all of them, from which those that were asked for are taken."""
        return self.orders if len(self.orders) == 1 else ORDERS

    def weights(self) -> Weights:
        if self.place == "device":
            return Resident()
        if self.source is None:
            return Slots(self.layers, Pinned(self.layers, self.device), self.device, "host")
        if self.place == "host":
            return Shards(self.layers, self.source, self.device, self.ranks)
        if self.device.type == "cpu":
            return Views(self.layers, self.source)
        return Slots(self.layers, self.source, self.device, "files")

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
        if exchanged(self.measured):
            first = [g for g in self.groups if g.layer == self.groups[0].layer]
            coming += int(tokens * element * kept_columns(self.modules, first))
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
            "orders": ", ".join(self.measured),
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
            originals = [p.detach() for p in self.outside.originals]
            held = originals if self.source is None else self.source.tensors(self.outside)
            outside = moved_to(self.device, self.outside, self.modules, held)
        with outside, rotary_replaced(self.model, self.backend):
            offload, resumed = self.offload(), work.state.get("layer")
            start = time.monotonic()
            with closing(self.weights()) as weights:
                prepared = time.monotonic() - start
                done, scale, same = self._run(weights, work, offload)
        fine: dict[str, dict[str, Tensor]] = {}
        moments: dict[str, Tensor] = {}
        for i, layout in enumerate(done.layouts):
            of_fine, of_moments = layout.finished(done.totals[i], len(self.samples))
            fine |= {name: {order: of[order] for order in self.orders} for name, of in of_fine.items()}
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
            "bytes_exchanged": done.received,
            "seconds_waited": round(weights.waited, 3),
            "seconds_prepared": round(prepared, 3),
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
                orders=self.measured,
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
                if not strict or not lacks_deterministic_kernel(error) or len(self.runs) < self.ranks.size:
                    raise
                strict = False
            work.forget()
