"""What each pass needs, and which one fits into the memory that is free.

Bytes per token and decoder layer, with `e` bytes a value, `h` the hidden size, `q`, `k`, `v`, `o` the widths of the
attention's matrices, `i` the MLP's width and `n` the attention heads:

    kept = e·(2h + q + k + v + o + 2i) + 4n   what enters the norms; rotated q and k, v and the attention's output with
                                              its logsumexp; gate and up. Norms' outputs and the gated product are
                                              computed again in backward.
    work = e·(3h + 2i)                        gradients on their way, and what is computed again; 6i where the gate is
                                              not one kernel
    collected = e·(8h + 3i) or so             layerwise: every matrix's output gradient and input

    fast       tokens · (Σ_layers kept + work)
    lean       tokens · ((layers + 1)·e·h + kept + work), and kept once more for each of the last layers that it
               keeps: as many as a twentieth of the weights' bytes has room for
    layerwise  tokens · ([layers·e·h, unless on the host] + collected) + tokens of a run · (kept + work)

plus, in all of them, the results; or, in the place of the work, three tensors `[tokens, h]` and what the loss makes of
its chunk of logits, where that is more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import arch
from ..arch.facts import weight_bytes
from ..errors import HywiaError
from ..settings import MEMORY
from ..types import Group
from .host import free_on_host
from .loss import LOGIT_BYTES
from .results import result_bytes
from .samples import Samples

__all__ = ["MODES", "MemoryPlan", "free_bytes", "plan_memory", "plan_whole", "scoring_bytes"]

MODES = MEMORY[1:]
Linears = Mapping[str, nn.Module]
CHUNK_TOKENS = 4096  # of a layerwise run: enough for the matrix products to be fast
_MODEST, _MODEST_BYTES = 0.6, 2 << 30  # of the weights' bytes, or at all: what "auto" lets fast take
_KEPT = 0.05  # of the weights' bytes: what lean spends on keeping its last layers, so as not to run them twice
_SHARE = 0.9  # of the free memory: the rest is for what the formulas leave out
_SCRATCH = 64 << 20
_TABLES, _MOST_TABLES = 16, 512 << 20  # of partial sums of a scoring on CUDA: how many, and bytes of all of them
_RAGGED = 2.0  # padded tokens per token from which fast and lean would waste more than layerwise costs


@dataclass(frozen=True)
class MemoryPlan:
    """How to run a pass.

    Attributes:
        mode: one of MODES.
        chunks: the runs of samples; more than one in "layerwise" mode only.
        offload: what enters the layers is kept in the host's memory.
        estimate: bytes needed beside the weights, on all devices together.
        kept_layers: how many of the last layers keep all that backward needs, in "lean" mode.
    """

    mode: str
    chunks: tuple[Samples, ...]
    offload: bool
    estimate: int
    kept_layers: int = 0


@dataclass(frozen=True)
class _Sizes:
    """Bytes that a pass needs, by what they are for.

    `kept`, `work`, `collected` and `boundary` are per token of the largest layer, `kept_all` per token of all layers;
    `logits` and `fixed` (results and scratch) do not depend on the tokens of a run.
    """

    kept_all: int
    kept: int
    work: int
    collected: int
    boundary: int
    logits: int
    fixed: int
    layers: int

    def _loss(self, tokens: int) -> int:
        return 3 * tokens * self.boundary + self.logits

    def fast(self, tokens: int) -> int:
        return tokens * self.kept_all + max(self._loss(tokens), tokens * self.work) + self.fixed

    def lean(self, tokens: int, kept_layers: int = 0) -> int:
        inside = tokens * (self.boundary + self.kept + self.work)
        boundaries = tokens * (self.layers * self.boundary + kept_layers * self.kept)
        return boundaries + max(self._loss(tokens), inside) + self.fixed

    def kept_layers(self, tokens: int, weights: int) -> int:
        """How many of the last layers lean keeps, beside weights of so many bytes."""
        return min(int(_KEPT * weights / max(tokens * self.kept, 1)), self.layers - 1)

    def layerwise(self, tokens: int, run: int, offload: bool) -> int:
        boundaries = 1 if offload else self.layers + 1
        inside = tokens * self.collected + run * (2 * self.boundary + self.kept + self.work)
        return tokens * boundaries * self.boundary + max(self._loss(run), inside) + self.fixed


def free_bytes(device: torch.device) -> int:
    """Bytes that a pass could have on a device; on CUDA, what torch has cached and does not use counts as free, and a
    limit that was set by `torch.cuda.set_per_process_memory_fraction` holds."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        allowed = int(torch.cuda.memory.get_per_process_memory_fraction(index) * total) - reserved
        return max(0, min(free, allowed)) + reserved - torch.cuda.memory_allocated(device)
    return free_on_host()


