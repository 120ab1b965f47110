"""Under the name by which the tests beside import it."""

from tests.support.tolerances import *  # noqa: F403
