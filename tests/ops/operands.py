"""Under the name by which the tests beside import it."""

from tests.support.operands import *  # noqa: F403
