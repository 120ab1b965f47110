"""Texts as they lie on the disk: plain text, JSON lines, JSON, tables, directories of these, data sets."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import HywiaError, UsageError
from .rows import TABLES, dataset_texts, table_texts, text_of

__all__ = ["BUNDLED", "bundled_text", "documents", "file_documents", "is_local", "json_lines"]

BUNDLED = "Alice's Adventures in Wonderland, chapters I to VI"

_TEXT, _LINES, _JSON = (".txt",), (".jsonl", ".ndjson"), (".json",)
_READ = _TEXT + _LINES + _JSON + TABLES
_OTHERS = (".arrow", ".xlsx", ".orc", ".xml", ".zip", ".tar", ".tgz", ".xz", ".zst", ".bz2", ".7z", ".pdf")
# Longer marks first: UTF-32's begins as UTF-16's does.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SPACE = " \t\r\n"  # what JSON calls white space
_DIGITS = 4000  # Python refuses to convert longer integers, which JSON allows


def bundled_text() -> str:
    """The default text of evaluations, the same wherever the package is the same: a public-domain novel's beginning."""
    return (Path(__file__).parent / "data" / "alice.txt").read_text(encoding="utf-8")


def documents(source: str, *, field: str = "text", argument: str = "calib") -> list[str] | Any:
    """The texts of a source: a list for files and directories of such files, an iterator for data sets.

    Args:
        source: `.txt` (one text), `.jsonl` (an object a line), `.json` (such a list, or lines), `.csv` and `.tsv` (with
            a header), these with `.gz`, `.parquet`, a directory of such files and no others, or
            `NAME[:config[:split]]` of a data set. Tables and data sets need the package `datasets`.
        field: the field of an object, or the column of a table, that holds the text.
        argument: what messages begin with.

    Raises:
        HywiaError: a missing, unreadable or empty file, one that is no text, a line or row without text in the field
            (by its number), a table without the column, or a data set that cannot be had. UsageError: an empty name.
    """
    if not source:
        raise UsageError(f"{argument}: expected a file, a directory or a data set, got an empty name")
    path = Path(source)
    if is_local(source):
        if path.is_dir():
            files = _texts_of(path)
            return [text for file in files for text in file_documents(file, field=field, argument=argument)]
        return file_documents(path, field=field, argument=argument)
    return dataset_texts(source, field=field, argument=argument)


def is_local(source: str) -> bool:
    """Whether `documents` reads the source itself."""
    path = Path(source)
    return path.is_file() or _suffix(path) in _READ or bool(_texts_of(path))


