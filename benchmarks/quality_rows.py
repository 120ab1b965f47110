"""Rows of quality.csv as tables and the figure read them: of whole texts, like for like, and averaged over seeds."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from . import document_rows
from .document_rows import Line
from .recoveries import LP_OWN, NONE

MODEL, BLOCK = "smollm2", 128
# Setting -> what it takes away, and the layers that it takes it from.
SETTINGS = {
    "P30": ("30 % of all", "all"),
    "P50": ("50 % of all", "all"),
    "A50": ("half of the channels", "4:28"),
    "B60": ("60 % of channels, a third of heads", "4:28"),
}
# Criterion -> its name; each with the number of samples that it usually scores.
METHODS = {
    "lp:param_second": "LLM-Pruner",
    "flap": "FLAP",
    "wanda-sp": "Wanda-sp",
    "recipe": "**this package**",
}
RECOVERIES = {NONE: "none", "self": "this package's", LP_OWN: "LLM-Pruner's own"}
_TEXTS = {"wikitext2_raw_test.txt": "WikiText-2"}


@dataclass
class Runs:
    """The rows of one model, or of one criterion, setting and recovery: the latest of every seed and text."""

    by_text: dict[str, dict[str, Line]] = field(default_factory=dict)  # text -> seed -> row

    @property
    def lines(self) -> list[Line]:
        return [row for seeds in self.by_text.values() for row in seeds.values()]

    @property
    def seeds(self) -> list[Line]:
        """One row a seed, the latest of any text: for figures that do not depend on it."""
        return list({row["seed"]: row for row in sorted(self.lines, key=lambda row: row["date"])}.values())

    def mean(self, column: str) -> float | None:
        values = [float(row[column]) for row in self.seeds if row[column]]
        return sum(values) / len(values) if values else None

    def perplexity(self, text: str) -> tuple[float, float | None] | None:
        """Geometric mean over the seeds and its standard error (None of a single seed); None where there is no row."""
        logs = [math.log(float(row["perplexity"])) for row in self.by_text.get(text, {}).values()]
        if not logs:
            return None
        mean = math.exp(sum(logs) / len(logs))
        return mean, mean * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else None


def text_name(file: str) -> str:
    return _TEXTS.get(file, file.rpartition(".")[0].replace("_", " "))


def _is_comparable(row: Line) -> bool:
    """Of this model, in blocks of the usual length, of the setting's own layers."""
    block = re.search(r"--block[ =](\d+)", row["command"])
    layers = SETTINGS.get(row["setting"], ("", row["layers"]))[1]
    same = row["model"] == MODEL and (block is None or int(block[1]) == BLOCK)
    return same and (row["criterion"] == "dense" or row["layers"] == layers)


def found() -> list[Line]:
    """Rows that can stand beside each other, oldest first: of every text those that read most of it."""
    lines = [row for row in document_rows.read("quality") if _is_comparable(row)]
    whole: dict[str, int] = {}
    for row in lines:
        whole[row["text"]] = max(whole.get(row["text"], 0), int(row["blocks"]))
    return [row for row in lines if int(row["blocks"]) == whole[row["text"]]]


def runs(lines: Iterable[Line], wanted: Callable[[Line], bool]) -> Runs:
    made = Runs()
    for row in lines:
        if wanted(row):
            made.by_text.setdefault(row["text"], {})[row["seed"]] = row
    return made


def dense(lines: Sequence[Line]) -> Runs:
    return runs(lines, lambda row: row["criterion"] == "dense")


def of(lines: Sequence[Line], method: str, samples: str, setting: str, recovery: str) -> Runs:
    """The rows of a criterion that scored so many samples."""
    wanted = (method, samples, setting, recovery)
    return runs(
        lines, lambda row: wanted == (row["criterion"], row["samples"], row["setting"], row["recovery"] or NONE)
    )


def samples_of(lines: Sequence[Line], method: str, recovery: str) -> list[str]:
    """Numbers of samples that a criterion scored in any of the settings, in the order of their latest rows."""
    counts = [
        row["samples"]
        for row in lines
        if row["setting"] in SETTINGS and (row["criterion"], row["recovery"] or NONE) == (method, recovery)
    ]
    return list(dict.fromkeys(reversed(counts)))[::-1]


def present(lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    """The methods, their numbers of samples, and recoveries that any setting has, without recovery first."""
    return [
        (method, samples, recovery)
        for recovery in RECOVERIES
        for method in METHODS
        for samples in sorted(samples_of(lines, method, recovery), key=int)
    ]
