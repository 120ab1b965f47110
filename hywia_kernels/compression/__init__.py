"""A model made smaller as a recipe says: the whole job, without printing anything."""

from .checking import check, with_resolved_recovery
from .job import Result, compress
from .measuring import Measured, measure, with_text

__all__ = ["Measured", "Result", "check", "compress", "measure", "with_resolved_recovery", "with_text"]
