"""The seven tasks through EleutherAI's lm-eval: as it has them on the hub, or from local files.

Local files, those of `tasks`, are handed over in lm-eval's own format, a config over its JSON loader: its code reads
them, makes the requests, scores and counts. Needs the package lm_eval (measured with 0.4.13).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import tasks


def available() -> bool:
    """Whether lm_eval can be imported."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError:
        return False
    return True


def version() -> str:
    """Of the package lm_eval."""
    from importlib import metadata

    return metadata.version("lm_eval")


def config(file: Path, limit: int | None = None) -> dict[str, Any]:
    """lm-eval's config of a local task.

    A choice's leading space is lm-eval's delimiter, so that lengths are counted without it. A task whose questions have
    a context for each choice is one of several inputs in lm-eval's terms: choices stand in the contexts, and one
    continuation follows them all.

    Raises:
        SystemExit: the file is not a task (see `tasks`), or continuations differ among contexts.
    """
    several = False
    for where, row in tasks.rows(file, limit):
        several = not isinstance(row["context"], str)
        if several and len(set(row["choices"])) != 1:
            raise SystemExit(f"{where}: lm-eval wants one continuation for all contexts, got {row['choices']}")
    if several:
        texts: dict[str, Any] = {"doc_to_text": "gold", "doc_to_choice": "context", "doc_to_target": _continuation}
    else:
        texts = {"doc_to_text": "context", "doc_to_choice": _choices, "doc_to_target": "gold"}
    metrics = ["acc"] if file.stem in tasks.NOT_NORMALISED else ["acc", "acc_norm"]
    return {
        "task": file.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "target_delimiter": " ",
        "num_fewshot": 0,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        **texts,
    }


def _choices(row: dict[str, Any]) -> list[str]:
    return [choice.removeprefix(" ") for choice in row["choices"]]


def _continuation(row: dict[str, Any]) -> str:
    return row["choices"][0].removeprefix(" ")


def evaluate(
    model: Any, tokenizer: Any, folder: Path | None = None, *, limit: int | None = None, batch: int = 16
) -> dict[str, float]:
    """The `tasks.figures` of a model in memory by lm-eval: acc_norm, or acc where a task has none.

    Args:
        folder: of local tasks; None: those that lm-eval fetches from the hub. limit: questions of each. batch:
            requests at a time.

    Raises:
        SystemExit: lm_eval is not installed, or as `config`.
    """
    if not available():
        raise SystemExit("lm-eval: needs the package lm_eval: pip install lm_eval")
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    wanted: list[Any] = list(tasks.NAMES)
    options: dict[str, Any] = {}
    if folder is not None:
        wanted = [ConfigurableTask(config=config(file, limit)) for file in tasks.files(folder)]
        options["task_manager"] = TaskManager(include_defaults=False)  # which else reads thousands of configs
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    told = lm_eval.simple_evaluate(model=wrapped, tasks=wanted, limit=limit, log_samples=False, **options)
    assert told is not None
    names = [name for name in tasks.NAMES if name in told["results"]]
    percent = {name: 100.0 * told["results"][name][_measure(name)] for name in names}
    return tasks.figures(percent, {name: told["n-samples"][name]["effective"] for name in names})


def _measure(name: str) -> str:
    return "acc,none" if name in tasks.NOT_NORMALISED else "acc_norm,none"
