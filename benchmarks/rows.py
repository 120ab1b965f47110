"""Rows of the append-only CSV files: a frozen dataclass names the columns.

New columns go to the end of the dataclass. A file of an earlier version is then widened by hand, in the commit that
adds them: the new header, and empty fields in the rows it has. Reading takes a missing field for an empty one.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any


class Appender:
    """Appends rows; refuses a file with other columns before anything has been measured."""

    def __init__(self, path: Path, row: type):
        self.path = path
        self.columns = [field.name for field in fields(row)]
        if path.exists() and path.stat().st_size:
            with path.open(newline="") as file:
                header = next(csv.reader(file))
            if header != self.columns:
                raise SystemExit(f"--csv: {path} has other columns than this version writes; name another file")
        else:
            with path.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(self.columns)

    def append(self, rows: Sequence[Any]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            for row in rows:
                writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, restval=""))
