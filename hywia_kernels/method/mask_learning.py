"""Scores tuned end to end: masks over the units, learned for some dozens of steps on calibration text.

The training-free scores are where the search starts. Every step masks the units that a plan of the present scores
would remove, compares the masked model's next-token distributions with the whole model's, and moves the scores along
the gradient that the masks get ("straight through": the step function's backward is a sigmoid's). Weights stay as they
are. Unlike a single pass over gradients this measures what units do for each other, and what is removed already. A
step costs two forward passes and a backward pass without weight gradients: docs/recipe.md has what it gained.

Straight-through estimators: Bengio et al. (arXiv 1308.3432).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch
from ..arch.facts import fingerprint
from ..arch.holding import check_held, unwrapped
from ..engine import loss
from ..engine.passes import apart
from ..engine.patches import hooked
from ..engine.samples import Samples, padded
from ..errors import HywiaError, UsageError
from ..ops.reference import standardised_log
from ..progress import Bar
from ..settings import LEARNING_BATCH, STEPS
from ..types import Depth, Group, Plan, Scores
from .calibration_data import check_tokens, digest
from .distillation import HeadTargets, distillation_loss

__all__ = ["learn_masks"]

_RATE, _BETAS = 0.05, (0.9, 0.95)
_SLOPE = 2.0  # of the sigmoid that stands for the step in backward, scores in standard deviations of their layer


@dataclass
class _LearnedMask:
    """One group's scores while they are learned; the units of the `count` highest scores stay."""

    group: Group
    count: int  # units to keep
    module: nn.Module
    scores: Tensor  # float32 [units], requires grad

    def values(self) -> Tensor:
        """The mask, float32 `[units]`: `count` ones and else zeros, with a sigmoid's gradient."""
        kept = torch.zeros_like(self.scores)
        ordered, units = torch.sort(self.scores.detach(), descending=True, stable=True)
        kept[units[: self.count]] = 1.0
        threshold = 0.5 * (ordered[self.count - 1] + ordered[self.count])
        soft = torch.sigmoid(_SLOPE * (self.scores - threshold))
        return kept + soft - soft.detach()


@contextmanager
def _masked(masks: Sequence[_LearnedMask]) -> Iterator[None]:
    """Within the context the inputs of the units' output matrices are multiplied by the present masks."""

    def hook(mask: _LearnedMask) -> Any:
        def multiply(module: nn.Module, arguments: tuple) -> tuple:
            factors = mask.values().repeat_interleave(mask.group.members[-1].group_size)
            return (arguments[0] * factors.to(arguments[0].dtype), *arguments[1:])

        return multiply

    with hooked([(mask.module, hook(mask)) for mask in masks], before=True):
        yield


@contextmanager
def _skipped(model: Any, depth: Depth | None) -> Iterator[None]:
    """Within the context the layers that go hand on what enters them."""

    def hand_on(module: nn.Module, entered: tuple, out: Any) -> Any:
        return (entered[0], *out[1:]) if isinstance(out, (tuple, list)) else entered[0]

    layers = arch.layers_of(model)
    with hooked([(layers[i], hand_on) for i in (() if depth is None else depth.gone)]):
        yield


def _standardised(values: Tensor) -> Tensor:
    """Standardised scores, float32 `[units]`; of scores without a negative one the logarithms, which are spaced more
    evenly."""
    if bool((values >= 0).all()):
        return standardised_log(values).float()
    centred = values.double() - values.double().mean()
    return (centred / centred.square().mean().sqrt().clamp(min=1e-12)).float()


def _hidden_states(model: Any, tokens: Tensor) -> Tensor:
    return arch.decoder(model)(tokens, use_cache=False).last_hidden_state


