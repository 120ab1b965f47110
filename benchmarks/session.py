"""One run of a benchmark: the arguments that all runners share, its rows as they come, and what failed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from . import models
from .environment import Environment
from .rows import Appender, Columns, Row
from .timing import Timer


def make_parser(module: str, doc: str) -> argparse.ArgumentParser:
    """A parser for `python -m module` that shows the module's documentation as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def at_least(least: int) -> Callable[[str], int]:
    """A type for arguments: an integer that is at least `least`."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return number


def common_arguments(
    parser: argparse.ArgumentParser,
    runs: int | None = None,
    model: Sequence[str] = (),
    seed: bool = True,
    csv: bool = True,
) -> None:
    """Add what all runners take: the device, the seed and where rows go.

    Args:
        runs: default of `--runs`; None leaves the argument out.
        model: the shapes among which `--shape` chooses, for runners that build a whole model; () leaves `--shape`,
            `--layers` and `--dtype` out.
        seed, csv: False leaves `--seed`, or `--csv` and `--json`, out.
    """
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    if model:
        parser.add_argument("--shape", choices=tuple(model), help="default: 7b on a GPU, a small one on a CPU")
        parser.add_argument("--layers", type=at_least(1), metavar="N", help="the first N decoder layers only")
        add_dtype(parser)
    if runs is not None:
        parser.add_argument("--runs", type=at_least(2), default=runs, help="readings per figure; default: %(default)s")
    if seed:
        parser.add_argument("--seed", type=int, help="of weights and inputs; default: a fresh one, which is recorded")
    if csv:
        parser.add_argument("--csv", type=Path, metavar="FILE", help="append a row per figure")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and figures")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=tuple(models.DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str], small: str = "tiny") -> argparse.Namespace:
    """The arguments with the defaults that depend on the device filled in: `small` is the shape on a CPU."""
    given = parser.parse_args(argv)
    cuda = (given.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device: no GPU is visible to torch")
    given.device = torch.device("cuda" if cuda else "cpu")
    if getattr(given, "seed", None) is None:
        given.seed = torch.seed() % 2**32
    if "shape" in given:
        given.shape = given.shape or ("7b" if cuda else small)
    if "dtype" in given:
        given.dtype = given.dtype or ("bfloat16" if cuda else "float32")
    return given


class Session:
    """One run: it prints the environment at its beginning, writes rows to `--csv` as they come and all of them to
    `--json` at the end, and prints failures at once and again at the end.

    Args:
        arguments: as `parse` gives them.
        module, argv: the command, for the record.
        columns: of the figures.
        timer: measures the device's ceilings; None leaves them out.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        module: str,
        argv: Sequence[str],
        columns: Columns,
        timer: Timer | None = None,
    ):
        self.table = Appender(arguments.csv, columns) if arguments.csv else None
        self.json: Path | None = arguments.json
        torch.manual_seed(arguments.seed)
        self.environment = Environment.record(arguments.device, module, argv, arguments.seed, timer)
        self.rows: list[Row] = []
        self.failures: list[str] = []
        print("\n".join(f"{name}: {value}" for name, value in asdict(self.environment).items()), flush=True)

    def add(self, seed: int | None = None, **figures: Any) -> Row:
        """Keep and write a row; `seed` is its own, where that is not the run's."""
        row = Row(self.environment if seed is None else replace(self.environment, seed=seed), figures)
        self.rows.append(row)
        if self.table is not None:
            self.table.append([row])
        return row

    def fail(self, message: str) -> None:
        self.failures.append(message)
        print(message, flush=True)

    def finish(self) -> int:
        """Write `--json` and say what failed; the exit code: 0, or 1 where anything did."""
        if self.json is not None:
            figures = [row.values() for row in self.rows]
            record = {"environment": asdict(self.environment), "figures": figures, "failures": self.failures}
            self.json.write_text(json.dumps(record, indent=1) + "\n")
        if self.failures:
            print(f"\n{len(self.failures)} failed:", *self.failures, sep="\n")
        return 1 if self.failures else 0


def argv_of(arguments: Sequence[str] | None) -> list[str]:
    """What `main` was called with: the process's own arguments where it was given none."""
    return list(sys.argv[1:] if arguments is None else arguments)
