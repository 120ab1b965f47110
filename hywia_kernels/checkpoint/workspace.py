"""The workspace of a target while it is written: a locked directory beside it, and what a killed run left there.

For a target NAME it is `.NAME.hywia-partial`: `lock`, held by the run that is going to write NAME from before its work
until its end; `new`, which is being written; `old`, an earlier result that was set aside; `trash`, which is being
deleted. A run that is killed leaves it there, and the next one into NAME puts an `old` back whose place is empty, and
deletes the rest. But a `new` of which a `progress-INODE` says what it holds is `kept`, for a run that goes on with it;
one that does not deletes both.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import HywiaError
from . import disk

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

__all__ = ["STATE", "Claim", "drop_kept", "leave", "located", "progress_of", "settle", "take"]

STATE = "state.json"  # without which a `progress` says nothing

_MARK = ".hywia-partial"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@dataclass(eq=False)
class Claim:
    """A target that this process has taken."""

    path: Path
    workspace: Path
    owner: tuple[int, int]  # process and thread
    locked: bool = False
    handle: int = -1  # the lock's file descriptor; -1 where the filesystem has no locks
    identity: tuple[int, int] | None = None  # device and inode of what is being written, which renames keep
    parents: list[Path] = field(default_factory=list)  # directories made for the target, the outermost first

    @property
    def new(self) -> Path:
        return self.workspace / "new"

    @property
    def old(self) -> Path:
        return self.workspace / "old"

    @property
    def kept(self) -> Path:
        return self.workspace / "kept"

    def is_written(self) -> bool:
        """Whether what this run wrote is in its place."""
        try:
            state = os.lstat(self.path)
        except OSError:
            return False
        return (state.st_dev, state.st_ino) == self.identity


def located(path: str | Path) -> tuple[Path, Path]:
    """`(absolute path, workspace)`; the same workspace however the path is spelt."""
    absolute = Path(os.path.abspath(path))
    place = Path(os.path.realpath(absolute.parent))
    name = absolute.name if len(os.fsencode(absolute.name)) <= 200 else _short(absolute.name)
    return absolute, place / f".{name}{_MARK}"


def _short(name: str) -> str:
    """A stand-in for a long name, as file names have 255 bytes at most."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


def _make_parents(claim: Claim) -> None:
    missing = [p for p in claim.path.parents if not p.exists()]
    for parent in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(parent)
            claim.parents.append(parent)


def _lock(claim: Claim) -> None:
    """Take the workspace.

    Raises:
        HywiaError: another run has it; the message says which.
    """
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


def settle(claim: Claim) -> None:
    """Put back an earlier result that was set aside if its place is empty, and delete the rest of the workspace.

    Raises:
        HywiaError: something else has taken its place meanwhile, so that neither may be deleted.
        OSError: the filesystem refuses.
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
    _keep(claim)
    disk.remove(claim.workspace / "trash")


def progress_of(claim: Claim, folder: Path) -> Path:
    """Where it says what a directory of the workspace holds already. An inode keeps its number when it is renamed, so
    another directory is never taken for it.

    Raises:
        OSError: there is no such directory.
    """
    return claim.workspace / f"progress-{os.lstat(folder).st_ino}"


def _is_begun(claim: Claim, folder: Path) -> bool:
    return os.path.lexists(folder) and os.path.lexists(progress_of(claim, folder) / STATE)


def _keep(claim: Claim) -> None:
    """Keep what a later run can go on with, and delete everything else that is not finished."""
    if _is_begun(claim, claim.new) and not os.path.lexists(claim.kept):
        os.rename(claim.new, claim.kept)
    disk.remove(claim.new)
    stays = progress_of(claim, claim.kept) if _is_begun(claim, claim.kept) else None
    if stays is None and os.path.lexists(claim.kept):
        disk.remove(claim.kept)
    for folder in claim.workspace.glob("progress-*"):
        if folder != stays:
            disk.remove(folder)


def drop_kept(claim: Claim) -> None:
    """Delete what a later run could have gone on with."""
    if os.path.lexists(claim.kept):
        disk.remove(progress_of(claim, claim.kept))
        disk.remove(claim.kept)


def _settle_earlier_releases(claim: Claim) -> None:
    """Settle the directories `.NAME.hywia-partial-PROCESS-RANDOM` that killed runs of releases without a lock left."""
    for stale in sorted(claim.path.parent.glob(f".{_escaped(claim.path.name)}{_MARK}-*")):
        process = stale.name.rpartition("-")[0].rpartition("-")[2]
        if process.isdigit() and os.path.exists("/proc/self") and os.path.exists(f"/proc/{process}"):
            continue  # it may be writing
        old = stale / "old"
        if os.path.lexists(old) and not os.path.lexists(claim.path):
            disk.rename_new(old, claim.path)
            disk.sync_directory(claim.path.parent)
        disk.remove(stale)


def _escaped(name: str) -> str:
    """A name as a glob pattern that matches it alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def take(claim: Claim) -> None:
    """Make the workspace of a target and lock it; put back what a killed run set aside.

    Raises:
        HywiaError: another run has it. OSError: it cannot be made.
    """
    _make_parents(claim)
    _lock(claim)
    settle(claim)
    _settle_earlier_releases(claim)


def leave(held: Claim) -> None:
    """Give the target up, and leave nothing of its workspace but what a later run must put back."""
    try:
        if held.locked:
            with suppress(OSError, HywiaError):
                settle(held)
            if not os.path.lexists(held.old):
                with suppress(OSError):
                    os.unlink(held.workspace / "lock")
        for folder in (held.workspace, *reversed(held.parents)):
            with suppress(OSError):  # it stays while it holds something, another run's lock for one
                os.rmdir(folder)
    finally:
        if held.handle >= 0:
            os.close(held.handle)
