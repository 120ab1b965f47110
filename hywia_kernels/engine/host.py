"""Memory that a process on this host can still have: the machine's, its control groups' and its own limits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

try:
    import resource
except ImportError:  # no such limits on this system
    resource = None  # type: ignore[assignment]

__all__ = ["free_on_host"]

# Files of a control group of version 2 and of version 1: its limits, what it uses, and the part of that which the
# kernel gives back first (pages of files, such as a checkpoint that was read).
_V2 = (("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def free_on_host(root: str | Path = "/") -> int:
    """Bytes that the process could have without swapping: the smallest of what the kernel calls available, what the
    memory limit of every control group around the process leaves, and what its own limit of address space leaves.

    Args:
        root: where /proc and /sys are.
    """
    root = Path(root)
    return max(0, min([_available(root), *_in_control_groups(root), *_in_address_space(root)]))


def _number(path: Path) -> int | None:
    """The file's number; None where there is no file, or it says that there is no limit ("max")."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _fields(path: Path, separator: str | None = None) -> dict[str, str]:
    """First word -> rest, of each line; empty where the file cannot be read."""
    try:
        pairs = (line.split(separator, 1) for line in path.read_text().splitlines())
        return {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}
    except (OSError, UnicodeDecodeError):
        return {}


def _available(root: Path) -> int:
    try:
        return int(_fields(root / "proc/meminfo", ":")["MemAvailable"].split()[0]) * 1024
    except (KeyError, ValueError, IndexError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _in_control_groups(root: Path) -> Iterator[int]:
    """Bytes that are left of each limit. A limit that is no number, such as "max", does not bind. Version 1 writes a
    number larger than any memory instead, of which more is left than is available."""
    for folder, (limits, usage, reclaimable) in _control_groups(root):
        used = _number(folder / usage)
        if used is None:
            continue
        with contextlib.suppress(ValueError):
            used -= min(used, int(_fields(folder / "memory.stat").get(reclaimable, 0)))
        for name in limits:
            limit = _number(folder / name)
            if limit is not None and limit >= 0:
                yield limit - used


def _control_groups(root: Path) -> Iterator[tuple[Path, tuple[tuple[str, ...], str, str]]]:
    """Folders of the process's groups and of all groups around them, and what their files are called.

    In a container the names in /proc may be the host's while the mount shows the container's own group as its root, so
    folders that do not exist are passed over, and the mount itself is always looked at.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    memory, unified = [PurePosixPath("/")], [PurePosixPath("/")]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        # A group outside the namespace is written as "/../..": what is above the mount cannot be seen.
        inside = PurePosixPath("/", *(p for p in PurePosixPath(path or "/").parts if p not in ("/", "..")))
        if not controllers:
            unified += [inside, *inside.parents]
        elif "memory" in controllers.split(","):
            memory += [inside, *inside.parents]
    mounts = root / "sys/fs/cgroup"
    for names, files, folders in (
        (unified, _V2, (mounts, mounts / "unified")),
        (memory, _V1, (mounts / "memory", mounts)),
    ):
        for mount in folders:
            for inside in dict.fromkeys(names):
                yield mount.joinpath(*inside.parts[1:]), files


def _in_address_space(root: Path) -> Iterator[int]:
    """Bytes that are left of `ulimit -v`."""
    if resource is None:
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or limit < 0:
        return
    try:
        used = int((root / "proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        used = 0
    yield limit - used
