"""`hywia report`: a pruning run's record as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoint import atomic_directory, saving
from ..checkpoint.replaceable import Input, check_report
from . import console, html_report

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Writes the page."""
    folder = Path(arguments.output)
    target = Path(arguments.html) if arguments.html else folder.absolute().with_name(folder.absolute().name + ".html")
    check_report("html", target, inputs=(Input("model", folder),))
    atomic_directory.write_text(target, html_report.page(saving.read_record(folder), folder.absolute().name), "html")
    console.say(f"wrote {target}")
