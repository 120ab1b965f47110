"""A protocol for scores that any pruning tool can use, and three scorers that implement it.

    scores = hk.TaylorScorer()(model)                # after loss.backward()
    scores["model.layers.0.mlp.down_proj", 1]        # float32 [columns]: one number per input channel

A tool that prunes rows or columns needs nothing but these numbers: `examples/torch_prune.py` drives PyTorch's own
`torch.nn.utils.prune.ln_structured` with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..method.scores import FUSIONS, blend, coarse_estimate, prior
from ..method.statistics import calibrate
from ..settings import BLEND, ORDERS
from .modules import BySide, layout, magnitude_sums, taylor_sums

__all__ = ["HyWIAScorer", "MagnitudeScorer", "Scorer", "TaylorScorer", "UnitScores"]

# (module name, axis) -> float32, one number per unit, larger is more important. The axis is the dimension of the
# module's weight that the units lie along, as `dim` of `torch.nn.utils.prune`. Consecutive channels may share a unit:
# a score of `u` numbers for `n` channels is about units of `n / u` each.
UnitScores = Mapping[tuple[str, int], Tensor]


@runtime_checkable
class Scorer(Protocol):
    """Model in, scores out.

    A scorer neither changes the model nor keeps it. It returns `UnitScores` for the matrices it has an opinion on, on
    the CPU or on the weight's device, finite, in the order of `model.named_modules()`, the output axis first. Matrices
    that gain or lose units together may be given the same scores, and a tool that knows which they are may add others'
    up. What it needs beside the model (data, gradients) it takes in its constructor or finds in `.grad`, and says so
    with `UsageError` when it is missing.
    """

    def __call__(self, model: nn.Module) -> UnitScores: ...


_SCORED = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)


def _axes(module: nn.Module, sides: BySide) -> Iterator[tuple[int, str]]:
    """The weight's dimensions that have channels, ascending, each with the side ("out" or "in") of these channels."""
    out = layout(module, module.weight.detach()).out[0]  # type: ignore[union-attr, operator]
    both = ((0, "out"), (1, "in")) if out == 0 else ((0, "in"), (1, "out"))
    return ((axis, side) for axis, side in both if side in sides)


class MagnitudeScorer:
    """`Σ|w|^p` of every output and input channel of linear layers, convolutions and embeddings; reads no data.

    Args:
        p: the power. backend: of the ops.

    Scores are float32 `[channels]`, on the weight's device.
    """

    def __init__(self, p: float = 2, *, backend: str | None = None) -> None:
        self.p, self.backend = p, backend

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[tuple[str, int], Tensor]:
        scores: dict[tuple[str, int], Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, _SCORED):
                sides = magnitude_sums(module, module.weight, self.p, self.backend)
                scores |= {(name, axis): sides[side].fine for axis, side in _axes(module, sides)}
        return scores


class TaylorScorer:
    """First-order Taylor importance of every output and input channel whose weight has a gradient in `.grad`.

    Args:
        grain: "fine", `Σ|w·g|` over a channel's weights, or "coarse", `|Σ w·g|`.
        backend: of the ops.
    """

    def __init__(self, grain: str = "fine", *, backend: str | None = None) -> None:
        if grain not in ("fine", "coarse"):
            raise UsageError(f"grain: expected fine or coarse, got {grain!r}")
        self.grain, self.backend = grain, backend

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[tuple[str, int], Tensor]:
        """Score a model.

        Raises:
            UsageError: no weight has a gradient.
        """
        scores = {}
        for name, module in model.named_modules():
            if isinstance(module, _SCORED) and module.weight.grad is not None:
                sides = taylor_sums(module, module.weight, module.weight.grad, self.backend)
                for axis, side in _axes(module, sides):
                    fine, signed = sides[side]
                    scores[name, axis] = fine if self.grain == "fine" else signed.abs()
        if not scores:
            raise UsageError("model: expected gradients in .grad, found none; run loss.backward() before scoring")
        return scores


class HyWIAScorer:
    """Hybrid-grained scores of a causal language model's MLP channels and heads (or KV groups), from one calibration.

    Every matrix of a group gets its group's scores, along the axis where the units lie: gate's and up's rows and down's
    columns, q's, k's and v's rows and o's columns.

    Args:
        batches: token ids, as `hywia_kernels.calibrate` takes them. fusion, order: as `hywia_kernels.fuse` takes them.
        options: backend, engine and memory of `hywia_kernels.calibrate`.
    """

    def __init__(self, batches: Any, fusion: str = BLEND, order: str = "second", **options: Any) -> None:
        if fusion not in FUSIONS:
            raise UsageError(f"fusion: expected one of {', '.join(FUSIONS)}, got {fusion!r}")
        if order not in ORDERS:
            raise UsageError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
        self.batches, self.fusion, self.order, self.options = batches, fusion, order, options

    def __call__(self, model: nn.Module) -> dict[tuple[str, int], Tensor]:
        """Score a model.

        Raises:
            HywiaError: an architecture that `hywia_kernels.groups` does not know, or as `hywia_kernels.calibrate`.
        """
        statistics = calibrate(model, self.batches, **self.options)
        parts: dict[tuple[str, int], dict[int, tuple[int, Tensor]]] = {}
        for group in statistics.groups:
            coarse = coarse_estimate(statistics.coarse[group.name], self.order)
            fine = statistics.fine[group.name][self.order]
            values = blend(fine, coarse, self.fusion, "reference", prior(group.unit))
            for member in group.members:
                if member.parameter == "weight" and member.index is None:  # experts' stacks are no module's weight
                    of_weight = parts.setdefault((member.module, member.axis), {})
                    of_weight[member.start] = (member.group_size, values)
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        return {key: _joined(parts[key]) for key in sorted(parts, key=lambda key: (order[key[0]], key[1]))}


def _joined(parts: Mapping[int, tuple[int, Tensor]]) -> Tensor:
    """The units' scores where the weight is one matrix; a score for every channel where it holds several."""
    if len(parts) == 1:
        return next(iter(parts.values()))[1]
    return torch.cat([parts[at][1].repeat_interleave(parts[at][0]) for at in sorted(parts)])
