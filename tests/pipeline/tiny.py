"""The tiny models under the name by which a script beside the tests imports them."""

from tests.support.tiny import *  # noqa: F403
