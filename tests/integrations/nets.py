"""The small networks under the name by which the tests beside import them."""

from tests.support.nets import *  # noqa: F403
