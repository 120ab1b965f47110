"""The tokenizer of the tiny families under the name by which the tests beside import it."""

from tests.support.tokenizers import *  # noqa: F403
