"""Rows of the append-only CSV files: one class for all, and the columns of each file.

Every file begins with the columns of `Environment`, the same in all; a benchmark names the figures that follow, with
their types. New columns go to the end of either. A file of an earlier version is then widened by a script, in the
commit that adds them, with empty fields in the rows that it has. Reading takes a missing field for an empty one.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .environment import Environment

# Column -> its type; the value may always be None, which is written as an empty field.
Columns = Mapping[str, type]

ENVIRONMENT: Columns = {f.name: {"str": str, "int": int}.get(str(f.type), float) for f in fields(Environment)}


@dataclass(frozen=True)
class Row:
    """One row of any of the files: where its figures come from, and the figures by column.

    Figures and what the environment records read as attributes.
    """

    environment: Environment
    figures: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name not in ("environment", "figures"):  # which a copy that is not filled yet lacks
            for values in (self.figures, vars(self.environment)):
                if name in values:
                    return values[name]
        raise AttributeError(f"the row has no column {name!r}")

    def values(self) -> dict[str, Any]:
        """Column -> value, the environment's first."""
        return {**asdict(self.environment), **self.figures}


class Appender:
    """Appends rows; refuses a file with other columns before anything has been measured."""

    def __init__(self, path: Path, columns: Columns):
        self.path = path
        self.columns = [*ENVIRONMENT, *columns]
        if path.exists() and path.stat().st_size:
            with path.open(newline="") as file:
                header = next(csv.reader(file))
            if header != self.columns:
                raise SystemExit(f"--csv: {path} has other columns than this version writes; name another file")
        else:
            with path.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(self.columns)

    def append(self, rows: Sequence[Row]) -> None:
        """Write the rows at the end of the file.

        Raises:
            ValueError: a row has figures that are none of the file's columns.
        """
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            for row in rows:
                writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.values().items()})


def read(path: Path) -> list[dict[str, str]]:
    """The fields of every row as they are written."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file, restval=""))


def read_rows(path: Path, columns: Columns) -> list[Row]:
    """The rows with their values; an empty field of a number is None."""

    def values(row: dict[str, str], types: Columns) -> dict[str, Any]:
        texts = {name: row.get(name, "") for name in types}
        return {n: types[n](text) if text or types[n] is str else None for n, text in texts.items()}

    return [Row(Environment(**values(row, ENVIRONMENT)), values(row, columns)) for row in read(path)]
