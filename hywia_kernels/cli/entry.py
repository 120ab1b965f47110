"""Runs one command, and turns what ends it into an exit code and a line.

Exit codes: 0 done, 1 failed, 2 wrong use; 128 and the signal's number when one ended it (130 for Ctrl-C, 143 for
SIGTERM), 141 when the reader of the standard output went away.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from ..checkpoint import atomic_directory
from ..errors import HywiaError, UsageError
from . import launched
from .grammar import parser

__all__ = ["main"]

_MODULES = {"eval": "evaluate"}  # command -> module beside this one, where the names differ


class _Ended(BaseException):
    """A signal asked the process to end; what is half written goes first."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _end(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # asking again does not make tidying up faster
    raise _Ended(number)


@contextmanager
def _signals() -> Iterator[None]:
    """Let the signals that end a process do so through the stack, where nothing else was asked for (`nohup`)."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    atomic_directory.begin()
    arguments = None
    with _signals(), launched.first_speaks():
        try:
            with launched.first_speaks(errors=True):
                arguments = parser().parse_args(argv)
            launched.refuse_several(arguments.command)
            arguments.argv = list(sys.argv[1:] if argv is None else argv)  # recorded: how to repeat the run
            module = _MODULES.get(arguments.command, arguments.command)
            importlib.import_module(f".{module}", __package__).run(arguments)
        except UsageError as error:
            return _fail(error, str(error), 2)
        except HywiaError as error:
            return _fail(error, str(error), 1)
        except KeyboardInterrupt as error:
            return _fail(error, f"interrupted; {atomic_directory.outcome()}", 128 + signal.SIGINT)
        except _Ended as ended:
            return _fail(
                ended, f"ended by {signal.Signals(ended.number).name}; {atomic_directory.outcome()}", 128 + ended.number
            )
        except BrokenPipeError as error:
            _give_up_output()
            wrote = getattr(arguments, "output", None) is not None
            return _fail(
                error,
                f"nobody reads the output any more; {atomic_directory.outcome()}" if wrote else None,
                128 + signal.SIGPIPE,
            )
        except OSError as error:
            _give_up_output()
            where = f"{error.filename}: " if error.filename else ""
            return _fail(error, f"{where}{error.strerror or error}; {atomic_directory.outcome()}", 1)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            said = f"out of memory ({_first_line(error)}); {_lever(error)}; {atomic_directory.outcome()}"
            return _fail(error, said, 1)
    return 0


def _fail(error: BaseException, message: str | None, code: int) -> int:
    if message is not None and not launched.is_told(error):
        with suppress(OSError):  # a closed terminal
            print(f"hywia: error: {message}", file=sys.stderr, flush=True)
    return code


def _give_up_output() -> None:
    """What is still buffered would fail again when the process ends."""
    with suppress(OSError, ValueError):  # no file at all, or closed
        sys.stdout.flush()
        return
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU's allocator has no exception of its own.
    return isinstance(error, RuntimeError) and any(w in str(error) for w in ("can't allocate memory", "out of memory"))


_LEVERS = (  # modules in which memory ran out -> what makes their work smaller; the first that the traceback passes
    ("scale.", "try --weights host or files, fewer --samples, a shorter --seq-len, or more processes"),
    ("method.reconstruction", "try fewer --reconstruct-samples, or a shorter --seq-len"),
    ("method.mask_learning", "try a shorter --seq-len, or another --fusion"),
    ("method.head_residual", "try fewer --samples, or a shorter --seq-len"),
    ("evaluation", "try a smaller --block, or --no-eval with 'hywia prune'"),
    ("deploy.speed", "try a smaller --batch, or a shorter --context"),
    ("checkpoint.loading", "try --dtype bfloat16, or a machine with more memory"),
    ("checkpoint.saving", "the model itself barely fits; free memory, or load it with --dtype bfloat16"),
)
_LEVER = "try --memory lean or layerwise, fewer --samples, a shorter --seq-len, or --dtype bfloat16"


def _lever(error: Exception) -> str:
    """The option that makes smaller what ran out of memory."""
    passed, step = set(), error.__traceback__
    while step is not None:
        name = step.tb_frame.f_globals.get("__name__", "")
        if name.startswith("hywia_kernels."):
            passed.add(name.partition(".")[2])
        step = step.tb_next
    return next((lever for module, lever in _LEVERS if any(name.startswith(module) for name in passed)), _LEVER)
