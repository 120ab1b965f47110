"""The table says which rows and columns belong together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from hywia_kernels import HywiaError, arch, groups
from hywia_kernels.arch import observed, support
from hywia_kernels.types import Member
from tests.support.tiny import Tiny


def test_groups_of_a_grouped_query_model(gqa):
    found = groups(gqa)
    assert [g.name for g in found[:2]] == ["model.layers.0.attention", "model.layers.0.mlp"]
    assert len(found) == 2 * gqa.config.num_hidden_layers
    attention, mlp = found[0], found[1]
    assert (attention.units, attention.unit) == (3, "kv_group")
    assert attention.members == (
        Member("model.layers.0.self_attn.q_proj", 0, 16),
        Member("model.layers.0.self_attn.k_proj", 0, 8),
        Member("model.layers.0.self_attn.v_proj", 0, 8),
        Member("model.layers.0.self_attn.o_proj", 1, 16),
    )
    assert (mlp.units, mlp.unit) == (56, "channel")
    assert [m.axis for m in mlp.members] == [0, 0, 1]


def test_units_cover_every_matrix_exactly_once(model):
    for group in groups(model):
        for member in group.members:
            weight = model.get_submodule(member.module).weight
            assert group.units * member.group_size == weight.shape[member.axis]
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert sorted(m.module for g in groups(model) for m in g.members) == sorted(linears)


def test_unit_parameters_add_up(model):
    """Every parameter of the decoder's linears but the biases of o and down leaves with some unit."""
    total = sum(g.units * g.unit_parameters for g in groups(model))
    expected = 0
    for name, parameter in model.named_parameters():
        stays = name.endswith(("o_proj.bias", "down_proj.bias"))
        if "_proj." in name and not stays:
            expected += parameter.numel()
    assert total == expected


def test_multi_head_units_are_heads(tiny, model):
    unit = {g.unit for g in groups(model) if g.kind == "attention"}
    assert unit == {"head" if tiny.heads == tiny.kv_heads else "kv_group"}


def test_only_a_biased_llama_is_held_to_head_counts_that_divide_the_hidden_size():
    """Without biases a Mistral config stands in and any count goes; with them 5 heads do not divide 48."""
    for bias, counts in ((False, ()), (True, (1, 2, 3, 4, 6))):
        model = Tiny("mha", heads=6, kv_heads=6, tied=False, bias=bias).build()
        assert {g.stock_counts for g in groups(model) if g.kind == "attention"} == {counts}


def test_unknown_model_type_lists_the_known_ones():
    model = BertLMHeadModel(
        BertConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=8, vocab_size=16)
    )
    with pytest.raises(HywiaError, match=r"known model types \(baichuan, .*, llama, .*\), got 'bert'"):
        groups(model)


def test_a_quantised_or_wrapped_linear_is_named(gqa):
    class Wrapped(torch.nn.Linear):
        pass

    gqa.model.layers[1].mlp.up_proj = Wrapped(48, 56, bias=False)
    with pytest.raises(
        HywiaError,
        match=r"model\.layers\.1\.mlp\.up_proj: expected torch\.nn\.Linear or transformers' Conv1D, got Wrapped",
    ):
        groups(gqa)


def test_coupled_matrices_of_different_widths_are_refused(gqa):
    gqa.model.layers[0].mlp.up_proj = torch.nn.Linear(48, 55, bias=False)
    with pytest.raises(HywiaError, match="coupled matrices of one width"):
        groups(gqa)


def test_the_documents_list_what_the_table_holds():
    """If it fails: python -m hywia_kernels.arch.support docs/models.md."""
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert support.BEGIN in text
    assert support.written(text) == text
    rows = support.markdown().splitlines()[2:]
    assert len(rows) == len(arch.TABLE)
    assert all(f"`{name}`" in row for row, entry in zip(rows, arch.TABLE, strict=True) for name in entry.model_types)


def test_the_documents_list_what_was_derived():
    """If it fails: python -m hywia_kernels.arch.support docs/models.md."""
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert support.written(text) == text
    listed = {**observed.DERIVED, **observed.MLP_ONLY, **observed.REFUSED}
    assert all(f"`{name}`" in text for name in listed)
    assert {t for entry in arch.TABLE for t in entry.model_types}.isdisjoint(listed)
    with pytest.raises(ValueError, match="expected a text with"):
        support.written("no marks")
