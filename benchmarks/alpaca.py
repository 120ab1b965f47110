"""LLM-Pruner's own recovery (arXiv 2305.11627 and its `post_training.py`), written anew on transformers' Trainer and
PEFT.

Low-rank updates of rank 8 (alpha 16, dropout 0.05) of the seven projections, trained by cross-entropy on Alpaca's
answers: AdamW, learning rate 1e-4 after 100 steps of warm-up and then falling linearly, 64 rows a step, at most 256
tokens a row, two epochs. Some rows are held out; the loss on them is asked every 200 steps, and the checkpoint of the
lowest stays, or the last weights where no step was asked. Products are in bfloat16 on a GPU where the original's are
in float16.
"""

from __future__ import annotations

import json
import random
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RANK, ALPHA, DROPOUT = 8, 16, 0.05
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATE, WARM_UP, BATCH, LONGEST, EPOCHS = 1e-4, 100, 64, 256, 2
EVERY = 200  # steps between two looks at the held-out rows
HELD_OUT = 2000  # rows at most; of a smaller file the same share as of the 51,760 rows that the original reads
_ALL_ROWS = 51_760
_IGNORED = -100  # the label of a token that is not learned
_MICRO = {"cpu": 4, "cuda": 16}  # rows in memory at a time

_TASK = "Below is an instruction that describes a task"
_ANSWER = "Write a response that appropriately completes the request."


@dataclass(frozen=True)
class Tuned:
    """What the recovery did: tokens that were read, padding left out, steps, and the held-out losses asked."""

    tokens: int
    steps: int
    losses: tuple[float, ...]


def read(file: Path) -> list[Mapping[str, str]]:
    """The rows of a JSON file of objects with `instruction`, `input` (which may be empty) and `output`.

    Raises:
        SystemExit: the file is none such, or holds fewer than two rows.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"--alpaca: cannot read {file}: {error}") from None
    fields = ("instruction", "input", "output")
    if not isinstance(rows, list) or len(rows) < 2:
        raise SystemExit(f"--alpaca: expected a list of at least two rows in {file}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in fields):
            raise SystemExit(f"--alpaca: {file}, row {number}: expected texts under {', '.join(fields)}")
    return rows


def prompt(row: Mapping[str, str]) -> str:
    """What stands before a row's answer, in Alpaca's form: an opening, then a headed part each for the instruction, the
    input where there is one, and the answer to come."""
    parts = {"Instruction": row["instruction"]}
    opening = f"{_TASK}. {_ANSWER}"
    if row["input"]:
        opening = f"{_TASK}, paired with an input that provides further context. {_ANSWER}"
        parts["Input"] = row["input"]
    headed = "".join(f"### {head}:\n{text}\n\n" for head, text in parts.items())
    return f"{opening}\n\n{headed}### Response:\n"


def encoded(row: Mapping[str, str], tokenizer: Any) -> dict[str, list[int]]:
    """A row's tokens, cut off at `LONGEST`, with an end-of-text token where there is room; the prompt is not
    learned."""
    ids = list(tokenizer(prompt(row) + row["output"], truncation=True, max_length=LONGEST)["input_ids"])
    end = tokenizer.eos_token_id
    if end is not None and ids[-1] != end and len(ids) < LONGEST:
        ids.append(end)
    before = min(len(tokenizer(prompt(row), truncation=True, max_length=LONGEST)["input_ids"]), len(ids))
    return {"input_ids": ids, "labels": [_IGNORED] * before + ids[before:]}


def collated(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows as one batch, filled up on the right to a multiple of eight; the filling is neither seen nor learned."""
    longest = -(-max(len(row["input_ids"]) for row in rows) // 8) * 8

    def filled(name: str, by: int) -> torch.Tensor:
        return torch.tensor([row[name] + [by] * (longest - len(row[name])) for row in rows])

    seen = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": filled("input_ids", 0),
        "labels": filled("labels", _IGNORED),
        "attention_mask": torch.tensor(seen),
    }


def recover(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, str]], *, seed: int = 0) -> Tuned:
    """Recover a model of LLaMA's kind, in place.

    Args:
        rows: as `read` gives them. seed: of the rows held out, their order and the updates' beginning.

    Raises:
        SystemExit: PEFT is not installed, or the model has none of the seven projections.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise SystemExit("lp-own: needs the package peft: pip install 'hywia_kernels[recover]'") from None
    if not any(name.rpartition(".")[2] in TARGETS for name, _ in model.named_modules()):
        raise SystemExit(f"lp-own: expected a model with some of {', '.join(TARGETS)}")
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    apart = max(1, min(HELD_OUT, round(len(rows) * HELD_OUT / _ALL_ROWS)))
    held_out, train = ([encoded(rows[i], tokenizer) for i in part] for part in (order[:apart], order[apart:]))
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers' models by a name of before 5.x
        adapted = get_peft_model(model, config)
    steps, losses = _train(adapted, train, held_out, seed)
    adapted.merge_and_unload(safe_merge=True)
    model.eval()
    for parameter, flag in wanted:
        parameter.requires_grad_(flag)
    return Tuned(EPOCHS * sum(len(row["input_ids"]) for row in train), steps, losses)


def _train(adapted: Any, train: list[Any], held_out: list[Any], seed: int) -> tuple[int, tuple[float, ...]]:
    """Steps, and held-out losses."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    kind = next(adapted.parameters()).device.type
    micro = min(_MICRO[kind], BATCH)
    with tempfile.TemporaryDirectory(prefix="alpaca-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=micro,
            gradient_accumulation_steps=BATCH // micro,
            learning_rate=RATE,
            warmup_steps=WARM_UP,
            lr_scheduler_type="linear",
            optim="adamw_torch",
            bf16=kind == "cuda",
            use_cpu=kind == "cpu",
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=EVERY,
            save_steps=EVERY,
            save_only_model=True,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            label_names=["labels"],
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
            seed=seed,
            data_seed=seed,
        )
        trainer = Trainer(
            model=adapted, args=arguments, train_dataset=train, eval_dataset=held_out, data_collator=collated
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [float(entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]
        return trainer.state.global_step, tuple(losses)
