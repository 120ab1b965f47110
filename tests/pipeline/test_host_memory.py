"""Memory that is free on the host, under every kind of limit, from a made-up /proc and /sys."""

from __future__ import annotations

import resource

import pytest
import torch

from hywia_kernels.engine import host
from hywia_kernels.engine.host import free_on_host
from hywia_kernels.engine.memory import free_bytes

GB = 1 << 30


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A machine with 64 GB available and no limits."""
    monkeypatch.setattr(host.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    write(
        tmp_path, {"proc/meminfo": f"MemTotal: 100 kB\nMemAvailable:   {64 << 20} kB\n", "proc/self/cgroup": "0::/\n"}
    )
    return tmp_path


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))


def v2(folder, limit, used, **more):
    at = f"sys/fs/cgroup{folder}"
    files = {f"{at}/memory.max": f"{limit}\n", f"{at}/memory.current": f"{used}\n"}
    return files | {f"{at}/memory.{k}": v for k, v in more.items()}


def v1(folder, limit, used, **more):
    at = f"sys/fs/cgroup/memory{folder}"
    files = {f"{at}/memory.limit_in_bytes": f"{limit}\n", f"{at}/memory.usage_in_bytes": f"{used}\n"}
    return files | {f"{at}/memory.{k}": v for k, v in more.items()}


CASES = {
    "no limit": ({}, 64 * GB),
    "v2 in the container's own root": (v2("", 8 * GB, 3 * GB), 5 * GB),
    "v2 without a limit": (v2("", "max", 3 * GB), 64 * GB),
    "v2 larger than what is available": (v2("", 900 * GB, 3 * GB), 64 * GB),
    "v2 nested, the inner is less": (
        {"proc/self/cgroup": "0::/a/b\n"} | v2("/a/b", 4 * GB, GB) | v2("/a", 8 * GB, 2 * GB),
        3 * GB,
    ),
    "v2 nested, the outer is less": (
        {"proc/self/cgroup": "0::/a/b\n"} | v2("/a/b", "max", GB) | v2("/a", 8 * GB, 7 * GB),
        GB,
    ),
    "v2 nested, a folder between has no files": (
        {"proc/self/cgroup": "0::/a/b/c\n", "sys/fs/cgroup/a/b/c/cgroup.procs": ""} | v2("/a", 8 * GB, 7 * GB),
        GB,
    ),
    "v2 with the host's name in a container": (
        {"proc/self/cgroup": "0::/system.slice/docker-1.scope\n"} | v2("", 8 * GB, 3 * GB),
        5 * GB,
    ),
    "v2 outside the namespace": ({"proc/self/cgroup": "0::/../other\n"} | v2("", 8 * GB, 3 * GB), 5 * GB),
    "v2 throttled": (v2("", "max", 3 * GB, high=7 * GB), 4 * GB),
    "v2, pages of files count as free": (
        v2("", 8 * GB, 7 * GB, stat=f"anon 5\ninactive_file {6 * GB}\nactive_file 3\n"),
        7 * GB,
    ),
    "v2 used up": (v2("", 8 * GB, 9 * GB), 0),
    "v2 unreadable": (v2("", "eight", 3 * GB), 64 * GB),
    "v1 in the container's own root": (
        {"proc/self/cgroup": "5:cpu:/\n4:memory:/\n"} | v1("", 8 * GB, 3 * GB),
        5 * GB,
    ),
    "v1 without a limit": (
        {"proc/self/cgroup": "4:memory:/\n"} | v1("", 9223372036854771712, 3 * GB),
        64 * GB,
    ),
    "v1 negative": ({"proc/self/cgroup": "4:memory:/\n"} | v1("", -1, 3 * GB), 64 * GB),
    "v1 nested": (
        {"proc/self/cgroup": "12:pids:/x\n4:cpu,memory:/a/b\n"}
        | v1("/a/b", 9223372036854771712, 2 * GB)
        | v1("/a", 6 * GB, 2 * GB)
        | v1("", 9223372036854771712, 9 * GB),
        4 * GB,
    ),
    "v1 with the host's name in a container": (
        {"proc/self/cgroup": "4:memory:/docker/abc\n0::/docker/abc\n"} | v1("", 8 * GB, 3 * GB),
        5 * GB,
    ),
    "v1, pages of files count as free": (
        {"proc/self/cgroup": "4:memory:/\n"} | v1("", 8 * GB, 7 * GB, stat=f"cache 1\ntotal_inactive_file {GB}\n"),
        2 * GB,
    ),
    "hybrid": (
        {"proc/self/cgroup": "4:memory:/a\n0::/a\n", "sys/fs/cgroup/unified/a/cgroup.procs": ""}
        | v1("/a", 6 * GB, 2 * GB),
        4 * GB,
    ),
    "a name with a colon": ({"proc/self/cgroup": "0::/a:b\n"} | v2("/a:b", 8 * GB, 3 * GB), 5 * GB),
}


@pytest.mark.parametrize("case", CASES)
def test_the_least_of_all_limits(root, case):
    files, want = CASES[case]
    write(root, files)
    assert free_on_host(root) == want


def test_less_is_available_than_the_limits_leave(root):
    write(root, {"proc/meminfo": f"MemAvailable: {2 << 20} kB\n"} | v2("", 8 * GB, 3 * GB))
    assert free_on_host(root) == 2 * GB


def test_limit_of_address_space(root, monkeypatch):
    page = resource.getpagesize()
    monkeypatch.setattr(host.resource, "getrlimit", lambda _: (10 * GB, resource.RLIM_INFINITY))
    write(root, {"proc/self/statm": f"{4 * GB // page} 5 6 7\n"})
    assert free_on_host(root) == 6 * GB
    write(root, {"proc/self/statm": f"{40 * GB // page} 5 6 7\n"})
    assert free_on_host(root) == 0
    (root / "proc/self/statm").unlink()
    assert free_on_host(root) == 10 * GB


def test_no_files_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(host.os, "sysconf", lambda name: {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}[name])
    monkeypatch.setattr(host.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert free_on_host(tmp_path) == 4_096_000


def test_it_is_what_a_pass_may_use(monkeypatch):
    monkeypatch.setattr("hywia_kernels.engine.memory.free_on_host", lambda: 123)
    assert free_bytes(torch.device("cpu")) == 123
    monkeypatch.undo()
    assert 0 < free_bytes(torch.device("cpu")) < 1 << 50
