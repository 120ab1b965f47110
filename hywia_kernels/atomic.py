"""Directories and files that are complete or absent: written beside their place, then renamed into it.

What belongs to a target NAME is beside it in one directory, `.NAME.hywia-partial`: `lock`, held by the run that is
going to write NAME from before its work until its end; `new`, which is being written; `old`, an earlier result that
was set aside; `trash`, which is being deleted. A run that is killed leaves it there, and the next one into NAME puts an
`old` back whose place is empty, and deletes the rest.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from . import disk
from .errors import HywiaError, UsageError
from .replaceable import Input, check

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

__all__ = ["begin", "check_target", "claim", "directory", "file", "outcome", "write_text"]

_MARK = ".hywia-partial"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@dataclass(eq=False)
class _Claim:
    """A target that this process has taken."""

    path: Path
    workspace: Path
    owner: tuple[int, int]  # process and thread
    locked: bool = False
    handle: int = -1  # of the lock; -1 where the filesystem has none
    identity: tuple[int, int] | None = None  # device and inode of what is being written, which renames keep
    parents: list[Path] = field(default_factory=list)  # that did not exist before

    @property
    def new(self) -> Path:
        return self.workspace / "new"

    @property
    def old(self) -> Path:
        return self.workspace / "old"

    def is_written(self) -> bool:
        """Whether what this run wrote is in its place."""
        try:
            state = os.lstat(self.path)
        except OSError:
            return False
        return (state.st_dev, state.st_ino) == self.identity


_HELD: dict[Path, _Claim] = {}
_GUARD = threading.Lock()
_CLAIMED: deque[_Claim] = deque(maxlen=16)  # since `begin`, for `outcome`


def begin() -> None:
    """A command begins: `outcome` tells of what it claims from here on."""
    _CLAIMED.clear()


def outcome() -> str:
    """What is on the disk of the targets claimed since `begin`, as a clause of a message."""
    written = [str(c.path) for c in _CLAIMED if c.is_written()]
    if written:
        verb = "is" if len(written) == 1 else "are"
        return f"{' and '.join(written)} {verb} written and complete; what was to come after that was not done"
    kept = [str(c.path) for c in _CLAIMED if os.path.lexists(c.path)]
    return "nothing was written" + (f"; {kept[0]} is as it was before" if kept else "")


def _located(path: str | Path) -> tuple[Path, Path]:
    """`(absolute path, workspace)`; the same workspace however the path is spelt."""
    absolute = Path(os.path.abspath(path))
    place = Path(os.path.realpath(absolute.parent))
    name = absolute.name if len(os.fsencode(absolute.name)) <= 200 else _short(absolute.name)
    return absolute, place / f".{name}{_MARK}"


def _short(name: str) -> str:
    """File names are 255 bytes at most."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


def _make_parents(claim: _Claim) -> None:
    missing = [p for p in claim.path.parents if not p.exists()]
    for parent in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(parent)
            claim.parents.append(parent)


