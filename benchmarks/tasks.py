"""The seven zero-shot tasks of the LLM-Pruner and HyWIA papers, from files; `lm_eval_tasks` has them through lm-eval.

Each task is a file `NAME.jsonl` with an object a line: `context` (a string, or a list of one per choice), `choices`
(each begins with a space) and `gold` (the index of the right choice). A choice's score is the log-likelihood of its
tokens after the context, divided by its number of characters (the leading space not counted) where the task's usual
measure is acc_norm. The context begins with what the tokenizer puts before a text by itself, as lm-eval's does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hywia_kernels import progress
from hywia_kernels.method.reading import json_lines
from hywia_kernels.method.tokens import encode, prefix

NAMES = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
NOT_NORMALISED = ("boolq", "winogrande")
# Columns of rows, as two stretches, since the second came later: percents and their mean; standard errors.
PERCENTS = dict.fromkeys((*NAMES, "mean"), float)
ERRORS = dict.fromkeys((f"{name}_se" for name in PERCENTS), float)


@dataclass(frozen=True)
class Choice:
    """One choice of one question: its tokens with the context's before them."""

    question: int
    tokens: list[int]
    scored: int  # how many tokens at the end are the choice's
    characters: int


@dataclass(frozen=True)
class Task:
    name: str
    choices: list[Choice]
    gold: list[int]


def files(folder: Path) -> list[Path]:
    """The files of the tasks that a directory holds.

    Raises:
        SystemExit: it holds none.
    """
    found = [folder / f"{name}.jsonl" for name in NAMES if (folder / f"{name}.jsonl").is_file()]
    if not found:
        raise SystemExit(f"--tasks: {folder} holds none of {', '.join(f'{n}.jsonl' for n in NAMES)}")
    return found


def rows(file: Path, limit: int | None = None) -> list[tuple[str, Mapping[str, Any]]]:
    """The first `limit` questions of a file, each with what messages call it.

    Raises:
        SystemExit: the file is not as described above, or holds no question.
    """
    numbered = itertools.islice(json_lines(file, "--tasks"), limit)
    found = [(f"--tasks: {file}, line {number}", row) for number, row in numbered]
    for where, row in found:
        _check(row, where)
    if not found:
        raise SystemExit(f"--tasks: {file} holds no question")
    return found


def read(folder: Path, tokenizer: Any, limit: int | None = None) -> list[Task]:
    """The tasks of a directory, with at most `limit` questions of each.

    Raises:
        SystemExit: as `files` and `rows`.
    """
    return [_task(file, tokenizer, limit) for file in files(folder)]


def _task(file: Path, tokenizer: Any, limit: int | None) -> Task:
    begin = prefix(tokenizer)
    choices, gold = [], []
    for question, (where, row) in enumerate(rows(file, limit)):
        gold.append(row["gold"])
        for i, text in enumerate(row["choices"]):
            context = row["context"] if isinstance(row["context"], str) else row["context"][i]
            before = len(encode(tokenizer, context, where))
            tokens = encode(tokenizer, context + text, where)
            choices.append(Choice(question, [*begin, *tokens], max(1, len(tokens) - before), len(text) - 1))
    return Task(file.stem, choices, gold)


def _check(row: Any, where: str) -> None:
    if not isinstance(row, dict) or not {"context", "choices", "gold"} <= row.keys():
        raise SystemExit(f"{where}: expected an object with 'context', 'choices' and 'gold'")
    context, choices, gold = row["context"], row["choices"], row["gold"]
    texts = isinstance(choices, list) and bool(choices) and all(isinstance(c, str) and len(c) > 1 for c in choices)
    contexts = isinstance(context, str) or (
        isinstance(context, list) and len(context) == len(choices) and all(isinstance(c, str) for c in context)
    )
    if not texts or not contexts:
        raise SystemExit(f"{where}: expected 'choices' to be texts, and 'context' to be one, or one for each choice")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise SystemExit(f"{where}: expected 'gold' to be the index of a choice, got {gold!r}")


@torch.no_grad()
def likelihoods(model: Any, choices: list[Choice], batch_tokens: int = 16384) -> Tensor:
    """Log-likelihood of every choice's own tokens, float64 `[choices]`; logits are computed at those positions
    alone."""
    device, head = model.get_input_embeddings().weight.device, model.get_output_embeddings()
    order = sorted(range(len(choices)), key=lambda i: (-len(choices[i].tokens), i))
    result = torch.zeros(len(choices), dtype=torch.float64)
    at = 0
    while at < len(order):
        longest = len(choices[order[at]].tokens)
        part = order[at : at + max(1, batch_tokens // longest)]
        at += len(part)
        tokens = torch.zeros(len(part), longest, dtype=torch.int64)
        scored = torch.zeros(len(part), longest, dtype=torch.bool)  # positions that predict a token of the choice
        for row, i in enumerate(part):
            ids = choices[i].tokens
            tokens[row, : len(ids)] = torch.tensor(ids)
            scored[row, len(ids) - choices[i].scored - 1 : len(ids) - 1] = True
        hidden = model.get_decoder()(tokens.to(device), use_cache=False).last_hidden_state[scored.to(device)]
        following = tokens.roll(-1, 1)[scored].to(device)
        losses = [
            functional.cross_entropy(head(h).float(), t, reduction="none")
            for h, t in zip(hidden.split(4096), following.split(4096), strict=True)
        ]
        rows = scored.nonzero()[:, 0]
        result[torch.tensor(part)] = torch.zeros(len(part), dtype=torch.float64).index_add_(
            0, rows, -torch.cat(losses).double().cpu()
        )
    return result


def accuracy(task: Task, scores: Tensor) -> float:
    """Percent of questions whose best choice is the right one; among equal scores the first choice counts as the
    best."""
    best: dict[int, tuple[float, int]] = {}
    counts: dict[int, int] = {}  # of the question's choices so far
    for choice, score in zip(task.choices, scores.tolist(), strict=True):
        index = counts.get(choice.question, 0)
        counts[choice.question] = index + 1
        value = score if task.name in NOT_NORMALISED else score / choice.characters
        if choice.question not in best or value > best[choice.question][0]:
            best[choice.question] = (value, index)
    right = sum(best[question][1] == gold for question, gold in enumerate(task.gold))
    return 100.0 * right / len(task.gold)


def evaluate(model: Any, tasks: list[Task], batch_tokens: int = 16384) -> dict[str, float]:
    """The `figures` of a model."""
    percent = {
        task.name: accuracy(task, likelihoods(model, task.choices, batch_tokens))
        for task in progress.track(tasks, "tasks")
    }
    return figures(percent, {task.name: len(task.gold) for task in tasks})


def figures(percent: Mapping[str, float], questions: Mapping[str, int]) -> dict[str, float]:
    """Columns of a row: task -> percent of questions answered rightly, their `mean`, and with `_se` behind the name
    each one's standard error over questions, `sqrt(p (1 - p) / (n - 1))`; left out where a task has one question."""
    mean = sum(percent.values()) / len(percent)
    if min(questions.values()) < 2:
        return {**percent, "mean": mean}
    errors = {name: math.sqrt(p * (100.0 - p) / (questions[name] - 1)) for name, p in percent.items()}
    overall = math.sqrt(sum(error * error for error in errors.values())) / len(errors)
    return {**percent, "mean": mean, **{f"{name}_se": error for name, error in errors.items()}, "mean_se": overall}
