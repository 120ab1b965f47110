"""`hywia export`: formats of servers that hold layers of different widths."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoint import atomic_directory, originals
from ..checkpoint.decilm import write_decilm
from ..checkpoint.gguf import write_gguf
from ..checkpoint.replaceable import check_report
from ..errors import UsageError
from . import console, session

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Checks, then the work with the output held."""
    session.begin(arguments)
    gguf = arguments.format == "gguf"
    if gguf != (arguments.vocabulary is not None):
        raise UsageError("vocabulary: goes with --format gguf, which needs it")
    given = originals.inputs(arguments)
    check_report("json", arguments.json, outputs=(Path(arguments.output),), inputs=given)
    with atomic_directory.claim(arguments.output, a_file=gguf):
        model, tokenizer = session.load_model(arguments)
        if gguf:
            path = write_gguf(model, arguments.vocabulary, arguments.output)
        else:
            path = write_decilm(model, tokenizer, arguments.output)
        console.say(f"wrote {path}")
    console.write_json(arguments.json, {"output": str(path), "format": arguments.format})