def _lock(claim: _Claim) -> None:
    """Take the workspace, or say who has it."""
    for _ in range(100):  # another run may remove it between two of these steps
        existed = os.path.lexists(claim.workspace)
        with suppress(FileExistsError):
            os.mkdir(claim.workspace)
        try:
            handle = os.open(claim.workspace / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            writer = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise HywiaError(
                    f"output: another run{f' ({writer})' if writer else ''} is writing {claim.path}; wait for it, or "
                    "choose another name"
                ) from None
            if error.errno not in _NO_LOCKS:
                raise
            if existed:
                raise HywiaError(
                    f"output: {claim.workspace} is there, and this filesystem cannot tell whether the run that made it "
                    f"still writes {claim.path}; if none does, remove it, but keep an 'old' in it: an earlier result"
                ) from None
            claim.locked = True
            return
        if _is_file(handle, claim.workspace / "lock"):
            claim.handle, claim.locked = handle, True
            with suppress(OSError):  # for the message alone
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return
        os.close(handle)
    raise HywiaError(f"output: cannot lock {claim.workspace}: other runs keep making and removing it")


def _is_file(handle: int, path: Path) -> bool:
    """Whether an open file still has its name, which the run that held the lock removes at its end."""
    try:
        named = os.stat(path)
    except OSError:
        return False
    opened = os.fstat(handle)
    return (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino)


def _settle(claim: _Claim) -> None:
    """Put back what was set aside if its place is empty, and delete what is left over.

    Raises:
        HywiaError: something else has taken its place meanwhile, so that neither may be deleted. OSError.
    """
    if os.path.lexists(claim.old):
        if not os.path.lexists(claim.path):
            disk.rename_new(claim.old, claim.path)
            disk.sync_directory(claim.path.parent)
        elif os.path.lexists(claim.new):
            raise HywiaError(
                f"output: {claim.old} is an earlier result, set aside by a run that was stopped, and something else is "
                f"at {claim.path} now; move one of them away"
            )
        else:  # the new one is in its place; what is half deleted must never come back
            disk.remove(claim.workspace / "trash")
            os.rename(claim.old, claim.workspace / "trash")
    disk.remove(claim.new)
    disk.remove(claim.workspace / "trash")


def _settle_earlier_releases(claim: _Claim) -> None:
    """The same for `.NAME.hywia-partial-PROCESS-RANDOM`, which releases before the lock left."""
    for leftover in sorted(claim.path.parent.glob(f".{_escaped(claim.path.name)}{_MARK}-*")):
        process = leftover.name.rpartition("-")[0].rpartition("-")[2]
        if process.isdigit() and os.path.exists("/proc/self") and os.path.exists(f"/proc/{process}"):
            continue  # it may be writing
        old = leftover / "old"
        if os.path.lexists(old) and not os.path.lexists(claim.path):
            disk.rename_new(old, claim.path)
            disk.sync_directory(claim.path.parent)
        disk.remove(leftover)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


@contextmanager
def claim(
    path: str | Path,
    *,
    overwrite: bool = False,
    in_place: bool = False,
    inputs: Sequence[Input] = (),
    need: int = 0,
    a_file: bool = False,
) -> Iterator[_Claim]:
    """Hold a target from before the work until it is written, after everything that can be refused has been.

    Inside it, `directory` and `file` of the same path write the target. Nothing of it stays on the disk otherwise.

    Args:
        path: the target. overwrite, in_place, inputs: as in `replaceable.check`. need: bytes that must be free.
        a_file: the target is one file, which is never replaced.

    Raises:
        UsageError: it exists and may not be replaced. HywiaError: its parent cannot be written, the disk is too full,
            or another run writes it.
    """
    absolute, workspace = _located(path)

    def check_now() -> None:
        if a_file and os.path.lexists(absolute):
            raise UsageError(f"output: {absolute} exists; choose another file")
        if not a_file:
            with disk.refusals(f"output: cannot read {absolute}"):
                check(absolute, overwrite=overwrite, in_place=in_place, inputs=inputs)

    check_now()
    made = _Claim(absolute, workspace, (os.getpid(), threading.get_ident()))
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
            _make_parents(made)
            _lock(made)
            _settle(made)
            _settle_earlier_releases(made)
        check_now()
        disk.check_free(absolute.parent, need)
        _CLAIMED.append(made)
        yield made
    finally:
        _release(made)


def _release(held: _Claim) -> None:
    """Leave nothing but what a later run must put back."""
    try:
        if held.locked:
            with suppress(OSError, HywiaError):
                _settle(held)
            if not os.path.lexists(held.old):
                with suppress(OSError):
                    os.unlink(held.workspace / "lock")
        for folder in (held.workspace, *reversed(held.parents)):
            with suppress(OSError):  # it stays while it holds something, another run's lock for one
                os.rmdir(folder)
    finally:
        with _GUARD:
            _HELD.pop(held.workspace, None)
        if held.handle >= 0:
            os.close(held.handle)


def check_target(
    path: str | Path, *, overwrite: bool, in_place: bool = False, inputs: Sequence[Input] = (), need: int = 0
) -> None:
    """Raise before any work is done when `path` could not be written at the end; puts back what a killed run set aside.

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
) -> Iterator[Path]:
    """Yield an empty directory beside `path`; on success it is flushed and takes the place of `path`, on failure it is
    removed, and `path` is what it was.

    Raises:
        UsageError, HywiaError: as `claim`; HywiaError when the disk refuses the write.
    """
    with claim(path, overwrite=overwrite, in_place=in_place, inputs=inputs, need=need) as held, _writing(held):
        os.mkdir(held.new)
        _identify(held)
        yield held.new
        disk.sync_tree(held.new)
        check(held.path, overwrite=overwrite, in_place=in_place, inputs=inputs)  # hours may have passed
        _publish(held)


@contextmanager
def file(path: str | Path, *, need: int = 0) -> Iterator[Path]:
    """The same for one file, which is never replaced: yields the name to write."""
    with claim(path, a_file=True, need=need) as held, _writing(held):
        held.new.touch()
        _identify(held)
        yield held.new
        _identify(held)
        disk.sync_tree(held.new)
        _publish(held)


@contextmanager
def _writing(held: _Claim) -> Iterator[None]:
    message = f"output: could not write {held.path}"
    try:
        with disk.refusals(message):
            _settle(held)
            yield
    except HywiaError as error:
        if held.is_written():
            raise HywiaError(
                f"{held.path} is written and complete, but may not outlast a power cut: {error}"
            ) from error
        raise
    finally:
        with suppress(OSError, HywiaError):
            _settle(held)


def _identify(held: _Claim) -> None:
    state = os.lstat(held.new)
    held.identity = (state.st_dev, state.st_ino)


def _publish(held: _Claim) -> None:
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
    """Write a small file, UTF-8: it is the old one or the new one at any moment. Devices and pipes are written to.

    Args:
        what: name of the argument, for messages.

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
