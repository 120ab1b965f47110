"""What transformers' Trainer does otherwise here: its steps, its checkpoints, its evaluation, and when it gives up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ... import progress
from .stepping import CapturedStep
from .tuning import Tuned

__all__ = ["WEIGHTS", "Lost", "Outcome", "distiller", "load_tuned", "tuned_state", "watch"]

WEIGHTS = "trained.safetensors"  # of a checkpoint: what is trained, and nothing else
_WORSE = 1.5  # times the held-out divergence at the start: training is lost


class Outcome:
    """How training went: its held-out divergences by step, and why it ended before its time, or None."""

    def __init__(self, start: float) -> None:
        self.divergences: list[tuple[int, float]] = [(0, start)]
        self.stopped: str | None = None
        self.steps = 0
        self.resumed = False
        self.captured = False  # whether its steps were replayed as CUDA graphs
        self.remembered = False  # whether the dense model was asked once, before the first step

    @property
    def best(self) -> float:
        return min((value for _, value in self.divergences if math.isfinite(value)), default=math.inf)


class Lost(Exception):
    """Training has run away; what it made is of no use."""


def tuned_state(tuned: Tuned) -> dict[str, Tensor]:
    """Copies of what is trained, on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in tuned.parameters.items()}


@torch.no_grad()
def load_tuned(tuned: Tuned, state: Mapping[str, Tensor]) -> None:
    """Take back what `tuned_state` gave."""
    for name, parameter in tuned.parameters.items():
        parameter.copy_(state[name].to(parameter.device))


def distiller() -> Any:
    """transformers' Trainer, whose steps are captured where they can be, whose checkpoints hold what is trained alone
    and whose evaluation is the held-out divergence."""
    from transformers import Trainer

    class Distiller(Trainer):
        tuned: Tuned
        judge: Callable[[], float]
        # Of samples and length; called once, when weights and optimizer are where they stay.
        captured: Callable[[int, int], CapturedStep | None]
        step: CapturedStep | None = None
        asked = False

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> Tensor:
            tokens = inputs["input_ids"]
            if not self.asked:
                self.asked, self.step = True, self.captured(*tokens.shape)
            if self.step is None or not self.step.takes(tokens):
                return super().training_step(model, inputs, *rest, **options)
            return self.step(tokens, inputs["index"], 1.0 / self.current_gradient_accumulation_steps)

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            metrics = {"eval_divergence": self.judge()}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            if self.args.should_save:
                folder = Path(output_dir or self.args.output_dir or ".")
                folder.mkdir(parents=True, exist_ok=True)
                save_file(tuned_state(self.tuned), folder / WEIGHTS)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            load_tuned(self.tuned, load_file(Path(resume_from_checkpoint) / WEIGHTS))

        def _load_best_model(self) -> None:
            """Left to `_settle`, which knows the beginning too."""

    return Distiller


def watch() -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self, outcome: Outcome, bar: progress.Bar) -> None:
            self.outcome, self.bar = outcome, bar

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """A run that goes on has a history."""
            self.bar.step(state.global_step)
            for entry in state.log_history:
                if "eval_divergence" in entry:
                    self.outcome.divergences.append((entry["step"], entry["eval_divergence"]))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is not None and not math.isfinite(loss):
                self.outcome.stopped = f"the loss is {loss} at step {state.global_step}"
                raise Lost

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            value = metrics["eval_divergence"]
            self.outcome.divergences.append((state.global_step, value))
            start = self.outcome.divergences[0][1]
            if not value < _WORSE * start:
                self.outcome.stopped = (
                    f"the held-out divergence rose from {start:.3f} to {value:.3f} by step {state.global_step}"
                )
                raise Lost

    return Watch
