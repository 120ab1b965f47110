"""The training loop: transformers' Trainer over a cut model and what it should predict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ... import progress
from ...engine.passes import put_back
from ...errors import HywiaError
from ..distillation import distillation_loss
from .teacher import Teacher
from .text import Text
from .tuning import Tuned

__all__ = ["Distilled", "Outcome", "divergence", "trained"]

_WEIGHTS = "trained.safetensors"  # of a checkpoint: what is trained, and nothing else
_WORSE = 1.5  # times the held-out divergence at the start: training is lost
_JUDGED_TOKENS = 4096  # at a time


class _Samples(Dataset):
    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[index], "index": index}


class Distilled(nn.Module):
    """A cut model with what it should predict: its forward gives the loss, so that wrappers see every gradient."""

    def __init__(self, student: Any, tuned: Tuned, teacher: Teacher, hard: float, *, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast  # products in bfloat16
        self.student = student
        self.own = nn.ParameterList(tuned.own.values())  # those inside the student too, which counts each once
        self.hard = hard
        self._teacher = (teacher,)  # in a tuple: no module of this one

    def train(self, mode: bool = True) -> Distilled:
        """Always as if evaluated: dropout would only blur what is compared."""
        return super().train(False)

    def forward(self, input_ids: Tensor, index: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(input_ids, index, self.hard, held_out=False)}

    def loss(self, tokens: Tensor, index: Tensor, hard: float, *, held_out: bool) -> Tensor:
        """Mean over all positions but the last, which has no next token."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            hidden = self.student.get_decoder()(tokens, use_cache=False).last_hidden_state[:, :-1]
            hidden = hidden.reshape(-1, hidden.shape[-1])
            targets = self._teacher[0].targets(tokens, index, held_out=held_out)
            weight = torch.full((len(hidden),), 1.0 / len(hidden), dtype=torch.float32, device=hidden.device)
            labels = tokens[:, 1:].reshape(-1) if hard else None
            return distillation_loss(self.student, hidden, targets, weight, labels=labels, hard=hard)


@torch.no_grad()
def divergence(distilled: Distilled, held_out: Tensor, device: torch.device) -> float:
    """Mean KL divergence in nats of the cut model's next-token distributions from the dense model's, on held-out
    samples."""
    step = max(1, _JUDGED_TOKENS // held_out.shape[1])
    total = 0.0
    for start in range(0, len(held_out), step):
        batch = held_out[start : start + step]
        index = torch.arange(start, start + len(batch))
        total += len(batch) * float(distilled.loss(batch.to(device), index, 0.0, held_out=True))
    return total / len(held_out)


class Outcome:
    """How training went: its held-out divergences by step, and why it ended before its time, or None."""

    def __init__(self, start: float) -> None:
        self.divergences: list[tuple[int, float]] = [(0, start)]
        self.stopped: str | None = None
        self.steps = 0
        self.resumed = False

    @property
    def best(self) -> float:
        return min((value for _, value in self.divergences if math.isfinite(value)), default=math.inf)


def trained(
    distilled: Distilled,
    tuned: Tuned,
    text: Text,
    *,
    work: Path,
    start: float,
    steps: int,
    batch: int,
    micro: int,
    rate: float,
    checks: int,
    patience: int,
    seed: int,
    device: torch.device,
) -> Outcome:
    """Train, and leave the weights of the lowest held-out divergence, those of the start included.

    Args:
        work: folder of the checkpoints; training goes on from the last one that is there. start: held-out divergence
            before. batch: samples a step, of which `micro` are in memory at a time.

    Raises:
        HywiaError: the package accelerate is not installed. After this, and after any other error or interrupt, the
            weights are those of the beginning.
    """
    try:
        import accelerate  # noqa: F401  # what transformers' Trainer stands on
    except ImportError:
        raise HywiaError("recover: needs the package accelerate: pip install 'hywia_kernels[recover]'") from None
    from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments

    outcome = Outcome(start)
    every = max(1, steps // checks)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=max(1, batch // micro),
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, max(1, steps // 10)),
        weight_decay=0.0,
        max_grad_norm=1.0,
        use_cpu=device.type == "cpu",
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_divergence",
        greater_is_better=False,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_drop_last=len(text.train) >= micro,
        dataloader_pin_memory=device.type == "cuda",
        label_names=[],
        seed=seed,
        data_seed=seed,
    )
    begun = tuned_state(tuned)
    settled = False

    def take_back() -> None:
        if not settled:
            load_tuned(tuned, begun)

    with put_back(take_back), progress.Bar("recovering", steps) as bar:
        trainer = _trainer_class()(
            model=distilled,
            args=arguments,
            train_dataset=_Samples(text.train),
            eval_dataset=_Samples(text.held_out),
            callbacks=[EarlyStoppingCallback(patience), _watch_class()(outcome, bar)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.tuned = tuned
        trainer.judge = lambda: divergence(distilled, text.held_out, device)
        last = _last_checkpoint(work)
        outcome.resumed = last is not None
        with suppress(_Lost):
            trainer.train(resume_from_checkpoint=last)
        outcome.steps = trainer.state.global_step
        _settle(trainer, tuned, begun, outcome)
        settled = True
    return outcome


class _Lost(Exception):
    """Training has run away; what it made is of no use."""


def _settle(trainer: Any, tuned: Tuned, begun: Mapping[str, Tensor], outcome: Outcome) -> None:
    """The weights of the best check, or those of the beginning where no check was better."""
    best, where = trainer.state.best_metric, trainer.state.best_model_checkpoint
    if best is not None and where and math.isfinite(best) and best < outcome.divergences[0][1]:
        load_tuned(tuned, load_file(Path(where) / _WEIGHTS))
    else:
        load_tuned(tuned, begun)


def tuned_state(tuned: Tuned) -> dict[str, Tensor]:
    """Copies of what is trained, on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in tuned.parameters.items()}


@torch.no_grad()
def load_tuned(tuned: Tuned, state: Mapping[str, Tensor]) -> None:
    """Take back what `tuned_state` gave."""
    for name, parameter in tuned.parameters.items():
        parameter.copy_(state[name].to(parameter.device))


def _last_checkpoint(work: Path) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(str(work)) if work.is_dir() else None


def _trainer_class() -> Any:
    """transformers' Trainer, whose checkpoints hold what is trained alone and whose evaluation is the held-out
    divergence."""
    from transformers import Trainer

    class Distiller(Trainer):
        tuned: Tuned
        judge: Callable[[], float]

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            metrics = {"eval_divergence": self.judge()}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            if self.args.should_save:
                folder = Path(output_dir or self.args.output_dir)
                folder.mkdir(parents=True, exist_ok=True)
                save_file(tuned_state(self.tuned), folder / _WEIGHTS)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            load_tuned(self.tuned, load_file(Path(resume_from_checkpoint) / _WEIGHTS))

        def _load_best_model(self) -> None:
            """Left to `_settle`, which knows the beginning too."""

    return Distiller


def _watch_class() -> Any:
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
                raise _Lost

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            value = metrics["eval_divergence"]
            self.outcome.divergences.append((state.global_step, value))
            start = self.outcome.divergences[0][1]
            if not value < _WORSE * start:
                self.outcome.stopped = (
                    f"the held-out divergence rose from {start:.3f} to {value:.3f} by step {state.global_step}"
                )
                raise _Lost

    return Watch
