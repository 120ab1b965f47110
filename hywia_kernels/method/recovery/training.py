"""The training loop: transformers' Trainer over a cut model and what it should predict."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from ... import progress
from ...engine.passes import put_back
from ...errors import HywiaError
from ...settings import ByDevice
from .distilled import Distilled, divergence
from .hooks import WEIGHTS, Lost, Outcome, distiller, load_tuned, tuned_state, watch
from .stepping import captured_step, compiled, uncompiled
from .text import Text
from .tuning import Tuned

__all__ = ["trained"]

# Steps between two looks at the loss, for each of which the host waits for the device.
_LOGGED = ByDevice(cpu=1, gpu=16)


class _Samples(Dataset):
    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[index], "index": index}


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
        work: folder of the checkpoints; training goes on from the last one that is there. Of several ranks the first
            one's counts. start: held-out divergence
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

    if device.type == "cuda" and device.index not in (None, 0) and not _ranks() > 1:
        raise HywiaError(
            f"recover: expected the model on the first GPU that the process sees, got it on {device}; set "
            f"CUDA_VISIBLE_DEVICES={device.index}"
        )
    outcome = Outcome(start)
    every = max(1, steps // checks)
    micro = max(1, min(micro, batch // _ranks()))
    arguments = TrainingArguments(
        output_dir=str(_shared(work)),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=max(1, batch // (micro * _ranks())),
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
        logging_steps=_LOGGED.on(device.type),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_drop_last=len(text.train) >= micro,
        dataloader_pin_memory=device.type == "cuda",
        # The host prepares the next step while the device is at this one.
        accelerator_config={"non_blocking": device.type == "cuda"},
        label_names=[],
        seed=seed,
        data_seed=seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs of one process would copy the model at every step
    begun = tuned_state(tuned)
    settled = False

    def take_back() -> None:
        if not settled:
            load_tuned(tuned, begun)

    with (
        put_back(take_back),
        _generators_kept(),
        compiled(distilled, steps * batch * text.train.shape[1]),
        progress.Bar("recovering", steps) as bar,
    ):
        trainer = distiller()(
            model=distilled,
            args=arguments,
            train_dataset=_Samples(text.train),
            eval_dataset=_Samples(text.held_out),
            callbacks=[EarlyStoppingCallback(patience), watch()(outcome, bar)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.tuned = tuned
        trainer.judge = lambda: _judged(distilled, text, device)
        trainer.captured = lambda samples, length: captured_step(distilled, samples, length) if _ranks() == 1 else None
        last = _last_checkpoint(Path(str(arguments.output_dir)))
        outcome.resumed = last is not None
        with suppress(Lost):
            trainer.train(resume_from_checkpoint=last)
        outcome.steps, outcome.captured = trainer.state.global_step, trainer.step is not None
        _settle(trainer, tuned, begun, outcome)
        settled = True
    if _ranks() > 1:
        torch.distributed.barrier()  # the first one removes its folder, from which all have read
    return outcome


def _judged(distilled: Distilled, text: Text, device: torch.device) -> float:
    with uncompiled():
        return divergence(distilled, text.held_out, device)


def _settle(trainer: Any, tuned: Tuned, begun: Mapping[str, Tensor], outcome: Outcome) -> None:
    """The weights of the best check, or those of the beginning where no check was better."""
    best, where = trainer.state.best_metric, trainer.state.best_model_checkpoint
    if best is not None and where and math.isfinite(best) and best < outcome.divergences[0][1]:
        load_tuned(tuned, load_file(Path(where) / WEIGHTS))
    else:
        load_tuned(tuned, begun)


def _last_checkpoint(work: Path) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(str(work)) if work.is_dir() else None


def _ranks() -> int:
    """Processes that train together, by torchrun or accelerate."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _shared(work: Path) -> Path:
    """The first rank's folder: it alone writes checkpoints, and all read the best one."""
    if _ranks() == 1:
        return work
    folder = [str(work)]
    torch.distributed.broadcast_object_list(folder, src=0)
    return Path(folder[0])


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Trainer seeds every generator of the process; the caller's states are put back."""
    states = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
