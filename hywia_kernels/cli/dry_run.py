"""`hywia prune --dry-run`: what would be done and what it takes, from the model's config alone."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from .. import arch
from ..checkpoint import saving
from ..checkpoint.skeleton import skeleton
from ..compression import fitted, with_resolved_recovery
from ..deploy import planning
from ..deploy.estimate import estimate
from ..method.depth import most_gone
from ..method.search import EFFORTS
from ..recipe import Recipe
from ..types import Scores
from . import console, session

__all__ = ["dry_run"]


def dry_run(arguments: argparse.Namespace, recipe: Recipe, scores: Scores | None) -> None:
    """Print and report a plan of the request's size, its predicted gain, and the time and memory of the run.

    No weight is read. With stored scores the plan's widths are the run's own; without them they are decided by scoring,
    and what is shown is one plan of that size.

    Raises:
        UsageError, HywiaError: the model cannot meet the request, as the run would say.
    """
    model = skeleton(arguments.model, trust_remote_code=arguments.trust_remote_code, revision=arguments.revision)
    session.proven(model)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    recipe = with_resolved_recovery(model, fitted(model, recipe, where), where)
    plan = planning.check_reachable(model, scores, criterion=recipe.criterion, **recipe.plan_request())
    trials, samples = _trials(model, where, recipe, planning.alike(model) if scores is None else scores)
    plan = planning.with_prediction(plan, model, recipe.target, recipe.serve)
    heads_go = any(g.kind == "attention" and plan.keep[g.name].numel() < g.units for g in plan.staying)
    ranks, priced = scores is None or scores.layers is None, 0
    if recipe.layer_samples() and ranks and set(recipe.kinds) != {"layers"}:
        priced = most_gone(arch.layer_parameters(model), plan.parameters_before, **recipe.plan_request())
    takes = estimate(
        model,
        samples=recipe.scored_samples() if scores is None else 0,
        layer_samples=recipe.layer_samples() if ranks else 0,
        layers_priced=priced,
        seq_len=recipe.seq_len,
        writes=scores is None and recipe.calibration is None and recipe.text_samples() > 0,
        ranks_heads=heads_go and recipe.head_ranking == "residual",
        reconstruct_samples=recipe.reconstruct_samples or 0,
        layer_passes=recipe.layer_passes or 0,
        recover=recipe.recover,
        trials=trials,
        trial_samples=samples,
        ratio=plan.ratio,
        device=device,
    )
    console.say("dry run: nothing is loaded or written")
    console.print_plan(plan)
    if scores is None:
        console.say("  which widths of this size, and which units, is decided by the scores")
    if trials:
        console.say(f"  of the splits of this size, at most {trials} are tried (--search {recipe.search})")
    stages = ", ".join(f"{stage} {seconds:,.1f} s" for stage, seconds in takes.seconds.items())
    console.say(f"  will take about {takes.total_seconds:,.0f} s on {device} beside loading and evaluation: {stages}")
    console.say(
        f"  and about {takes.memory_bytes / 1e9:,.2f} GB of memory; writes about {takes.disk_bytes / 1e9:,.2f} GB"
    )
    content = {
        "dry_run": True,
        "recipe": recipe.to_dict(),
        "plan": saving.plan_record(plan),
        "estimate": {
            "device": device,
            "seconds": dict(takes.seconds),
            "trials": trials,
            "memory_bytes": takes.memory_bytes,
            "disk_bytes": takes.disk_bytes,
        },
    }
    console.write_json(arguments.json, content)


def _trials(model: Any, device: torch.device, recipe: Recipe, scores: Scores) -> tuple[int, tuple[int, int]]:
    """How many plans the resolved recipe tries at the most, and the samples that each is refitted and judged on."""
    if recipe.search in (None, "none"):
        return 0, (0, 0)
    effort = EFFORTS[recipe.search]
    trials = effort.trials(planning.choices(scores, **recipe.plan_request()))
    return trials, (effort.refit_samples(model, device.type) if recipe.reconstruct else 0, effort.judged)
