"""The streamed scoring as `bench_large` runs it, and the limits that it is held against."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hywia_kernels as hk
from hywia_kernels.checkpoint.stored_model import StoredModel

from . import checkpoints, models
from .memory import Spent, free, spending

__all__ = ["PARTS", "built", "distance", "limits", "network", "order_digest", "scored", "token_ids"]

# Of a scoring, as its record has them: seconds that go to pinning memory and to buffers, to the forward and the
# backward sweep, and to waiting for weights; bytes that moved to the device, and that processes got from each other.
PARTS = {
    **dict.fromkeys(("seconds_prepared", "seconds_forward", "seconds_backward", "seconds_waited"), float),
    **dict.fromkeys(("runs", "bytes_moved", "bytes_exchanged"), int),
}


def built(shape: str, layers: int | None, dtype: str, device: torch.device, where: torch.device, seed: int) -> Any:
    """A random model whose layers are copies of one: values do not change the time, and making them would take longer
    than measuring. They are made on one device, and so are the same where the model is on another."""
    torch.manual_seed(seed)
    model: Any = models.build(shape, 1, dtype, device).to(where)
    count = models.SHAPES[shape]["num_hidden_layers"] if layers is None else layers
    model.model.layers = nn.ModuleList(copy.deepcopy(model.model.layers[0]) for _ in range(count))
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = count
    if hasattr(model.config, "layer_types"):
        model.config.layer_types = model.config.layer_types[:1] * count
    return model


def network(model: Any) -> Any:
    """The modules of a loaded or a stored model."""
    return model.model if isinstance(model, StoredModel) else model


def token_ids(samples: int, length: int, seed: int) -> Tensor:
    """Random ids, the same in every process."""
    return torch.randint(64, (samples, length), generator=torch.Generator().manual_seed(seed))


def scored(
    model: Any, tokens: Tensor, device: torch.device, place: str, orders: Sequence[str], group: Any = None
) -> tuple[Any, Spent]:
    """`(statistics, what they took)`: of a model that is on the device, the faster of two scorings."""
    options = {} if group is None else {"ranks": group}
    took: list[Spent] = []
    for _ in range(2 if place == "device" else 1):
        with spending(device) as spent:
            found = hk.calibrate_streamed(model, tokens, orders=orders, device=device, weights=place, **options)
        took.append(spent)
    return found, min(took, key=lambda s: s.seconds)


def order_digest(statistics: Any) -> str:
    """Of the order in which the sums put the units of each group."""
    told = hashlib.sha256()
    for name in sorted(statistics.fine):
        for order in statistics.orders:
            told.update(statistics.fine[name][order].argsort(stable=True).numpy().tobytes())
    return told.hexdigest()[:12]


def distance(shape: str, dtype: str, device: torch.device, length: int, orders: Sequence[str]) -> float:
    """How far the fine sums of two layers are from `calibrate`'s, relative to the largest."""
    model = models.build(shape, 2, dtype, device)
    ids = token_ids(3, length, 1)
    one = hk.calibrate_streamed(model, ids, orders=orders)
    other = hk.calibrate(model, ids, memory="lean", orders=orders)
    pairs = [(one.fine[g.name][order], other.fine[g.name][order]) for g in one.groups for order in orders]
    del model
    free(device)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def limits(
    model: Any, source: Path, place: str, device: torch.device, tokens: Tensor, given: Any, orders: Sequence[str]
) -> dict[str, float]:
    """Seconds that a scoring cannot take less than: those of one that waits for no weights, of the shape's first two
    layers on the device, times the layers; and for as many bytes as two sweeps over the layers move, by the link from
    pinned memory, or, of files, from the disk, if that is longer."""
    layers = network(model).model.layers
    few = models.build(given.shape, 2, given.dtype, device)
    _, spent = scored(few, tokens, device, "device", orders)
    del few
    free(device)
    found = {"compute": spent.seconds * len(layers) / 2}
    if place == "device":
        return found
    moved = 2 * sum(p.numel() * p.element_size() for p in layers.parameters())
    found["transfer"] = moved / _link_rate(device)
    if place == "files":
        checkpoints.forget(source)
        began = time.monotonic()
        count = checkpoints.read(source)
        found["transfer"] = max(found["transfer"], (time.monotonic() - began) * moved / count)
    return found


def _link_rate(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes a second from the host's memory to the device."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=device)
    there.copy_(host)
    best = 0.0
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.monotonic()
        there.copy_(host)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, size / (time.monotonic() - began))
    return best
