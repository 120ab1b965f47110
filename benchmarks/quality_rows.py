"""Rows of quality.csv as tables and the figure read them: of whole texts, like for like, and averaged over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from hywia_kernels.settings import BLOCK

from . import document_rows
from .document_rows import Line
from .recoveries import LP_OWN, NONE

MODEL = "smollm2"
Read = tuple[str, int]  # a text, and the tokens of the blocks that it was read in
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
# The day from which rows of a criterion are of what it is now: before, the recipe blended by attention and trained no
# layers, so that such rows are history and no others' equals.
_SINCE = {"recipe": "2026-12-01"}
RECOVERIES = {NONE: "none", "self": "this package's", LP_OWN: "LLM-Pruner's own"}
_TEXTS = {"wikitext2_raw_test.txt": "WikiText-2"}


@dataclass
class Runs:
    """The rows of one model, or of one criterion, setting and recovery: the latest of every seed, text and length."""

    by_text: dict[Read, dict[str, Line]] = field(default_factory=dict)  # text and length -> seed -> row

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

    def perplexity(self, text: str, block: int = BLOCK) -> tuple[float, float | None] | None:
        """Geometric mean over the seeds and its standard error (None of a single seed); None where there is no row."""
        logs = [math.log(float(row["perplexity"])) for row in self.by_text.get((text, block), {}).values()]
        if not logs:
            return None
        mean = math.exp(sum(logs) / len(logs))
        return mean, mean * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else None


def read_of(row: Line) -> Read:
    return row["text"], int(row["block"])


def text_name(file: str, block: int = BLOCK) -> str:
    """What a table calls a text, and its blocks where they have not the usual length."""
    name = _TEXTS.get(file, file.rpartition(".")[0].replace("_", " "))
    return name if block == BLOCK else f"{name}, {block:,} tokens"


def _is_comparable(row: Line) -> bool:
    """Of this model, of the setting's own layers."""
    layers = SETTINGS.get(row["setting"], ("", row["layers"]))[1]
    return row["model"] == MODEL and (row["criterion"] == "dense" or row["layers"] == layers)


def found(*, old: bool = False) -> list[Line]:
    """Rows that can stand beside each other, oldest first: of every text and length those that read most of it.

    Args:
        old: those of what a criterion was before are among them.
    """
    lines = [row for row in document_rows.read("quality") if _is_comparable(row)]
    lines = [row for row in lines if old or row["date"] >= _SINCE.get(row["criterion"], "")]
    whole: dict[Read, int] = {}
    for row in lines:
        whole[read_of(row)] = max(whole.get(read_of(row), 0), int(row["blocks"]))
    return [row for row in lines if int(row["blocks"]) == whole[read_of(row)]]


def runs(lines: Iterable[Line], wanted: Callable[[Line], bool]) -> Runs:
    made = Runs()
    for row in lines:
        if wanted(row):
            made.by_text.setdefault(read_of(row), {})[row["seed"]] = row
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
