"""Rows of tables and data sets, through the `datasets` library. Only data is read: no file of a data set is run."""

from __future__ import annotations

import glob
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import HywiaError

__all__ = ["TABLES", "dataset_texts", "kind_of", "table_texts", "text_of"]

TABLES = (".csv", ".tsv", ".parquet")
_SHOWN = 20  # field names in a message, at most
_MEANINGS = (  # the beginnings of the readers' messages, and what they mean
    ("Length of header or names does not match", "its rows hold more cells than its header names"),
    ("BatchSize must be greater than 0", "it is empty: it has no rows"),
    ("No columns to parse", "it is empty"),
)


def text_of(row: Any, field: str, where: str, row_is: str = "JSON object") -> str:
    """The text that a row holds in a field. `where`: what messages begin with. `row_is`: what they call the row.

    Raises:
        HywiaError: the row has no such field, or what it holds there is no text.
    """
    if not isinstance(row, Mapping):
        raise HywiaError(f"{where}: expected a {row_is} with a {field!r} field, got {kind_of(row)}")
    if field not in row:
        raise HywiaError(
            f"{where}: expected a {row_is} with a {field!r} field, got the fields {_names(row)}; "
            "name the one that holds the text by --text-field"
        )
    text = row[field]
    if not isinstance(text, str):
        raise HywiaError(f"{where}: expected {field!r} to be a string, got {kind_of(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise HywiaError(
            f"{where}: expected text, got half of a surrogate pair (\\u{ord(text[error.start]):04x}) at character "
            f"{error.start + 1} of {field!r}, which no tokenizer takes; repair or remove it"
        ) from None
    return text


def kind_of(value: Any) -> str:
    """The type of a value in words of JSON and Python."""
    missing = value is None or value != value  # a table's missing number is not equal to itself
    return "null" if missing is True else type(value).__name__


def table_texts(path: Path, *, suffix: str, field: str, encoding: str, argument: str) -> list[str]:
    """The texts of a table's column, a row each, in order. Nothing is copied to a cache.

    Args:
        path: an existing local file. suffix: one of TABLES. field: the column. encoding: of CSV and TSV files.
        argument: what messages begin with.

    Raises:
        HywiaError: `datasets` is not installed, the table is damaged, or has no such column (those that it has are
            named), or a cell (named by its row, from 1 behind the header) is no text.
    """
    datasets = _library(f"{argument}: {path} is a table, which needs: pip install 'hywia_kernels[hub]'")
    texts: list[str] = []
    with _reasons(f"{argument}: cannot read {path}"), _silent():
        rows = _table(datasets, path, suffix, encoding)
        columns = rows.column_names
        if columns is not None:  # known without reading a row: the other columns are left unread
            _check_column(columns, field, f"{argument}: {path}")
            rows = rows.select_columns([field])
        for number, row in enumerate(rows, 1):
            if number == 1:
                _check_column(row, field, f"{argument}: {path}")
            texts.append(text_of(row, field, f"{argument}: {path}, row {number}", "row"))
    if not texts:
        raise HywiaError(f"{argument}: cannot read {path}: it is empty: it has no rows")
    return texts


def _table(datasets: Any, path: Path, suffix: str, encoding: str) -> Any:
    options: dict[str, Any] = {"data_files": glob.escape(str(path.resolve())), "split": "train", "streaming": True}
    if suffix == ".parquet":
        return datasets.load_dataset("parquet", **options)
    # Cells such as "NA" or "None" are texts, and a row with a cell too many must not shift the columns.
    options |= {"keep_default_na": False, "index_col": False, "encoding": encoding}
    return datasets.load_dataset("csv", sep="\t" if suffix == ".tsv" else ",", **options)


def _check_column(columns: Any, field: str, where: str) -> None:
    if field not in columns:
        raise HywiaError(
            f"{where}: expected a column {field!r}, got the columns {_names(columns)}; "
            "name the one that holds the text by --text-field"
        )


def _names(names: Any) -> str:
    return ", ".join(repr(name) for name in list(names)[:_SHOWN]) or "none"


def dataset_texts(source: str, *, field: str, argument: str) -> Iterator[str]:
    """The texts of `NAME[:config[:split]]`, a data set of the hub or a directory that `datasets` can read, streamed.

    Raises:
        HywiaError: `datasets` is not installed, the data set cannot be had, or a row holds no text in the field.
    """
    datasets = _library(
        f"{argument}: {source!r} is no .txt or .jsonl file; a dataset needs: pip install 'hywia_kernels[hub]'"
    )
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    with _reasons(f"{argument}: could not read dataset {source!r}"):
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            if field not in row:
                raise HywiaError(f"{argument}: dataset {source!r} has no {field!r} column; it has {sorted(row)}")
            yield text_of(row, field, f"{argument}: dataset {source!r}", "row")


def _library(message: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise HywiaError(message) from None
    return datasets


@contextmanager
def _reasons(message: str) -> Iterator[None]:
    """Turn what the library raises, of many kinds, into `HywiaError`: the message, a colon and the reason."""
    try:
        yield
    except HywiaError:
        raise
    except Exception as error:
        # The library wraps the reader's own error, which says what is wrong with the file.
        cause = error.__cause__ if type(error).__module__.startswith("datasets.") and error.__cause__ else error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        reason = next((meaning for said, meaning in _MEANINGS if reason.startswith(said)), reason)
        raise HywiaError(f"{message}: {reason}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Hold back the library's own log of errors that are reported here, and turn its warning of lost cells into an
    error."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=_MEANINGS[0][0])
            yield
    finally:
        logger.setLevel(level)
