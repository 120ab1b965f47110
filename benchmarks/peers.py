"""What other pruning methods score by, written out anew: the baselines of `benchmarks.quality`.

LLM-Pruner (arXiv 2305.11627): `vectorize`, `param_first`, `param_second` and `param_mix`, local ranking. They come from
one pass's statistics, which are the same sums as those of `benchmarks/llm_pruner.py` but for a factor one half of
second order, which changes no ranking. Wanda-sp (Wanda, arXiv 2306.11695, made structured by FLAP's authors): |W|·‖x‖
of the output matrices, inputs as the layers before leave them. FLAP (arXiv 2312.11983): fluctuation of the inputs times
the columns' squared norms (WIFV), standardised in each layer, one ranking over the layers, and the mean of what was
removed as a bias.

Where a method removes heads, a KV group stands for a head here; where it decides how much of heads and of channels to
remove, the setting's shares do. A plan is of the model as it was, which `hywia_kernels.prune` cuts by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import hywia_kernels as hk
from hywia_kernels.method.scores import coarse_estimate
from hywia_kernels.method.selection import top_units
from hywia_kernels.method.surgery import zero_units
from hywia_kernels.types import Group

LLM_PRUNER = ("vectorize", "param_first", "param_second", "param_mix")
Shares = dict[str, float]  # kind -> share of its units that goes


def llm_pruner(statistics: hk.Statistics, taylor: str) -> hk.Scores:
    """One of LLM-Pruner's criteria, summed over a group's matrices."""
    if taylor == "vectorize":
        values = {g.name: coarse_estimate(statistics.coarse[g.name], "first") for g in statistics.groups}
    else:
        order = {"param_first": "first", "param_second": "second", "param_mix": "mixed"}[taylor]
        values = {g.name: statistics.fine[g.name][order] for g in statistics.groups}
    record = {"criterion": taylor}
    return hk.Scores(statistics.groups, values, {}, statistics.parameters, statistics.fingerprint, record)


@dataclass
class Inputs:
    """Moments of what enters a group's output matrix: float64 `[inputs]` each."""

    mean: Tensor
    square: Tensor  # mean of squares

    @property
    def variance(self) -> Tensor:
        return (self.square - self.mean.square()).clamp(min=0.0)


class _Enough(Exception):
    """Raised to end a forward pass once all the matrices that were asked for have had their inputs."""


@torch.no_grad()
def inputs(model: Any, tokens: Tensor, groups: Sequence[Group], batch: int = 32) -> dict[str, Inputs]:
    """Group name -> moments over all tokens of what enters its output matrix; the pass ends after the last group."""
    sums: dict[str, list[Tensor]] = {}
    count = tokens.numel()
    modules = {g.name: model.get_submodule(g.members[-1].module) for g in groups}
    last = list(modules)[-1]

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1]).double()
            now = [x.sum(0), x.square().sum(0)]
            sums[name] = [a + b for a, b in zip(sums[name], now, strict=True)] if name in sums else now
            if name == last:
                raise _Enough

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    device = model.get_input_embeddings().weight.device
    try:
        for part in tokens.split(batch):
            try:
                model.get_decoder()(part.to(device), use_cache=False)
            except _Enough:
                continue
    finally:
        for handle in handles:
            handle.remove()
    return {name: Inputs(*(s / count for s in pair)) for name, pair in sums.items()}


def _matrix(model: Any, group: Group) -> Tensor:
    """A group's output matrix `[outputs, inputs]`."""
    member = group.members[-1]
    weight = model.get_submodule(member.module).weight.detach()
    return weight if member.axis == 1 else weight.T


def _per_unit(per_input: Tensor, group: Group) -> Tensor:
    return per_input.view(group.units, -1)


def count(group: Group, shares: Shares) -> int:
    """Units of a group that stay."""
    return group.units - round(shares.get(group.kind, 0.0) * group.units)


