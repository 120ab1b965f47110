"""A model of every family has the same fingerprint after the disk, cut or not."""

from __future__ import annotations

import pytest

import hywia_kernels as hk
from hywia_kernels.arch.facts import fingerprint
from tests.support.families import FAMILIES, fresh

CUTS = {"mlp": dict(units=("mlp",)), "adaptive": dict(layers=(1, 2))}


@pytest.mark.parametrize("cut", [None, "mlp", "adaptive"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_save_and_load_keeps_it(family, cut, tmp_path):
    from transformers import AutoModelForCausalLM

    model = fresh(family)
    whole = fingerprint(model)
    if cut is not None:
        hk.prune(model, hk.plan(hk.score(model, criterion="random"), group_ratio=0.4, align=4, **CUTS[cut]))
        assert fingerprint(model) != whole
    hk.save(model, None, tmp_path / "out")
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == fingerprint(model)
