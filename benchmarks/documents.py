"""Writes the tables of README and docs/ and README's figure from the CSV files: `python -m benchmarks.documents`.

A table stands between two marks, `<!-- table NAME -->` and `<!-- end of table -->`, and is one of
`document_tables.TABLES`. With `--check` nothing is written, and files that are not what the rows say are named. With
`--output FILE` README shows what its first command printed, from a file: the block below `<!-- output: COMMAND -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import document_figure
from .document_tables import TABLES
from .environment import REPOSITORY

_OUTPUT = re.compile(r"(<!-- output: [^\n]+ -->\n```text\n).*?(^```$)", re.DOTALL | re.MULTILINE)
_TABLE = re.compile(r"(<!-- table ([\w -]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def documents() -> list[Path]:
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def names_in(text: str) -> list[str]:
    """Of a document's tables."""
    return [match[1] for match in _TABLE.findall(text)]


def written(text: str) -> str:
    """A document with its tables as the files have them.

    Raises:
        ValueError: a mark without its other half, or a table that there is not.
    """
    if not text.count("<!-- table ") == text.count("<!-- end of table -->") == len(names_in(text)):
        raise ValueError("expected every '<!-- table NAME -->' to be followed by '<!-- end of table -->'")

    def rendered(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"expected one of the tables {', '.join(TABLES)}, got {match[2]!r}")
        return f"{match[1]}{TABLES[match[2]]()}\n{match[4]}"

    return _TABLE.sub(rendered, text)


def with_output(text: str, printed: str) -> str:
    """A document with what its command printed.

    Raises:
        ValueError: there is not one block for it.
    """
    if len(_OUTPUT.findall(text)) != 1:
        raise ValueError("expected one '<!-- output: COMMAND -->' with a block of text below it")
    return _OUTPUT.sub(lambda match: f"{match[1]}{printed.rstrip()}\n{match[2]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--output", type=Path, metavar="FILE", help="what README's first command printed")
    parser.add_argument("files", nargs="*", type=Path, help="default: README.md, docs/*.md and the figure")
    arguments = parser.parse_args(argv)
    if arguments.output is not None:
        readme = REPOSITORY / "README.md"
        printed = arguments.output.read_text(encoding="utf-8")
        readme.write_text(with_output(readme.read_text(encoding="utf-8"), printed), encoding="utf-8")
    old = []
    if not arguments.files and document_figure.write(arguments.check):
        old.append(str(document_figure.PATH))
    for path in arguments.files or documents():
        before = path.read_text(encoding="utf-8")
        after = written(before)
        if after != before:
            old.append(str(path))
            if not arguments.check:
                path.write_text(after, encoding="utf-8")
    for name in old:
        print(f"{name}: {'not what the CSV files say' if arguments.check else 'written'}")
    return 1 if old and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
