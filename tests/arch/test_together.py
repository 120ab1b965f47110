"""Derived families whose layers hand on more than hidden states, so that none runs by itself: Gemma 3n, HY 4."""

from __future__ import annotations

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.cli import main
from tests.support.comparison import logits, relative
from tests.support.derived import prompt, small
from tests.support.tokenizers import write_tokenizer

_ALONE = "run together alone: no reconstruction, no search, heads by their scores"


def test_gemma3n_is_derived_but_for_what_its_layers_share(tmp_path):
    """Heads go where no other layer takes their keys, channels where no gate is held against the mean of all."""
    model = small("gemma3n_text")
    attention = [layer.self_attn for layer in model.model.layers]
    assert [a.store_full_length_kv for a in attention] == [False, False, True, True, False, False]
    assert [a.is_kv_shared_layer for a in attention] == [False] * 4 + [True] * 2
    assert [layer.mlp.activation_sparsity > 0 for layer in model.model.layers] == [True] * 2 + [False] * 4
    proof = hk.prove(model)
    assert proof.kinds == ("mlp", "attention")
    assert proof.parts["layers"] == _ALONE
    assert "copy: refitted, then cut" not in proof.checks
    assert {"copy: cut equals masked", "model: statistics equal the loss's gradients"} <= set(proof.checks)
    found = {(g.layer, g.name.rpartition(".")[2]): g.units for g in hk.groups(model)}
    assert {layer for layer, name in found if name == "attention"} == {0, 1}
    assert {layer for layer, name in found if name == "mlp"} == {2, 3, 4, 5}
    assert {layer for layer, name in found if name == "laurel"} == set(range(6))
    assert "mlp.down_proj" in proof.alone
    model.save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    arguments = ["--group-ratio", "0.4", "--samples", "3", "--seq-len", "12", "--align", "8", "--no-eval"]
    assert main(["prune", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *arguments]) == 0
    again, _ = hk.load(tmp_path / "out")
    hk.prove(again)
    assert {g.units for g in hk.groups(again) if g.name.endswith(".mlp")} < {8, 16, 24, 32}
    tokens = prompt()
    assert relative(logits(again, tokens), logits(model, tokens)) > 1e-2
    assert torch.isfinite(logits(again, tokens)).all()


def test_what_runs_a_layer_by_itself_is_refused():
    model = small("hy_v4")
    assert hk.prove(model).parts["layers"] == _ALONE
    plan = hk.plan(hk.score(model, criterion="random"), group_ratio=0.4, align=8)
    with pytest.raises(HywiaError, match=r"none of them runs by itself; .*--no-reconstruct"):
        hk.reconstruct(model, plan, prompt())
    with pytest.raises(UsageError, match="reconstruct: expected False"):
        hk.compress(model, None, hk.Recipe(group_ratio=0.4, reconstruct=True), tokens=prompt())
