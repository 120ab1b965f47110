"""What `hywia prune` does beside scoring: layouts, scores that are learned, and the refit; and its defaults."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from . import report
from .deploy import planning
from .errors import UsageError
from .method import selection
from .method.head_residual import leftover, with_leftover
from .method.mask_learning import learn
from .method.reconstruction import RIDGE, refit
from .types import Plan, Scores

__all__ = [
    "REFIT_SAMPLES",
    "SAMPLES",
    "STEPS",
    "add_recipe",
    "check_recipe",
    "group_ratio",
    "plan_request",
    "planned",
    "refits",
    "refitted",
]

# README, "The recipe", has what each of them gains and costs.
SAMPLES = 96  # scored: on LLaMA-7B's shapes a pass over them takes less time than LLM-Pruner's over ten
REFIT_SAMPLES = 1024
STEPS = 50

# Calibration samples, as many as asked for (None: those that are scored); True: or as many as the text has.
Texts = Callable[..., Tensor]


def group_ratio(text: str) -> float | dict[str, float]:
    """`0.5`, or shares by kind: `mlp=0.6,attention=0.34`."""
    if "=" not in text:
        return _share(text, text)
    shares: dict[str, float] = {}
    for part in text.split(","):
        kind, _, share = (piece.strip() for piece in part.partition("="))
        if kind in shares:
            raise argparse.ArgumentTypeError(f"expected each kind once, got {kind} twice in {text!r}")
        if not kind:
            raise argparse.ArgumentTypeError(f"expected KIND=SHARE, got {part!r} in {text!r}")
        shares[kind] = _share(share, text)
    return shares


def _share(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected 0.5 or mlp=0.6,attention=0.34, got {whole!r}") from None


def add_recipe(command: argparse.ArgumentParser) -> None:
    """Add the options to `hywia prune`."""
    group = command.add_argument_group("recipe")
    group.add_argument(
        "--layout",
        choices=selection.LAYOUTS,
        help="cut layers alike, or share channels out among them; default: uniform, but adaptive with --group-ratio "
        "where a refit follows",
    )
    group.add_argument(
        "--refit",
        action=argparse.BooleanOptionalAction,
        help="solve the surviving output columns by least squares; default: with --criterion hywia, but for --fusion "
        "learned",
    )
    group.add_argument("--ridge", type=float, help=f"of the refit; default: {RIDGE}")
    group.add_argument(
        "--refit-samples",
        type=int,
        help=f"default: {REFIT_SAMPLES} of --calib, or all that it has, or those the model wrote to be scored",
    )
    group.add_argument("--steps", type=int, help=f"of --fusion learned; default: {STEPS}")


def refits(arguments: argparse.Namespace) -> bool:
    """Whether a refit follows."""
    if arguments.refit is not None:
        return arguments.refit
    if arguments.fusion == "learned" or arguments.criterion not in (None, "hywia"):
        return False
    return arguments.scores is None or arguments.calib is not None


def check_recipe(arguments: argparse.Namespace) -> None:
    """What can be refused before a model is loaded."""
    if arguments.layout == "adaptive" and arguments.criterion not in (None, "hywia"):
        raise UsageError(f"layout: adaptive goes with --criterion hywia, got --criterion {arguments.criterion}")
    for name in ("ridge", "refit_samples"):
        value = getattr(arguments, name)
        if value is not None and not refits(arguments):
            raise UsageError(f"{name}: goes with --refit")
        if value is not None and not value > 0:
            raise UsageError(f"{name}: expected a positive number, got {value}")
    if arguments.steps is not None and arguments.fusion != "learned":
        raise UsageError("steps: goes with --fusion learned")
    if arguments.steps is not None and arguments.steps < 1:
        raise UsageError(f"steps: expected at least 1, got {arguments.steps}")
    if isinstance(arguments.group_ratio, Mapping) and tuple(arguments.units) != selection.USUAL:
        raise UsageError("units: --group-ratio names the kinds already")


def _layout(arguments: argparse.Namespace) -> str:
    if arguments.layout is not None:
        return arguments.layout
    return "adaptive" if arguments.group_ratio is not None and refits(arguments) else "uniform"


def _kinds(arguments: argparse.Namespace) -> tuple[str, ...]:
    return tuple(arguments.group_ratio if isinstance(arguments.group_ratio, Mapping) else arguments.units)


def plan_request(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `planning.plan_for` is asked for."""
    names = ("target", "serve", "tensor_parallel", "ratio", "group_ratio", "layers", "units", "align")
    return {name: getattr(arguments, name) for name in names} | {"layout": _layout(arguments)}


def planned(arguments: argparse.Namespace, model: Any, scores: Scores, texts: Texts) -> tuple[Scores, Plan]:
    """The scores that decide, learned where that is asked for, and the plan they make."""

    if refits(arguments) and arguments.fusion in (None, "attention") and "attention" in _kinds(arguments):
        scores = with_leftover(scores, leftover(model, texts(None)))
    plan = planning.plan_for(scores, **plan_request(arguments))
    if arguments.fusion == "learned":
        scores = learn(model, scores, plan, texts(REFIT_SAMPLES, True), steps=arguments.steps or STEPS)
        again = {name: selection.top_units(scores.values[name], keep.numel()) for name, keep in plan.keep.items()}
        plan = replace(plan, keep=again, record={**plan.record, "scores": dict(scores.record)})
    return scores, plan


def refitted(arguments: argparse.Namespace, model: Any, plan: Plan, texts: Texts) -> Plan:
    """The plan after `refit`, where the arguments ask for one."""
    if not refits(arguments):
        return plan
    wanted = arguments.refit_samples or (REFIT_SAMPLES if arguments.calib is not None else None)
    batches = texts(wanted, arguments.refit_samples is None)
    plan = refit(model, plan, batches, ridge=arguments.ridge or RIDGE)
    done = plan.record["refit"]
    errors = list(done["relative_error"].values())
    if errors:
        before, after = (sum(pair[i] for pair in errors) / len(errors) for i in (0, 1))
        report.say(
            f"refitted {len(errors)} matrices on {done['samples']:,} samples, {done['tokens']:,} tokens, in "
            f"{done['seconds']:.1f} s: "
            f"mean squared error of their outputs {before:.3f} -> {after:.3f} of the outputs'"
        )
    return plan
