"""How fast a model is, and how fast it could be.

`work` counts FLOPs and bytes, `driver` runs a model with a static cache, compiled and captured, `measure` times both
that and plain eager code.
"""

from ..deploy.cost import Work, work_of
from ..deploy.speed import MODES, Case, Measurement, cases, measure

__all__ = ["MODES", "Case", "Measurement", "Work", "cases", "measure", "work_of"]