def _cut(groups: Sequence[Group], shares: Shares, layers: range) -> list[Group]:
    return [g for g in groups if g.layer in layers and count(g, shares) < g.units]


def _plan(model: Any, groups: Sequence[Group], keep: dict[str, Tensor]) -> hk.Plan:
    from hywia_kernels.arch.facts import count_parameters, fingerprint

    keep = {g.name: keep.get(g.name, torch.arange(g.units)) for g in groups}
    total = count_parameters(model)
    removed = sum((g.units - keep[g.name].numel()) * g.unit_parameters for g in groups)
    return hk.Plan(tuple(groups), keep, total, total - removed, "adaptive", fingerprint(model))


def wanda_sp(model: Any, tokens: Tensor, shares: Shares, layers: range) -> hk.Plan:
    """Wanda-sp's plan. The model must not be pruned yet; it is masked layer by layer on the way, and left masked."""
    groups = hk.groups(model)
    keep: dict[str, Tensor] = {}
    plan = _plan(model, groups, keep)
    for layer in layers:
        here = [g for g in _cut(groups, shares, layers) if g.layer == layer]
        if not here:
            continue
        moments = inputs(model, tokens, here)
        for group in here:
            metric = _matrix(model, group).abs().double().mean(0) * moments[group.name].square.sqrt()
            score = _per_unit(metric, group).sum(1).cpu()
            keep[group.name] = top_units(score, count(group, shares))
        for group in here:
            zero_units(model, group, keep[group.name])
    final = {g.name: keep.get(g.name, torch.arange(g.units)) for g in groups}
    removed = sum((g.units - final[g.name].numel()) * g.unit_parameters for g in groups)
    left = plan.parameters_before - removed
    return hk.Plan(plan.groups, final, plan.parameters_before, left, "adaptive", plan.fingerprint)


@dataclass
class Flap:
    """FLAP's plan, and the biases that make up for the means of what it removes: module name -> `[outputs]`."""

    plan: hk.Plan
    biases: dict[str, Tensor]


def flap(model: Any, tokens: Tensor, shares: Shares, layers: range) -> Flap:
    """WIFV with one ranking over the layers and bias compensation. The model is left as it is."""
    groups = hk.groups(model)
    cut = _cut(groups, shares, layers)
    moments = inputs(model, tokens, cut)
    keep: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for kind in sorted({g.kind for g in cut}):
        members = [g for g in cut if g.kind == kind]
        scores = []
        for group in members:
            metric = moments[group.name].variance * _matrix(model, group).double().square().sum(0)
            metric = (metric - metric.mean()) / metric.std()
            scores.append(_per_unit(metric, group).mean(1).cpu())
        ranking = torch.cat(scores)
        stays = torch.zeros(len(ranking), dtype=torch.bool)
        stays[top_units(ranking, sum(count(g, shares) for g in members))] = True
        for group, mask in zip(members, stays.split([g.units for g in members]), strict=True):
            # A group that would lose everything keeps its best unit.
            keep[group.name] = mask.nonzero()[:, 0] if bool(mask.any()) else scores[members.index(group)].argmax()[None]
            gone = torch.ones(group.units, dtype=torch.bool)
            gone[keep[group.name]] = False
            lines = gone.repeat_interleave(group.members[-1].group_size).to(moments[group.name].mean.device)
            weight = _matrix(model, group)
            biases[group.members[-1].module] = (weight.double() @ (moments[group.name].mean * lines)).to(weight.dtype)
    return Flap(_plan(model, groups, keep), biases)


@contextmanager
def biased(model: Any, biases: dict[str, Tensor]) -> Iterator[None]:
    """A context in which biases (module name -> `[outputs]`) are added to the outputs of some of the model's
    modules."""
    handles = []
    for name, bias in biases.items():
        module = model.get_submodule(name)
        handles.append(module.register_forward_hook(lambda _, arguments, output, bias=bias: output + bias))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