def learn_masks(
    model: Any,
    scores: Scores,
    plan: Plan,
    batches: Tensor | Sequence[Tensor],
    *,
    steps: int = STEPS,
    batch: int = LEARNING_BATCH,
) -> Scores:
    """Tune scores for the number of units that one plan keeps in each group.

    Args:
        model: the model that the scores are of; it is left as it was.
        scores: where to start, for instance those of the attention fusion.
        plan: made from these scores; it says how many units every group is to keep. Groups that it leaves whole keep
            their scores.
        batches: token ids int64 `[samples, length]`, or a sequence of such, as `calibrate` takes them; they are used in
            turn, `batch` samples a step.
        steps: how many steps Adam takes, at a rate that falls linearly to a fifth.
        batch: samples a step.

    Returns:
        Scores whose values are the learned ones, in standard deviations of their group; plan again with them, for the
        same request. The same input gives the same scores on a CPU.

    Raises:
        HywiaError: scores or plan of another model, a plan that cuts stacked experts, or a loss that is NaN.
        UsageError: malformed batches, steps or batch.
    """
    began = time.monotonic()
    if steps < 1 or batch < 1:
        raise UsageError(f"steps: expected steps and batch of at least 1, got {steps} and {batch}")
    model = unwrapped(model)
    modules = dict(model.named_modules())
    check_held(modules)
    with apart(modules):
        if fingerprint(model) != scores.fingerprint or plan.fingerprint != scores.fingerprint:
            raise HywiaError("scores: made for another model, or not those of the plan (the weights differ)")
        samples = padded(batches)
        check_tokens(samples.tokens, model)
        loss.check_head(model)
        masks = _initial_masks(model, scores, plan)
        losses = _optimise(model, masks, plan.depth, samples, steps, batch)
    values = dict(scores.values) | {mask.group.name: mask.scores.detach().cpu() for mask in masks}
    record = {
        "steps": steps,
        "batch": batch,
        "samples": len(samples),
        "calibration_sha256": digest(samples.tokens),
        "divergence": [losses[0], losses[-1]],
        "seconds": round(time.monotonic() - began, 3),
    }
    return replace(scores, values=values, record={**scores.record, "fusion": "learned", "learned": record})


def _initial_masks(model: Any, scores: Scores, plan: Plan) -> list[_LearnedMask]:
    """A mask for every group that the plan cuts."""
    masks = []
    for group in plan.staying:
        member, count = group.members[-1], plan.keep[group.name].numel()
        if count == group.units:
            continue
        if member.index is not None or group.kind == "experts":
            raise HywiaError(f"learn: {group.name} is stacked experts, which masks of this kind do not reach")
        module = model.get_submodule(member.module)
        start = _standardised(scores.values[group.name]).to(module.weight.device).requires_grad_()
        masks.append(_LearnedMask(group, count, module, start))
    if not masks:
        raise UsageError("plan: expected one that removes units, got one that keeps all; there is nothing to learn")
    return masks


def _optimise(
    model: Any, masks: Sequence[_LearnedMask], depth: Depth | None, samples: Samples, steps: int, batch: int
) -> list[float]:
    """Move the masks' scores, in the model without the layers that go; return the divergence at every step."""
    device = model.get_input_embeddings().weight.device
    optimiser = torch.optim.Adam([mask.scores for mask in masks], lr=_RATE, betas=_BETAS)
    losses = []
    with Bar("learning", steps) as bar:
        for step in range(steps):
            chosen = [(step * batch + i) % len(samples) for i in range(min(batch, len(samples)))]
            tokens = samples.tokens[chosen].to(device)
            valid = (torch.arange(tokens.shape[1]) < samples.lengths[chosen][:, None]).float().to(device)
            for settings in optimiser.param_groups:
                settings["lr"] = _RATE * (1.0 - 0.8 * step / steps)
            with torch.no_grad():
                dense = _hidden_states(model, tokens)
            targets = HeadTargets(model, dense.flatten(0, 1))
            weight = (valid / valid.sum()).flatten()
            with _masked(masks), _skipped(model, depth), torch.enable_grad():
                optimiser.zero_grad(set_to_none=True)
                masked = _hidden_states(model, tokens).flatten(0, 1)
                divergence = distillation_loss(model, masked, targets, weight)
                divergence.backward()
            optimiser.step()
            losses.append(float(divergence.detach()))
            if losses[-1] != losses[-1]:
                raise HywiaError("model: the loss is NaN; load the model in float32 or bfloat16")
            bar.step()
    return losses