def _suffix(path: Path) -> str:
    """The suffix in lower case, `.gz` left out."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _texts_of(path: Path) -> list[Path]:
    """The files of a directory, sorted by name, if each of them can be read here; else none."""
    if not path.is_dir():
        return []
    files = sorted(f for f in path.iterdir() if not f.name.startswith("."))
    return files if all(f.is_file() and _suffix(f) in _READ for f in files) else []


def file_documents(path: Path, *, field: str = "text", argument: str = "calib") -> list[str]:
    """The texts of one file; a file of another suffix is JSON lines where its first line is an object, else one text.

    Raises:
        HywiaError: as for `documents`.
    """
    suffix = _suffix(path)
    if suffix in _OTHERS:
        raise HywiaError(
            f"{argument}: expected a .txt, .jsonl, .json, .csv, .tsv or .parquet file, got {path}; write what it holds "
            "as one of these first"
        )
    if suffix in TABLES:
        return _table_documents(path, suffix, field, argument)
    if suffix in _JSON:
        return _json_documents(path, field, argument)
    if suffix in _LINES or (suffix not in _TEXT and _begins_with_an_object(path, argument)):
        return _line_documents(path, field, argument)
    text = _whole(path, argument)
    if not text.strip():
        raise HywiaError(f"{argument}: {path} is empty")
    return [text]


def json_lines(path: Path, argument: str = "calib") -> Iterator[tuple[int, Any]]:
    """`(line number, value)` of every line that is not blank. Lines end at `\\n` (or `\\r\\n`) alone: JSON strings may
    hold the other characters that end lines elsewhere. The file is not held as a whole.

    Raises:
        HywiaError: the file cannot be read, or a line (named) is not JSON or not UTF-8 (nor UTF-16 with a byte order
            mark).
    """
    for number, line in _lines(path, argument):
        line = line.lstrip("\ufeff").strip(_SPACE)
        if line:
            try:
                yield number, _parsed(line)
            except ValueError as error:
                shown = line if len(line) <= 60 else line[:60] + "..."
                raise HywiaError(
                    f"{argument}: {path}, line {number}: expected a JSON object, got {shown!r}, "
                    f"which is not JSON ({error}); a line holds one object, with nothing after it"
                ) from None


def _parsed(content: str) -> Any:
    """The JSON value of a string; raises ValueError where it has none."""
    try:
        return json.loads(content, parse_int=lambda digits: int(digits) if len(digits) < _DIGITS else float(digits))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _line_documents(path: Path, field: str, argument: str) -> list[str]:
    rows = [text_of(row, field, f"{argument}: {path}, line {number}") for number, row in json_lines(path, argument)]
    if not rows:
        raise HywiaError(f"{argument}: {path} is empty")
    return rows


def _json_documents(path: Path, field: str, argument: str) -> list[str]:
    content = _whole(path, argument)
    if not content.strip():
        raise HywiaError(f"{argument}: {path} is empty")
    try:
        value = _parsed(content)
    except ValueError as error:
        if "Extra data" in str(error):  # several values: JSON lines under another suffix
            return _line_documents(path, field, argument)
        raise HywiaError(
            f"{argument}: {path}, line {getattr(error, 'lineno', 1)}: expected JSON, got something else ({error})"
        ) from None
    if isinstance(value, dict) and isinstance(value.get(field), list):
        value = value[field]
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise HywiaError(f"{argument}: {path} is empty")
    where = f"{argument}: {path}, entry "
    return [
        text_of({field: entry} if isinstance(entry, str) else entry, field, where + str(i))
        for i, entry in enumerate(entries, 1)
    ]


def _table_documents(path: Path, suffix: str, field: str, argument: str) -> list[str]:
    with _opened(path, argument) as (file, encoding):  # a file that cannot be opened gets the same message as others
        if not file.read(1):
            raise HywiaError(f"{argument}: {path} is empty")
    # pandas reads the mark again, which only the codec without a byte order in its name ("utf-16") skips.
    encoding = encoding if encoding == "utf-8" else encoding[:6]
    return table_texts(path, suffix=suffix, field=field, encoding=encoding, argument=argument)


@contextmanager
def _opened(path: Path, argument: str) -> Iterator[tuple[BinaryIO, str]]:
    """Open a file; give it positioned behind its byte order mark, and its encoding."""
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            stream = io.BufferedReader(file)  # type: ignore[type-var]
            begin = stream.peek(4)[:4]
            mark, encoding = next((m for m in _MARKS if begin.startswith(m[0])), (b"", "utf-8"))
            stream.read(len(mark))
            yield stream, encoding  # type: ignore[misc]
    except FileNotFoundError:
        raise HywiaError(f"{argument}: no such file: {path}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise HywiaError(
            f"{argument}: cannot read {path}: {getattr(error, 'strerror', None) or str(error) or 'it ends early'}"
        ) from error


def _no_text(path: Path, line: int, error: Exception | str, argument: str) -> HywiaError:
    reason = error if isinstance(error, str) else f"{getattr(error, 'reason', error)}"
    return HywiaError(
        f"{argument}: cannot read {path} as UTF-8 text (or UTF-16 with a byte order mark): line {line}: {reason}"
    )


def _lines(path: Path, argument: str) -> Iterator[tuple[int, str]]:
    """`(number, line)`, split at `\\n` alone."""
    with _opened(path, argument) as (file, encoding):
        number = 0
        try:
            if encoding == "utf-8":
                for number, raw in enumerate(file, 1):
                    yield number, raw.decode("utf-8")
            else:
                wide = io.TextIOWrapper(file, encoding, newline="\n")
                for number, line in enumerate(wide, 1):
                    yield number, line
        except UnicodeDecodeError as error:
            # Wide characters are decoded some thousand bytes ahead, so their fault lies at this line or behind it.
            raise _no_text(path, number + (encoding != "utf-8"), error, argument) from None


def _whole(path: Path, argument: str) -> str:
    """The text of a file, its lines ending in `\\n`."""
    with _opened(path, argument) as (file, encoding):
        content = file.read()
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].decode(encoding, errors="ignore").count("\n") + 1
        raise _no_text(path, line, error, argument) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise _no_text(path, line, "it holds NUL characters, as binary files and UTF-16 without a mark do", argument)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _begins_with_an_object(path: Path, argument: str) -> bool:
    try:
        return isinstance(next(json_lines(path, argument), (0, None))[1], dict)
    except HywiaError:
        return False
