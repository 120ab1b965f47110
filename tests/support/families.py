"""The tiny families of `tests/arch/families.py` for the tests of other folders."""

from tests.arch.families import *  # noqa: F403
