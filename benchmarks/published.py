"""What papers report of pruned models: the rows of `published.csv`, none of them measured here.

`removed` is the share of parameters that the source names, `block` the tokens of a block of its perplexities, `tasks`
how many tasks the mean is of (seven: those of `tasks.NAMES`), `macs` of a forward pass over 64 tokens. `read_from` says
where the figures were read: "paper" (its text), "figure" (a table that is a picture in a repository), "abstract",
"digest" (a machine-written summary: to be checked before it is relied on) or "second-hand" (quoted after the source,
which was not read again).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from pathlib import Path

FILE = Path(__file__).with_name("published.csv")
READ_FROM = ("paper", "figure", "abstract", "digest", "second-hand")


@dataclass(frozen=True)
class Published:
    """One row; see the module."""

    method: str
    model: str
    removed: float
    recovery: str
    block: int
    wikitext2: float | None
    ptb: float | None
    boolq: float | None
    piqa: float | None
    hellaswag: float | None
    winogrande: float | None
    arc_easy: float | None
    arc_challenge: float | None
    openbookqa: float | None
    tasks_mean: float | None
    tasks: int | None
    parameters: int | None
    macs: int | None
    memory_bytes: int | None
    latency_s: float | None
    note: str
    source: str
    read_from: str


def read(path: Path = FILE) -> list[Published]:
    """All rows.

    Raises:
        ValueError: a row without a source, or read from somewhere else than `READ_FROM` names.
    """
    found = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            if not row["source"] or row["read_from"] not in READ_FROM:
                raise ValueError(f"{path}, line {number}: expected a source, and read_from out of {READ_FROM}")
            found.append(Published(**{f.name: _value(row[f.name], str(f.type)) for f in fields(Published)}))
    return found


def _value(text: str, kind: str):  # type: ignore[no-untyped-def]
    if kind == "str":
        return text
    if not text:
        return None
    return int(text) if kind.startswith("int") else float(text)


def of_model(name: str, rows: list[Published]) -> list[Published]:
    """The rows of a model by its name or address (`huggyllama/llama-7b`); those of LLaMA-7B where there are none."""
    own = name.rstrip("/").rpartition("/")[2].lower().removesuffix("-hf")
    return [r for r in rows if r.model == own] or [r for r in rows if r.model == "llama-7b"]
