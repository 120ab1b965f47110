"""Wrong descriptions of a model, planted, and caught by the proof before anything is scored or cut."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, arch
from hywia_kernels.arch import derive, narrow
from hywia_kernels.method import derivation, loss_steps, proof


@functools.cache
def _derived(name: str):
    """`(small model, what was derived of it)` of a family by its default config."""
    from transformers import AutoConfig

    small = narrow.narrow(AutoConfig.for_model(name), seed=2)
    what, _ = derivation.derived(small, small)
    return small, what


def _copy(name: str):
    small, what = _derived(name)
    return copy.deepcopy(small), what


def _checked(model, entry, alone=()) -> None:
    """What `prove` asks of a small copy, but for saving."""
    arch.adopt(model, entry)
    proof.check_covered(model, alone)
    proof.check_cut(model)
    loss_steps.check_steps(model)


def _attention(entry, **wrong):
    return dataclasses.replace(entry, attention=dataclasses.replace(entry.attention, **wrong))


def _swapped_gate(entry):
    rows = tuple(reversed(entry.mlp.rows))
    return dataclasses.replace(entry, mlp=dataclasses.replace(entry.mlp, rows=rows))


def _experts(entry, **wrong):
    return dataclasses.replace(entry, experts=dataclasses.replace(entry.experts, **wrong))


_TWO_RUNS = dict(alternating=1, rows=("gate_up_proj", "gate_up_proj"))

PLANTED = [
    ("gate and up swapped", "helium", _swapped_gate, r"statistics of .*mlp"),
    ("a missed shared expert", "qwen2_moe", lambda e: dataclasses.replace(e, branches=()), r"mlp\.shared_expert\."),
    ("q, k and v in three runs", "gpt_neox", lambda e: _attention(e, interleaved=False), r"a cut of .*query_key_value"),
    ("norms of fewer features", "olmoe", lambda e: _attention(e, wide_norms={}), r"a cut of .*self_attn"),
    ("sinks that stay", "gpt_oss", lambda e: _attention(e, vectors=()), r"a cut of .*does not run"),
    ("a value head that stays", "helium", lambda e: _attention(e, value=e.attention.key), r"v_proj|a cut of"),
    ("a gate of heads that stays", "afmoe", lambda e: _attention(e, more=()), r"gate_proj"),
    (
        "heads of another size",
        "deepseek_v3",
        lambda e: _attention(e, size_field="qk_nope_head_dim"),
        r"whole heads|cut",
    ),
    ("slopes of other heads", "bloom", lambda e: _attention(e, alibi=None), r"a cut of .*query_key_value"),
    (
        "a head count that modules keep",
        "opt",
        lambda e: dataclasses.replace(e, attributes=()),
        r"a cut of .*does not run|cut and masked differ",
    ),
    ("logits as the head gives them", "cohere", lambda e: dataclasses.replace(e, logits=()), r"logit_scale"),
    ("a gate and what it multiplies in two runs", "gpt_oss", lambda e: _experts(e, **_TWO_RUNS), r"experts"),
]


@pytest.mark.parametrize(("name", "plant", "message"), [p[1:] for p in PLANTED], ids=[p[0] for p in PLANTED])
def test_a_planted_description_is_caught(name, plant, message):
    known = {t: e for e in arch.TABLE for t in e.model_types}
    if name in known:
        from transformers import AutoConfig

        model, right, alone = narrow.narrow(AutoConfig.for_model(name), seed=2), known[name], ()
    else:
        model, what = _copy(name)
        right, alone = what.entry, tuple(what.alone)
    _checked(model, right, alone)  # which holds
    with pytest.raises(HywiaError, match=message):
        _checked(model, plant(right), alone)


class _Reversed(torch.nn.Module):
    """The output's matrix, which gets the heads in another order than the queries' matrix gives them."""

    def __init__(self, linear, heads):
        super().__init__()
        self.linear, self.heads = linear, heads

    def forward(self, x):
        return self.linear(x.unflatten(-1, (self.heads, -1)).flip(-2).flatten(-2))


def test_permuted_heads_are_caught():
    """The model hands its heads to the output's matrix in reverse, which no shape tells."""
    model, what = _copy("helium")
    _checked(model, what.entry, tuple(what.alone))
    for layer in model.get_submodule(what.entry.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args: (args[0].unflatten(-1, (4, -1)).flip(-2).flatten(-2),)
        )
    with pytest.raises(HywiaError, match=r"a cut of model\.layers\.0\.self_attn.*cut and masked differ"):
        _checked(model, what.entry, tuple(what.alone))


def test_a_stride_of_other_kv_groups_is_caught(monkeypatch):
    """Query head `h` takes KV head `h % kv_heads` instead of the one whose run of query heads it is in."""
    from transformers.models.glm import modeling_glm

    model, what = _copy("glm")
    model.set_attn_implementation("eager")
    _checked(model, what.entry, tuple(what.alone))

    def tiled(hidden, times):
        return hidden.repeat(1, times, 1, 1)

    monkeypatch.setattr(modeling_glm, "repeat_kv", tiled)
    with pytest.raises(HywiaError, match=r"a cut of .*self_attn"):
        _checked(model, what.entry, tuple(what.alone))