def _sizes(
    model: Any, linears: Linears, groups: Sequence[Group], samples: Samples, *, float64: bool, kernels: bool
) -> _Sizes:
    entry = arch.architecture(model)
    kept_by_layer: dict[int, int] = {}
    collected_by_layer: dict[int, int] = {}
    work = largest = widest = 0
    element = hidden = 1
    config = arch.text_config(model)
    heads = getattr(config, entry.attention.heads_field, 1)
    experts = {g.layer: g for g in groups if g.kind == "experts"}
    for group in groups:
        if group.kind == "experts":
            continue  # their matrices are counted with their channels
        weights = [arch.view(linears, m, group.units) for m in group.members]
        shapes, element = [w.shape for w in weights], weights[0].element_size()
        inside = [shape[m.axis] for m, shape in zip(group.members, shapes, strict=True)]
        outside = [shape[1 - m.axis] for m, shape in zip(group.members, shapes, strict=True)]
        hidden = max(outside)
        largest = max(largest, max(s.numel() for s in shapes))
        widest = max(widest, *inside)
        # A token goes to a few of the experts, and each of those is a group.
        whole = experts.get(group.layer)
        share = whole.min_units / whole.units if group.tied_width and whole is not None else 1.0
        kept = element * (hidden + sum(inside))
        if group.kind == "mlp":
            if entry.mlp.gated is not None and not entry.partial:
                kept -= element * inside[-1]  # the product is computed again
            work = max(work, element * (3 * hidden + (2 if kernels else 6) * max(inside)))
        else:
            kept += 4 * heads
            if getattr(config, "_attn_implementation", "sdpa") == "eager":
                kept += heads * samples.longest * (4 + 2 * element)
        if not entry.norms:
            kept += hidden * (2 * element + 4)
        kept_by_layer[group.layer] = kept_by_layer.get(group.layer, 0) + int(share * kept)
        # All matrices but the last share their input.
        both = sum(sum(shape) for shape in shapes) - (len(shapes) - 2) * hidden
        collected_by_layer[group.layer] = collected_by_layer.get(group.layer, 0) + element * both
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if float64:  # the weight, a gradient and what is summed
        scratch = 8 * 6 * largest
    else:
        tables = _TABLES * 4 * (3 + len(samples)) * widest
        scratch = min(8 * 6 * largest, max(_SCRATCH, min(tables, _MOST_TABLES)))
    return _Sizes(
        kept_all=sum(kept_by_layer.values()),
        kept=max(kept_by_layer.values()),
        work=work,
        collected=max(collected_by_layer.values()),
        boundary=element * hidden,
        logits=4 * min(LOGIT_BYTES, 4 * samples.tokens.numel() * vocabulary),
        fixed=result_bytes(groups, len(samples)) + scratch,
        layers=len(kept_by_layer),
    )


def _fits(linears: Linears, needed: int) -> bool:
    """Whether every device has room for its share of the bytes, which goes by the number of matrices it holds."""
    devices = [next(module.parameters()).device for module in linears.values()]
    return all(needed * devices.count(d) / len(devices) <= _SHARE * free_bytes(d) for d in set(devices))


