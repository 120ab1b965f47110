"""How units are scored: by HyWIA, or by a criterion that needs no data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import arch, ops
from ..arch.facts import check_finite, fingerprint_and_count
from ..errors import UsageError
from ..settings import CRITERIA, FUSION, FUSIONS
from ..types import Group, LayerScores, Scores
from ..versions import versions
from .scores import fuse
from .statistics import calibrate

__all__ = ["magnitude", "random", "score", "unscored"]


def magnitude(model: Any, *, backend: str | None = None) -> Scores:
    """Score each unit by the squared l2 norm of its weights, which ranks as the norm does; no data is needed. A layer
    is scored by that of its units together.

    Raises:
        HywiaError: an unknown architecture, or NaN or Inf in weights.
    """
    check_finite(model)
    groups = arch.groups(model)
    values = {}
    for group in groups:
        pair = None
        for member in group.members:
            weight = arch.view(model, member, group.units).detach()
            # ½·F·w² with F = 2 is w²; a zero-stride 2 costs no memory.
            two = torch.full((), 2.0, dtype=torch.float32, device=weight.device).expand(weight.shape)
            pair = ops.taylor_importance(
                weight,
                None,
                two,
                axis=member.axis,
                order="second",
                group_size=member.group_size,
                out=pair and (pair[0], pair[1]),
                backend=backend,
            )
        assert pair is not None
        values[group.name] = pair.fine.cpu()
    by_layer = [0.0] * len(arch.layers_of(model))
    for group in groups:
        if group.kind != "experts":  # whose weights are those of their channels
            by_layer[group.layer] += float(values[group.name].sum(dtype=torch.float64))
    return _without_data(model, groups, values, torch.tensor(by_layer), {"criterion": "magnitude"})


def random(model: Any, seed: int = 0) -> Scores:
    """Seeded uniform scores: the baseline that any criterion must beat."""
    groups = arch.groups(model)
    generator = torch.Generator().manual_seed(seed)
    values = {g.name: torch.rand(g.units, generator=generator) for g in groups}
    by_layer = torch.rand(len(arch.layers_of(model)), generator=generator)
    return _without_data(model, groups, values, by_layer, {"criterion": "random", "seed": seed})


def unscored(model: Any) -> Scores:
    """Zeros for every unit: what goes with whole layers, where no unit inside them may go."""
    groups = arch.groups(model)
    values = {g.name: torch.zeros(g.units) for g in groups}
    fingerprint, parameters = fingerprint_and_count(model)
    return Scores(groups, values, values, parameters, fingerprint, {"criterion": "hywia", "versions": versions()})


def _without_data(
    model: Any, groups: tuple[Group, ...], values: dict[str, Tensor], by_layer: Tensor, record: dict[str, Any]
) -> Scores:
    layers = LayerScores(arch.layer_parameters(model), by_layer, record={"by": record["criterion"]})
    record["versions"] = versions()
    fingerprint, parameters = fingerprint_and_count(model)
    return Scores(groups, values, {}, parameters, fingerprint, record, layers)


def score(
    model: Any,
    batches: Any = None,
    *,
    criterion: str = "hywia",
    fusion: str = FUSION,
    order: str = "second",
    seed: int = 0,
    backend: str | None = None,
    engine: str = "auto",
    memory: str = "auto",
) -> Scores:
    """Score every unit of a model in one call: `calibrate` then `fuse`, or a criterion that needs no data.

    Args:
        model: a causal language model of a known architecture.
        batches: calibration token ids (see `calibrate`), which the criterion "hywia" alone needs.
            `hywia_kernels.calibration` makes them from a file, a dataset, or the model's own writing.
        criterion: "hywia", "magnitude" or "random".
        fusion, order: settings of "hywia", as `fuse` takes them. seed: of "random".
        backend: of the ops. engine, memory: as `calibrate` takes them.

    Raises:
        UsageError: an unknown criterion, fusion or order, or no batches. HywiaError: as `calibrate`.
    """
    if criterion not in CRITERIA:
        raise UsageError(f"criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}")
    if criterion == "magnitude":
        return magnitude(model, backend=backend)
    if criterion == "random":
        return random(model, seed)
    if fusion not in FUSIONS:
        raise UsageError(f"fusion: expected one of {', '.join(FUSIONS)}, got {fusion!r}")
    if batches is None:
        raise UsageError("batches: expected token ids for criterion 'hywia', got None; see hywia_kernels.calibration")
    return fuse(calibrate(model, batches, backend=backend, engine=engine, memory=memory), fusion, order)
