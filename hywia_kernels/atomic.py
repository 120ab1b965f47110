"""Directories that are complete or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import HywiaError, UsageError

__all__ = ["check_target", "directory"]

# A directory that holds one of these is a model or a set of scores, and may be replaced by --overwrite.
_REPLACEABLE = ("config.json", "hywia.json", "scores.json")
_MARK = ".hywia-partial-"


def check_target(path: Path, *, overwrite: bool) -> None:
    """Raise before any work is done when `path` could not be written at the end.

    Raises:
        UsageError: it exists and `overwrite` is not set, or holds something else than a model or scores.
        HywiaError: its parent cannot be written.
    """
    if path.exists() or path.is_symlink():
        if not overwrite:
            raise UsageError(f"output: {path} exists; choose another directory, or pass --overwrite")
        if not path.is_dir() or path.is_symlink():
            raise UsageError(f"output: {path} is not a directory; --overwrite replaces directories only")
        if any(path.iterdir()) and not any((path / name).exists() for name in _REPLACEABLE):
            raise UsageError(f"output: {path} holds neither a model nor scores; --overwrite will not delete it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=f".{path.name}{_MARK}", dir=path.parent)).rmdir()
    except OSError as error:
        raise HywiaError(f"output: cannot write in {path.parent}: {error.strerror or error}") from error


def _sync(root: Path) -> None:
    """Flush a tree to the disk, so that the rename never outruns the data in a power cut; files get the usual mode
    (some writers make theirs private)."""
    for folder, _, files in os.walk(root):
        for name in [*files, "."]:
            if name != ".":
                os.chmod(os.path.join(folder, name), 0o666 & ~_umask())
            handle = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _remove_abandoned(path: Path) -> None:
    """Partial directories of `path` whose writer no longer runs (killed between its first and last byte)."""
    for leftover in path.parent.glob(f".{path.name}{_MARK}*"):
        pid = leftover.name.rpartition("-")[0].rpartition("-")[2]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc").exists():
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `path`; on success it is flushed and renamed to `path`, on failure removed.

    A file named config.json is put in place last, so that a killed run leaves nothing that loads as a model.

    Raises:
        UsageError, HywiaError: as `check_target`; HywiaError when the disk refuses the write.
    """
    path = path.absolute()
    check_target(path, overwrite=overwrite)
    _remove_abandoned(path)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}{_MARK}{os.getpid()}-", dir=path.parent))
    os.chmod(partial, 0o777 & ~_umask())
    try:
        yield partial
        held = partial / "config.json"
        if held.exists():
            held.rename(partial / "config.json.partial")
        _sync(partial)
        if (partial / "config.json.partial").exists():
            (partial / "config.json.partial").rename(held)
        _move_into_place(partial, path)
    except OSError as error:
        raise HywiaError(f"output: could not write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _move_into_place(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    replaced = Path(tempfile.mkdtemp(prefix=f".{path.name}{_MARK}{os.getpid()}-", dir=path.parent))
    path.rename(replaced / "old")
    try:
        partial.rename(path)
    except OSError:
        (replaced / "old").rename(path)
        raise
    finally:
        shutil.rmtree(replaced, ignore_errors=True)
