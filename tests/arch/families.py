"""The tiny families under the name by which a script beside the tests imports them."""

from tests.support.families import *  # noqa: F403
