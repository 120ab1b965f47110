"""The plain statistics under the name by which the tests beside import them."""

from tests.support.statistics import *  # noqa: F403
