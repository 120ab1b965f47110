"""Directories and files that are complete or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import HywiaError, UsageError
from . import disk
from .replaceable import Input, check
from .workspace import Claim, drop_kept, leave, located, settle, take

__all__ = ["begin", "check_target", "claim", "directory", "file", "kept_bytes", "outcome", "write_text"]

_HELD: dict[Path, Claim] = {}
_GUARD = threading.Lock()
_CLAIMED: deque[Claim] = deque(maxlen=16)  # the targets claimed since `begin`, for `outcome`


def begin() -> None:
    """Note that a command begins: `outcome` tells of the targets that are claimed from here on."""
    _CLAIMED.clear()


def outcome() -> str:
    """Which targets claimed since `begin` are on the disk, as a clause of a message."""
    written = [str(c.path) for c in _CLAIMED if c.is_written()]
    if written:
        verb = "is" if len(written) == 1 else "are"
        return f"{' and '.join(written)} {verb} written and complete; what was to come after that was not done"
    kept = [str(c.path) for c in _CLAIMED if os.path.lexists(c.path)]
    return "nothing was written" + (f"; {kept[0]} is as it was before" if kept else "")


@contextmanager
def claim(
    path: str | Path,
    *,
    overwrite: bool = False,
    in_place: bool = False,
    inputs: Sequence[Input] = (),
    need: int = 0,
    a_file: bool = False,
) -> Iterator[Claim]:
    """Hold a target from before the work until it is written, once it is sure that it could be written now.

    Inside the context, `directory` and `file` of the same path write the target. Where neither does, nothing of the
    claim stays on the disk.

    Args:
        path: the target. overwrite, in_place, inputs: as in `replaceable.check`. need: bytes that must be free.
        a_file: the target is one file, which is never replaced.

    Raises:
        UsageError: the target exists and may not be replaced. HywiaError: its parent cannot be written, the disk is too
            full, or another run is writing the target.
    """
    absolute, workspace = located(path)

    def check_now() -> None:
        if a_file and os.path.lexists(absolute):
            raise UsageError(f"output: {absolute} exists; choose another file")
        if not a_file:
            with disk.refusals(f"output: cannot read {absolute}"):
                check(absolute, overwrite=overwrite, in_place=in_place, inputs=inputs)

    check_now()
    made = Claim(absolute, workspace, (os.getpid(), threading.get_ident()))
    with _GUARD:
        held = _HELD.setdefault(workspace, made)
        outer = held is not made
        if outer and held.owner != made.owner:
            raise HywiaError(f"output: another thread is writing {absolute}; wait for it, or choose another name")
    if outer:
        disk.check_free(absolute.parent, need)
        yield held
        return
    try:
        with disk.refusals(f"output: cannot write in {absolute.parent}"):
            take(made)
        check_now()
        disk.check_free(absolute.parent, need)
        _CLAIMED.append(made)
        yield made
    finally:
        try:
            leave(made)
        finally:
            with _GUARD:
                _HELD.pop(workspace, None)


def kept_bytes(path: str | Path) -> int:
    """Bytes on the disk that a stopped run has left of a target."""
    workspace = located(path)[1]
    files = (file for name in ("kept", "new") for file in (workspace / name).rglob("*"))
    return sum(512 * file.lstat().st_blocks for file in files)


def check_target(
    path: str | Path, *, overwrite: bool, in_place: bool = False, inputs: Sequence[Input] = (), need: int = 0
) -> None:
    """Make sure, before any work is done, that `path` could be written; put back what a killed run set aside.

    Args:
        path, overwrite, in_place, inputs, need: as in `claim`.

    Raises:
        UsageError, HywiaError: as `claim`.
    """
    with claim(path, overwrite=overwrite, in_place=in_place, inputs=inputs, need=need):
        pass


@contextmanager
def directory(
    path: str | Path,
    *,
    overwrite: bool = False,
    in_place: bool = False,
    inputs: Sequence[Input] = (),
    need: int = 0,
    goes_on: bool = False,
) -> Iterator[Path]:
    """Yield an empty directory beside `path`. On success it is flushed and takes the place of `path`; on failure it is
    removed, or kept where its progress was (`workspace`), and `path` stays what it was.

    Args:
        path, overwrite, in_place, inputs, need: as in `claim`. goes_on: the directory is the one that was kept.

    Raises:
        UsageError, HywiaError: as `claim`; HywiaError when the disk refuses the write.
    """
    with claim(path, overwrite=overwrite, in_place=in_place, inputs=inputs, need=need) as held, _writing(held):
        if goes_on:
            os.rename(held.kept, held.new)
        else:
            drop_kept(held)
            os.mkdir(held.new)
        _identify(held)
        yield held.new
        disk.sync_tree(held.new)
        check(held.path, overwrite=overwrite, in_place=in_place, inputs=inputs)  # hours may have passed
        _publish(held)


@contextmanager
def file(path: str | Path, *, need: int = 0) -> Iterator[Path]:
    """Yield the name of an empty file beside `path`. On success it is flushed and becomes `path`, which must not exist;
    on failure it is removed.

    Args:
        path: the file. need: bytes that must be free.

    Raises:
        UsageError, HywiaError: as `claim`; HywiaError when the disk refuses the write.
    """
    with claim(path, a_file=True, need=need) as held, _writing(held):
        held.new.touch()
        _identify(held)
        yield held.new
        _identify(held)
        disk.sync_tree(held.new)
        _publish(held)


@contextmanager
def _writing(held: Claim) -> Iterator[None]:
    """Settle the workspace before and after the target is written, and put what the disk refuses into words."""
    message = f"output: could not write {held.path}"
    try:
        with disk.refusals(message):
            settle(held)
            yield
    except HywiaError as error:
        if held.is_written():
            raise HywiaError(
                f"{held.path} is written and complete, but may not outlast a power cut: {error}"
            ) from error
        raise
    finally:
        with suppress(OSError, HywiaError):
            settle(held)


def _identify(held: Claim) -> None:
    """Remember which file or directory is being written, to know it again under its final name."""
    state = os.lstat(held.new)
    held.identity = (state.st_dev, state.st_ino)


def _publish(held: Claim) -> None:
    """Let `new` take the target's place; where that cannot be made to last, put everything back."""
    new, path, parent = held.new, held.path, held.path.parent
    if not os.path.lexists(path):
        disk.rename_new(new, path)
        try:
            disk.sync_directory(parent)
        except OSError:
            os.rename(path, new)
            raise
    elif disk.exchange(new, path):
        try:
            disk.sync_directory(parent)
        except OSError:
            disk.exchange(new, path)
            raise
    else:
        os.rename(path, held.old)
        disk.sync_directory(held.workspace)
        try:
            disk.rename_new(new, path)
            disk.sync_directory(parent)
        except OSError:
            if held.is_written():
                os.rename(path, new)
            disk.rename_new(held.old, path)
            raise


def write_text(path: str | Path, text: str, what: str = "output") -> None:
    """Write a small file in UTF-8; at any moment it is the old one or the new one. Devices and pipes are written to.

    Args:
        path: the file. text: its new content. what: name of the argument, for messages.

    Raises:
        HywiaError: it cannot be written.
    """
    with disk.refusals(f"{what}: cannot write {path}"):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
            return
        beside = target.with_name(f".{target.name}.partial")
        try:
            with open(beside, "w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            if target.exists():
                shutil.copymode(target, beside)
            os.replace(beside, target)
            disk.sync_directory(target.parent)
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