def test_a_norm_over_all_channels_is_caught():
    """What enters the MLP's last matrix is divided by its rms, which a cut takes over fewer channels."""
    model, what = _copy("helium")
    for layer in model.get_submodule(what.entry.layers):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args: (args[0] / args[0].square().mean(-1, keepdim=True).sqrt(),)
        )
    with pytest.raises(HywiaError, match=r"a cut of model\.layers\.0\.mlp.*cut and masked differ"):
        _checked(model, what.entry, tuple(what.alone))


def test_a_matrix_of_two_layers_is_caught():
    """Both layers' MLPs send on through one matrix, whose columns would go by two layers' scores."""
    model, what = _copy("helium")
    layers = model.get_submodule(what.entry.layers)
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    with pytest.raises(HywiaError, match="layers share parameters with each other"):
        _checked(model, what.entry, tuple(what.alone))


def test_keys_of_another_layer_are_caught_on_the_model_itself():
    """The copy's layers have keys of their own, and the model's last layer takes the first one's, unlike the config."""
    model, what = _copy("helium")
    small, _ = _copy("helium")
    arch.adopt(model, None)
    first, last = (model.get_submodule(what.entry.layers)[i].self_attn.k_proj for i in (0, -1))
    seen = []
    first.register_forward_hook(lambda _, __, out: seen.append(out))
    last.register_forward_hook(lambda _, __, ___: seen[-1])
    with pytest.raises(HywiaError, match=r"model: cut equals masked: it does not run|cut and masked differ"):
        derivation.prove_entry(model, small, what)
    with pytest.raises(HywiaError, match="expected one of the known model types"):
        arch.groups(model)


def test_a_product_that_is_scaled_besides_is_caught():
    """The MLP is said to be a gate times what it multiplies, and doubles that: cuts agree, statistics do not."""
    model, what = _copy("helium")
    assert what.entry.mlp.gated is not None
    mlp = type(model.get_submodule(what.entry.layers)[0].mlp)

    class Doubled(mlp):
        def forward(self, x):
            return self.down_proj(2.0 * self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    for layer in model.get_submodule(what.entry.layers):
        layer.mlp.__class__ = Doubled
    arch.adopt(model, what.entry)
    proof.check_cut(model)
    with pytest.raises(HywiaError, match=r"statistics of .*mlp"):
        _checked(model, what.entry, tuple(what.alone))


def test_a_width_in_another_field_harms_nothing(tmp_path):
    """The shared expert's width is said to be in the field of the routed ones': what is saved is tried against the
    config, so it reloads to the same logits all the same."""
    model, what = _copy("qwen2_moe")
    (branch,) = what.entry.branches
    wrong = dataclasses.replace(branch, width_field="moe_intermediate_size")
    routed = dataclasses.replace(what.entry.experts, width_field="shared_expert_intermediate_size")
    arch.adopt(model, dataclasses.replace(what.entry, branches=(wrong,), experts=routed))
    plan = hk.plan(hk.score(model, criterion="random"), group_ratio=0.4, units=("mlp",), align=4)
    assert len({plan.keep[g.name].numel() for g in plan.groups if g.kind == "mlp"}) == 2
    hk.prune(model, plan)
    hk.save(model, None, tmp_path / "out")
    again = arch.auto_class(model.config).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.arange(5, 29).view(2, 12)
    with torch.no_grad():
        got, want = again(input_ids=tokens).logits, model(input_ids=tokens).logits
    assert float((got - want).norm() / want.norm()) <= 1e-5


def test_an_encoder_is_refused():
    """BERT's config says `is_decoder=False`: every token sees what comes behind it."""
    from transformers import AutoConfig

    small = narrow.narrow(AutoConfig.for_model("bert", is_decoder=False), seed=2)
    with pytest.raises(HywiaError, match="no causal language model"):
        derivation.derived(small, small)


def test_a_failed_proof_leaves_no_entry(monkeypatch):
    model, what = _copy("helium")
    small, _ = _copy("helium")
    arch.adopt(model, None)
    wrong = dataclasses.replace(what, entry=_swapped_gate(what.entry))
    with pytest.raises(HywiaError, match="statistics of"):
        derivation.prove_entry(model, small, wrong)
    with pytest.raises(HywiaError, match=r"expected one of the known model types .* hk\.prove"):
        arch.groups(model)


def test_hypotheses_name_what_is_there():
    small, _ = _derived("qwen2_moe")
    found = derive.hypotheses(small)
    assert found.layers == "model.layers"
    assert [a.query for a in found.attentions] == ["self_attn.q_proj"]
    assert [e.router for e in found.experts] == ["mlp.gate", ""]
    assert [m[0].columns for m in found.mlps] == [("mlp.shared_expert.down_proj",)]
