"""The package that is imported is the wheel's, with its kernels and its data files.

usage: installed.py FOLDER, which the wheel was installed into and PYTHONPATH names.
"""

import contextlib
import sys
from pathlib import Path

import jinja2
import torch

import hywia_kernels as hk
from hywia_kernels.checkpoint.templating import render
from hywia_kernels.deploy import device_profiles
from hywia_kernels.method.reading import bundled_text

assert Path(hk.__file__).parents[1] == Path(sys.argv[1]).resolve(), hk.__file__
native = next(b for b in hk.ops.availability() if b.name == "native")
assert native.on, native.reason
weight = torch.ones(4, 6)
assert hk.ops.taylor_importance(weight, weight, axis=0, backend="native").fine.tolist() == [6.0] * 4
assert "Alice" in bundled_text()
assert device_profiles.resolve("h100").measured
for name in ("model_card.md.jinja", "report.html.jinja"):
    with contextlib.suppress(jinja2.UndefinedError):  # the template is there, and wants its values
        render(name, {})
print(f"the installed wheel of {hk.__version__} works")
