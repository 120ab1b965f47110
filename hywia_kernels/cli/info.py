"""`hywia info`: versions, devices and backends."""

from __future__ import annotations

import argparse

from ..checkpoint.replaceable import check_report
from . import console

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Prints and writes the environment."""
    check_report("json", arguments.json)
    environment = console.environment()
    console.print_environment(environment)
    console.write_json(arguments.json, environment)
