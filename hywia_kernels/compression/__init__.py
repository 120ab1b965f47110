"""A model made smaller as a recipe says: the whole job, without printing anything."""

from .checking import check, with_resolved_recovery
from .from_files import compress_files, in_memory_only
from .job import Result, compress
from .measuring import Measured, fitted, measure, with_text

__all__ = [
    "Measured",
    "Result",
    "check",
    "compress",
    "compress_files",
    "fitted",
    "in_memory_only",
    "measure",
    "with_resolved_recovery",
    "with_text",
]
