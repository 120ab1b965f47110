"""`hywia`: the command line. Parses, runs one command, and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

from .entry import main
from .grammar import parser

__all__ = ["main", "parser"]
