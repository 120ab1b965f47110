"""What is asked of the operating system: flushing, renames that exchange, free space; and its refusals in words."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import HywiaError

__all__ = ["check_free", "exchange", "refusals", "remove", "rename_new", "sync_directory", "sync_file", "sync_tree"]

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # of linux/fs.h
_UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Whether it was done; False where the kernel, the C library or the filesystem has no such rename."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flag)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNABLE:
        return False
    raise OSError(code, os.strerror(code), str(target))


def exchange(one: Path, other: Path) -> bool:
    """Let two names of one filesystem change places in one step; False where that cannot be done, and nothing was."""
    return _renameat2(one, other, _EXCHANGE)


def rename_new(source: Path, target: Path) -> None:
    """Rename to a name that nothing has.

    Raises:
        OSError: as os.rename; FileExistsError when something appeared there.
    """
    if not _renameat2(source, target, _NOREPLACE):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(source, target)


def sync_directory(folder: Path) -> None:
    """Flush a directory's names. Some network filesystems refuse that, and keep the names in order without it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
    finally:
        os.close(handle)


def sync_tree(root: Path) -> None:
    """Flush a file or a tree, so that in a power cut the rename never outruns the data. Files of a tree get the mode
    that the process's umask gives, read off the directory, since some writers make theirs private."""
    if not root.is_dir():
        sync_file(root)
        return
    mode = stat.S_IMODE(root.stat().st_mode) & 0o666
    for folder, _, files in os.walk(root):
        for name in files:
            os.chmod(os.path.join(folder, name), mode)
            sync_file(Path(folder, name))
        sync_directory(Path(folder))


def sync_file(path: Path) -> None:
    """Have what was written to a file reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file or a tree as far as that succeeds; the next run deletes the rest. The file without which a model or
    scores cannot be loaded goes first, since a directory that is half deleted must not load."""
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return
    for name in ("config.json", "scores.json"):
        with suppress(OSError):
            (path / name).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def check_free(folder: Path, need: int) -> None:
    """Make sure that a filesystem has room.

    Args:
        folder: a directory on the filesystem. need: bytes that must be free.

    Raises:
        HywiaError: fewer are free there.
    """
    try:
        state = os.statvfs(folder)
    except OSError:
        return
    free = state.f_frsize * (state.f_bfree if os.geteuid() == 0 else state.f_bavail)
    if state.f_blocks and free < need:  # some network filesystems count nothing at all
        raise HywiaError(
            f"output: expected {need / 1e6:,.1f} MB of free space in {folder}, got {free / 1e6:,.1f} MB; make room, or "
            "write to another disk"
        )


@contextmanager
def refusals(message: str) -> Iterator[None]:
    """Turn what the operating system refuses into `HywiaError`: the message, a colon and the reason. Libraries written
    in Rust (safetensors, tokenizers) raise exceptions of their own for it, which end in `(os error 28)`.

    Raises:
        HywiaError: instead of OSError and the like.
    """
    try:
        yield
    except BrokenPipeError:  # of the standard output, not of a disk
        raise
    except OSError as error:
        raise HywiaError(f"{message}: {error.strerror or error}") from error
    except HywiaError:
        raise
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        if told is None:
            raise
        raise HywiaError(f"{message}: {os.strerror(int(told.group(1)))}") from error
