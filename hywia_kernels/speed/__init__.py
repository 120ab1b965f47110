"""How fast a model is, and how fast it could be.

`work` counts FLOPs and bytes, `driver` runs a model with a static cache, compiled and captured, `measure` times both
that and plain eager code.
"""

from .measure import MODES, Case, Measurement, cases, measure
from .work import Work, work_of

__all__ = ["MODES", "Case", "Measurement", "Work", "cases", "measure", "work_of"]
