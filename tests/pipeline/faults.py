"""Faults at the k-th call into the operating system: an error, or the end of the process, always at the same place."""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from transformers import PreTrainedTokenizerFast

from hywia_kernels.checkpoint import disk

KILLED = 77  # exit code of a process that `kill` ended
_OF_OS = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "chmod", "statvfs", "pwrite", "ftruncate")


class Faults:
    """Counts calls, and lets the one at `at` go wrong."""

    def __init__(self, at: int, kind: str) -> None:
        self.at, self.kind, self.calls, self.hit = at, kind, 0, ""

    def wrapped(self, name, function, partly=None):
        """`partly(*args)` does a part of the work first."""

        def call(*args, **kwargs):
            self.calls += 1
            if self.calls != self.at:
                return function(*args, **kwargs)
            self.hit = name
            if partly is not None:
                partly(*args, **kwargs)
            if self.kind == "kill":
                os._exit(KILLED)
            if self.kind == "interrupt":
                raise KeyboardInterrupt
            code = getattr(errno, self.kind)
            if name == "serialize_file":  # as safetensors does
                reason = f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"
                raise safetensors.SafetensorError(reason)
            raise OSError(code, os.strerror(code), str(args[0]) if args else None)

        return call


def _half(tensors, path, *args, **kwargs):
    """What a full disk leaves of a file of weights."""
    _serialize(tensors, path, *args, **kwargs)
    size = os.path.getsize(path)
    os.truncate(path, size // 2)


_serialize = safetensors.torch.serialize_file


@contextmanager
def faults(at: int, kind: str):
    """Inside, the call number `at` fails: with an errno's name, "interrupt", or "kill"."""
    counter, before = Faults(at, kind), []

    def patch(owner, name, partly=None):
        original = getattr(owner, name)
        before.append((owner, name, original))
        setattr(owner, name, counter.wrapped(name, original, partly))

    plain_open = builtins.open
    before.extend([(builtins, "open", plain_open), (io, "open", plain_open)])
    counting = counter.wrapped("open for writing", plain_open)

    def opened(file, mode="r", *args, **kwargs):
        return (counting if set(mode) & set("wxa") else plain_open)(file, mode, *args, **kwargs)

    for name in _OF_OS:
        patch(os, name)
    patch(disk, "_renameat2")
    patch(safetensors.torch, "serialize_file", _half)
    patch(PreTrainedTokenizerFast, "_save_pretrained")
    builtins.open = io.open = opened
    try:
        yield counter
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def killed_at(at: int, work) -> bool:
    """Whether `work()` came so far: it runs in a process of its own, which ends there without another step."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(60)
            with faults(at, "kill"):
                work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), f"step {at}: the process ended with {code}"
    return code == KILLED


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
