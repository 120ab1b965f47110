"""What had another name before 0.2 is still there under it, and says what it is called now."""

from __future__ import annotations

import importlib
import warnings

import pytest

import hywia_kernels as hk
from hywia_kernels import _moved


@pytest.mark.parametrize(("old", "new"), sorted(_moved.NAMES.items()))
def test_functions(old, new):
    with pytest.warns(
        DeprecationWarning, match=rf"hywia_kernels\.{old} is now hywia_kernels\.{new}; .* 0\.3"
    ) as caught:
        assert getattr(hk, old) is getattr(hk, new)
    assert caught[0].filename == __file__, "a warning that is blamed on the package is shown to nobody"


@pytest.mark.parametrize(("old", "new"), sorted(_moved.MODULES.items()))
def test_modules(old, new):
    module, present = (importlib.import_module(f"hywia_kernels.{name}") for name in (old, new))
    name = next(n for n in getattr(present, "__all__", vars(present)) if not n.startswith("_"))
    with pytest.warns(DeprecationWarning, match=rf"hywia_kernels\.{old} is now hywia_kernels\.{new};") as caught:
        assert getattr(module, name) is getattr(present, name)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("statement", "now"),
    [
        ("from hywia_kernels.budgets import redistribute as it", "method.allocation:allocate"),
        ("from hywia_kernels.calibrate import calibrate as it", "method.statistics:calibrate"),
        ("from hywia_kernels.fusion import score as it", "method.criteria:score"),
        ("from hywia_kernels.fusion import fused as it", "method.scores:blend"),
        ("from hywia_kernels.leftover import with_leftover as it", "method.head_residual:rank_heads"),
        ("from hywia_kernels.refit import refit as it", "method.reconstruction:reconstruct"),
        ("from hywia_kernels.selection import USUAL as it", "settings:DEFAULT_KINDS"),
        ("from hywia_kernels.served import write_decilm as it", "checkpoint.decilm:write_decilm"),
        ("from hywia_kernels.served import write_gguf as it", "checkpoint.gguf:write_gguf"),
        ("from hywia_kernels.speed import cases as it", "deploy.speed:cases"),
        ("from hywia_kernels.speed import work_of as it", "deploy.cost:cost_of"),
        ("from hywia_kernels.speed.work import Work as it", "deploy.cost:Cost"),
        ("import hywia_kernels.text as text; it = text.windows", "method.calibration_data:windows"),
        ("from hywia_kernels import surgery; it = surgery.silence", "method.surgery:zero_units"),
    ],
)
def test_statements(statement, now):
    names: dict = {}
    with pytest.warns(DeprecationWarning, match="the old name goes in 0.3"):
        exec(statement, names)
    module, _, name = now.partition(":")
    assert names["it"] is getattr(importlib.import_module(f"hywia_kernels.{module}"), name)


def test_what_never_was_is_an_error_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AttributeError, match="nothing_of_this_name"):
            hk.nothing_of_this_name  # noqa: B018
        with pytest.raises(AttributeError, match="nothing_of_this_name"):
            importlib.import_module("hywia_kernels.selection").nothing_of_this_name  # noqa: B018
