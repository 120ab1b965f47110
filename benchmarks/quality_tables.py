"""Tables of SmolLM2's quality: other methods and this package, as cut and recovered, on the same samples and texts."""

from __future__ import annotations

from hywia_kernels.settings import BLOCK

from . import tasks
from .document_rows import Line, markdown, sources
from .quality_rows import METHODS, RECOVERIES, SETTINGS, Runs, dense, found, of, present, read_of, text_name

TEXT = "wikitext2_raw_test.txt"
_LONG = 2048  # tokens of a block, beside the usual length
_DEEP = "P50"  # the setting of which the short table shows long blocks, tasks and seconds


def with_error(value: float | None, error: float | None, digits: int = 1) -> str:
    """A figure and its standard error, as far as there are any."""
    if value is None:
        return ""
    told = f"{value:,.{digits if value < 1000 else 0}f}"
    return told if error is None else f"{told} ± {error:,.{digits if value < 1000 else 0}f}"


def _perplexity(runs: Runs, text: str, block: int = BLOCK) -> str:
    return with_error(*(runs.perplexity(text, block) or (None, None)))


def _tasks(runs: Runs) -> str:
    """The mean of the seven tasks with its standard error over questions; rows of earlier runs lack the latter."""
    error = runs.mean("mean_se")
    return "" if error is None else with_error(runs.mean("mean"), error)


def _seconds(runs: Runs, *columns: str) -> float | None:
    spent = [runs.mean(column) for column in columns]
    return sum(s or 0.0 for s in spent) if any(s is not None for s in spent) else None


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def short() -> str:
    """A line for each method and recovery: perplexity on WikiText-2 by setting; of the deepest cut in long blocks
    too, its tasks and its cost.
    Columns without a figure are left out."""
    lines = found()
    used: list[Line] = []
    whole = dense(lines)
    shown = [("dense", "", "", dict.fromkeys(SETTINGS, whole))]
    for method, samples, recovery in present(lines):
        by_setting = {s: of(lines, method, samples, s, recovery) for s in SETTINGS}
        shown.append((METHODS[method], RECOVERIES[recovery], f"{int(samples):,}", by_setting))
    head = ["", "recovery", "samples scored"]
    head += [f"{name} ({told})" for name, (told, _) in SETTINGS.items()]
    head += [f"{_DEEP}, blocks of {_LONG:,}", f"tasks, {_DEEP}", f"seconds, {_DEEP}"]
    table = []
    for name, recovery, samples, by_setting in shown:
        settings = list(by_setting.values())
        used += [row for runs in settings for row in runs.lines]
        deep = by_setting[_DEEP]
        spent = None if name == "dense" else _seconds(deep, "seconds", "text_seconds", "recovery_seconds")
        cells = [_perplexity(runs, TEXT) for runs in settings] + [_perplexity(deep, TEXT, _LONG)]
        table.append([name, recovery, samples, *cells, _tasks(deep), _count(spent)])
    empty = {i for i in range(3, len(head)) if not any(line[i] for line in table[1:])}
    kept = [[cell for i, cell in enumerate(line) if i not in empty] for line in (head, *table)]
    return markdown(kept[0], kept[1:]) + sources(used)


def whole() -> str:
    """A line for each setting, method and recovery, with every text in blocks of every length."""
    lines = found()
    files = list(dict.fromkeys(row["text"] for row in lines))
    texts = sorted({read_of(row) for row in lines}, key=lambda read: (files.index(read[0]), read[1]))
    used: list[Line] = []
    table = []

    def add(name: str, method: str, recovery: str, samples: str, runs: Runs) -> None:
        used.extend(runs.lines)
        removed = runs.mean("removed")
        told = [name, method, recovery, samples]
        told += ["" if method == "dense" or removed is None else f"{100 * removed:.1f} %"]
        told += [_perplexity(runs, *read) for read in texts]
        divergence = runs.mean("divergence")
        told += ["" if divergence is None else f"{divergence:.3f}", _tasks(runs)]
        costs = [] if method == "dense" else [("seconds",), ("text_seconds", "recovery_seconds")]
        table.append([*told, *([_count(_seconds(runs, *c)) for c in costs] or ["", ""]), str(len(runs.seeds))])

    add("", "dense", "", "", dense(lines))
    for setting in SETTINGS:
        for method, samples, recovery in present(lines):
            runs = of(lines, method, samples, setting, recovery)
            if runs.lines:
                add(setting, METHODS[method], RECOVERIES[recovery], f"{int(samples):,}", runs)
    head = ["", "method", "recovery", "samples scored", "parameters less", *(text_name(*read) for read in texts)]
    head += ["divergence", "tasks", "s to cut", "s to recover", "runs"]
    empty = {i for i in range(4, len(head)) if not any(line[i] for line in table)}
    kept = [[cell for i, cell in enumerate(line) if i not in empty] for line in (head, *table)]
    return markdown(kept[0], kept[1:]) + sources(used)


def by_task() -> str:
    """A line for each method and recovery at the deepest cut: the percents of every task that were right, their mean,
    and the mean without BoolQ."""
    lines = found()
    shown = [("dense", "", dense(lines))]
    shown += [
        (METHODS[method], RECOVERIES[recovery], of(lines, method, samples, _DEEP, recovery))
        for method, samples, recovery in present(lines)
    ]
    used: list[Line] = []
    table = []
    for name, recovery, runs in shown:
        percents = [value for task in tasks.NAMES if (value := runs.mean(task)) is not None]
        if len(percents) < len(tasks.NAMES):
            continue
        used += runs.lines
        rest = sum(percents[1:]) / len(percents[1:])
        table.append([name, recovery, *(f"{p:.1f}" for p in percents), _tasks(runs), f"{rest:.1f}"])
    head = ["", "recovery", *(name.replace("_", " ") for name in tasks.NAMES), "mean", f"without {tasks.NAMES[0]}"]
    return markdown(head, table) + sources(used)