def _layerwise(linears: Linears, samples: Samples, sizes: _Sizes) -> MemoryPlan:
    """The largest runs that fit, with the layers' inputs on the device if they can be.

    Raises:
        HywiaError: not even runs of one sample fit.
    """
    samples = samples.sorted()
    cuda = any(next(m.parameters()).is_cuda for m in linears.values())
    longest = samples.longest
    for offload in (False, True) if cuda else (False,):
        run = max(CHUNK_TOKENS, longest)
        while run > longest and not _fits(linears, sizes.layerwise(samples.total, run, offload)):
            run = max(longest, run // 2)
        needed = sizes.layerwise(samples.total, run, offload)
        host = samples.total * sizes.layers * sizes.boundary if offload else 0
        if _fits(linears, needed) and host <= _SHARE * free_bytes(torch.device("cpu")):
            return MemoryPlan("layerwise", tuple(samples.chunks(run)), offload, needed)
    device = next(next(iter(linears.values())).parameters()).device
    free = free_bytes(device)
    raise HywiaError(
        f"batches: {len(samples)} samples with {samples.total} tokens need about {needed / 1e9:.2f} GB beside the "
        f"weights even one layer at a time, got {free / 1e9:.2f} GB free on {device}; pass fewer or shorter samples, "
        "or load the model in bfloat16"
    )


def plan_memory(
    model: Any,
    linears: Linears,
    groups: Sequence[Group],
    samples: Samples,
    requested: str,
    *,
    float64: bool,
    kernels: bool,
    layerwise: bool = True,
) -> MemoryPlan:
    """Plans the mode that was asked for, or the first of fast, lean and layerwise that fits.

    Fast is a fifth to a third faster than lean. "auto" takes it only while what it keeps is modest beside the weights,
    since with many samples that would be several times as much. Very ragged sets are taken layerwise even where there
    is memory, in runs of samples of similar length.

    Args:
        requested: "auto" or one of MODES.
        float64: scoring is by the reference, which needs whole matrices in float64.
        kernels: the gate and the norms are one kernel each.
        layerwise: whether the layerwise pass serves this model; where it does not, lean is the last resort.

    Raises:
        HywiaError: layerwise, asked for or the last resort, does not fit.
    """
    sizes = _sizes(model, linears, groups, samples, float64=float64, kernels=kernels)
    tokens = samples.tokens.numel()
    fast = MemoryPlan("fast", (samples,), False, sizes.fast(tokens))
    if requested == "fast":
        return fast
    weights = weight_bytes(model)
    kept_layers = sizes.kept_layers(tokens, weights) if kernels else 0
    lean = MemoryPlan("lean", (samples,), False, sizes.lean(tokens, kept_layers), kept_layers)
    if requested == "lean":
        return lean
    if requested == "auto" and (tokens <= _RAGGED * samples.total or not layerwise):
        if fast.estimate <= max(_MODEST * weights, _MODEST_BYTES) and _fits(linears, fast.estimate):
            return fast
        if _fits(linears, lean.estimate):
            return lean
    if not layerwise:
        return lean
    return _layerwise(linears, samples, sizes)


def scoring_bytes(
    model: Any, linears: Linears, groups: Sequence[Group], samples: Samples, free: int, *, kernels: bool
) -> int:
    """What a pass of the mode that `plan_memory` would choose needs beside the weights, of a model that may be on the
    meta device, where so many bytes are free beside them. Where nothing fits, what the least would need.

    Args:
        samples: of like length. free: bytes. kernels: the gate is one kernel.
    """
    sizes = _sizes(model, linears, groups, samples, float64=False, kernels=kernels)
    tokens, weights = samples.tokens.numel(), weight_bytes(model)
    fast = sizes.fast(tokens)
    if fast <= max(_MODEST * weights, _MODEST_BYTES) and fast <= _SHARE * free:
        return fast
    lean = sizes.lean(tokens, sizes.kept_layers(tokens, weights) if kernels else 0)
    if lean <= _SHARE * free:
        return lean
    return sizes.layerwise(samples.total, max(CHUNK_TOKENS, samples.longest), offload=False)


def plan_whole(model: Any, linears: Linears, groups: Sequence[Group], samples: Samples, requested: str) -> MemoryPlan:
    """Plans the reference pass, which recomputes only checkpointed layers: fast, or lean where that does not fit."""
    sizes = _sizes(model, linears, groups, samples, float64=False, kernels=False)
    largest = max(p.numel() // (len(p) if p.dim() > 2 else 1) for m in linears.values() for p in m.parameters())
    tokens, gradients = samples.tokens.numel(), 3 * 4 * largest
    # Norms in float32, activations and products are kept too: about as much again.
    fast = 2 * sizes.fast(tokens) + gradients
    mode = requested if requested != "auto" else "fast" if _fits(linears, fast) else "lean"
    needed = fast if mode == "fast" else sizes.lean(tokens) + tokens * sizes.kept + gradients
    return MemoryPlan(mode, (samples,), False, needed)
