"""Deprecations of what the package calls are errors, those of others are not."""

from __future__ import annotations

import warnings

import pytest

CATEGORIES = pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])


@CATEGORIES
@pytest.mark.parametrize("module", ["hywia_kernels", "hywia_kernels.engine.passes", "transformers.modeling_utils"])
def test_those_of_our_own_calls_are_errors(category, module):
    with pytest.raises(category, match="planted"):
        warnings.warn_explicit("planted", category, "planted.py", 1, module=module)


@CATEGORIES
def test_those_of_others_are_warnings(category):
    with pytest.warns(category, match="planted"):
        warnings.warn_explicit("planted", category, "planted.py", 1, module="others")
