"""The command line's grammar: which commands there are, and what each takes."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator
from typing import NoReturn

from .. import __version__, settings
from ..deploy import device_profiles, serving_rules
from . import arguments as shared

__all__ = ["parser"]


class _Parser(argparse.ArgumentParser):
    """Says which option may have been meant."""

    def error(self, message: str) -> NoReturn:
        options = [o for action in self._every_action() for o in action.option_strings]
        for word in message.split():
            name = word.partition("=")[0]
            if "unrecognized arguments" in message and name.startswith("--"):
                near = difflib.get_close_matches(name, options, 1)
                if near:
                    message += f"; did you mean {near[0]}?"
                    break
        super().error(message)

    def _every_action(self) -> Iterator[argparse.Action]:
        for action in self._actions:
            yield action
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from command._actions


def parser() -> argparse.ArgumentParser:
    """The parser of `hywia`; each command's name is its module's beside this one."""
    root = _Parser(prog="hywia", description="Structured pruning of language models by HyWIA.")
    root.add_argument("--version", action="version", version=f"hywia_kernels {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _score(commands.add_parser("score", help="measure a model once; keep statistics, scores and text"))
    _prune(commands.add_parser("prune", help="write a smaller model"))
    _recover(commands.add_parser("recover", help="train a pruned model towards the dense one's predictions"))
    _evaluate(commands.add_parser("eval", help="perplexity, size and speed"))
    _bench(commands.add_parser("bench", help="prefill and decoding speed, memory and cache of models"))
    _export(commands.add_parser("export", help="for servers whose formats hold layers that differ in width"))
    _report(commands.add_parser("report", help="a pruning run's record as one HTML page"))
    info = commands.add_parser("info", help="versions, devices, and which backends are on and why others are off")
    info.add_argument("--json", metavar="FILE", help="write the report to FILE for machines")
    return root


def _score(command: argparse.ArgumentParser) -> None:
    shared.add_model(command)
    shared.add_output(command)
    shared.add_scoring(command, learned=False)
    shared.add_streaming(command)
    shared.add_calibration(command)
    shared.add_reconstruction(command, samples_only=True)


def _prune(command: argparse.ArgumentParser) -> None:
    shared.add_model(command)
    shared.add_output(command, required=False)
    command.add_argument("--in-place", action="store_true", help="let DIR be the model itself, which is replaced")
    shared.add_cut(command, device_profiles.NAMES, serving_rules.DEFAULT)
    source = command.add_argument_group("where the recipe comes from")
    source.add_argument(
        "--recipe", metavar="FILE", help="repeat this recipe: a JSON file, or the hywia.json of a pruned model"
    )
    source.add_argument("--scores", metavar="DIR", help="use what 'hywia score' wrote instead of scoring again")
    source.add_argument(
        "--cut",
        choices=settings.CUTS,
        default="auto",
        help="with --scores: carry the plan out in memory, or from file to file; default: files where the model does "
        "not fit in memory",
    )
    source.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and what it takes; write nothing"
    )
    shared.add_scoring(command, learned=True)
    shared.add_streaming(command)
    shared.add_calibration(command)
    shared.add_reconstruction(command)
    shared.add_recovery(command, optional=True)
    _evaluation_beside(command)


def _evaluation_beside(command: argparse.ArgumentParser) -> None:
    shared.add_evaluation(command, 40)
    command.add_argument("--no-eval", action="store_true", help="do not evaluate before and after")
    command.add_argument("--prompt", help="show both models' continuation of this text")


def _recover(command: argparse.ArgumentParser) -> None:
    shared.add_model(command)
    command.add_argument("--teacher", metavar="MODEL", help="the dense model; default: what the record says was cut")
    command.add_argument("-o", "--output", metavar="DIR", help="directory to write; default: MODEL itself is replaced")
    command.add_argument("--overwrite", action="store_true", help="replace DIR when it holds a model")
    command.add_argument("--text-field", metavar="NAME", default="text", help="that holds the text; default: text")
    shared.add_recovery(command, optional=False)
    _evaluation_beside(command)


def _evaluate(command: argparse.ArgumentParser) -> None:
    shared.add_model(command)
    shared.add_evaluation(command, None)
    command.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin every block with the beginning-of-text token; default: where the tokenizer puts one itself",
    )
    command.add_argument("--text-field", metavar="NAME", default="text", help="that holds the text; default: text")


def _bench(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "models", nargs="+", metavar="MODEL", help="as for the other commands; others are held against the first"
    )
    shared.add_loading(command)
    command.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sequences at once; default: 1 8")
    command.add_argument("--context", type=int, nargs="+", default=[128, 512], help="tokens; default: 128 512")
    command.add_argument(
        "--modes", nargs="+", default=["eager", "static"], help="eager, captured, static; default: eager static"
    )
    command.add_argument("--runs", type=int, default=10, help="readings per figure; default: 10")
    command.add_argument("--plot", metavar="FILE", help="write the figures as SVG")
    command.add_argument("--record", action="store_true", help="keep the figures in each directory's hywia.json")


def _export(command: argparse.ArgumentParser) -> None:
    shared.add_model(command)
    command.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="file (gguf) or directory (decilm) to write"
    )
    command.add_argument("--format", choices=("gguf", "decilm"), default="gguf", help="llama.cpp's, or vLLM's blocks")
    command.add_argument("--vocabulary", metavar="GGUF", help="of the model before pruning: its tokenizer, for gguf")


def _report(command: argparse.ArgumentParser) -> None:
    command.add_argument("output", metavar="OUT", help="directory that 'hywia prune' wrote")
    command.add_argument("-o", "--html", metavar="FILE", help="default: OUT.html beside it")
