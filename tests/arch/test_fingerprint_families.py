"""A model of every family has the same fingerprint after the disk, cut or not."""

from __future__ import annotations

import pytest
from families import FAMILIES, fresh, make_plan

import hywia_kernels as hk
from hywia_kernels.weights import fingerprint


@pytest.mark.parametrize("cut", [None, "mlp", "adaptive"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_save_and_load_keeps_it(family, cut, tmp_path):
    from transformers import AutoModelForCausalLM

    model = fresh(family)
    whole = fingerprint(model)
    if cut is not None:
        hk.prune(model, make_plan(model, cut))
        assert fingerprint(model) != whole
    hk.save(model, None, tmp_path / "out")
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == fingerprint(model)
