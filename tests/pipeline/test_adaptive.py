"""Checkpoints load everywhere: uniform and adaptive, both dtypes, tied and untied, sharded and not, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.checkpoint.adaptive.modeling_hywia_adaptive import describe_changes
from tests.support.families import fresh_named, token_ids
from tests.support.processes import run_jobs, run_python
from tests.support.tiny import TINY, fresh, make_plan

SCRIPT = Path(__file__).with_name("reload_adaptive.py")


def round_trip(folder, tiny, plan_name, dtype, sharded, tokenizer):
    """Save, load as a user would, prune, save: the pruned model and where it lies."""
    fresh(tiny).to(dtype).save_pretrained(folder / "in", max_shard_size="20KB" if sharded else "1GB")
    tokenizer.save_pretrained(folder / "in")
    model, loaded = hk.load(folder / "in")
    plan = make_plan(model, plan_name)
    hk.prune(model, plan)
    hk.save(model, loaded, folder / "out", plan=plan)
    return model


def run_fresh(mode, jobs, folder):
    return run_jobs(SCRIPT, jobs, folder, mode, HF_MODULES_CACHE=str(folder / "modules"))


CASES = [
    (tiny, plan, dtype, sharded)
    for tiny in (TINY[0], TINY[1], TINY[2])  # tied, untied, tied with KV groups
    for plan in ("adaptive", "both")
    for dtype in (torch.float32, torch.bfloat16)
    for sharded in (False, True)
]


# More than one device, as far as a machine without a GPU has them.
OFFLOAD = {"device_map": "auto", "max_memory": {"cpu": 150_000}, "offload_folder": "offload"}


def test_every_round_trip_is_exact_in_fresh_processes(tmp_path, tokenizer, tokens):
    jobs, wanted = [], []
    for i, (tiny, plan, dtype, sharded) in enumerate(CASES):
        model = round_trip(tmp_path / str(i), tiny, plan, dtype, sharded, tokenizer)
        out = tmp_path / str(i) / "out"
        assert (len(list(out.glob("*.safetensors"))) > 1) == sharded
        assert (out / "chat_template.jinja").read_text() == tokenizer.chat_template
        ids = model.generate(tokens[:1], attention_mask=torch.ones_like(tokens[:1]), do_sample=False, max_new_tokens=8)
        with torch.no_grad():
            wanted.append((model(tokens).logits, ids[0].tolist()))
        jobs.append({"folder": str(out), "tokens": tokens.tolist(), "out": str(out) + ".pt"})
    jobs.append({**jobs[0], "out": jobs[0]["out"] + ".auto", "options": OFFLOAD})
    wanted.append(wanted[0])
    # Alibi slopes belong to heads, so a checkpoint brings those of the heads that are left.
    slopes = fresh_named("bloom")
    hk.prune(slopes, make_plan(slopes, "adaptive"))
    hk.save(slopes, None, tmp_path / "bloom")
    out = str(tmp_path / "bloom.pt")
    job = {"folder": str(tmp_path / "bloom"), "tokens": token_ids().tolist(), "out": out, "logits_only": True}
    cases = [*CASES, CASES[0]]
    adaptive = [i for i, case in enumerate(cases) if case[1] == "adaptive"]
    for mode, chosen in (
        ("import", range(len(cases))),
        ("after", adaptive[:1]),
        ("remote", [*adaptive[:3], adaptive[-1]]),
    ):
        results = run_fresh(mode, [*(jobs[i] for i in chosen), *([job] if mode == "remote" else [])], tmp_path)
        if mode == "remote":
            assert "transformers_modules" in results.pop()["module"]
            with torch.no_grad():
                assert torch.equal(torch.load(out, weights_only=True), slopes(token_ids()).logits)
        for i, result in zip(chosen, results, strict=True):
            logits, ids = wanted[i]
            assert torch.equal(torch.load(jobs[i]["out"], weights_only=True), logits), (mode, jobs[i]["folder"])
            assert result["ids"] == {"None": ids, "static": ids}, (mode, jobs[i]["folder"])
            assert result["gradients"], (mode, jobs[i]["folder"])
            assert result["dtype"] == str(cases[i][2])
            ours = "modeling_hywia_adaptive" in result["module"]
            assert ours == (cases[i][1] == "adaptive")
            assert ("transformers_modules" in result["module"]) == (ours and mode == "remote")
            Path(jobs[i]["out"]).unlink()
        assert [i for i, r in zip(chosen, results, strict=True) if r["devices"] > 1] == [i for i in chosen if i == 24]


def test_importing_the_package_registers_without_importing_transformers():
    code = (
        "import sys, hywia_kernels\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers import AutoConfig\n"
        "c = AutoConfig.for_model('hywia_adaptive')\n"
        "import transformers.models.auto.modeling_auto as m\n"
        "print(type(c).__name__, m.AutoModelForCausalLM._model_mapping[type(c)].__name__)\n"
    )
    assert run_python("-c", code).split() == ["HywiaAdaptiveConfig", "HywiaAdaptiveForCausalLM"]


@pytest.fixture
def adaptive(gqa, tmp_path):
    hk.prune(gqa, make_plan(gqa, "adaptive"))
    hk.save(gqa, None, tmp_path / "out")
    return gqa, tmp_path / "out"


def test_the_config_says_the_widths(adaptive):
    config = AutoConfig.from_pretrained(adaptive[1])
    assert config.model_type == "hywia_adaptive"
    assert config.base_model_type == "llama"
    assert config.layer_widths["intermediate_size"] == [g.units for g in hk.groups(adaptive[0]) if g.kind == "mlp"]
    assert config.hidden_size == 48  # the family's fields are there under their own names


def test_from_config_builds_initialised_weights(adaptive):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(adaptive[1]))
    assert [p.shape for p in model.parameters()] == [p.shape for p in adaptive[0].parameters()]
    weight = model.model.layers[1].mlp.up_proj.weight
    assert 0.5 * 0.15 < float(weight.detach().std()) < 1.5 * 0.15


def test_saved_again_and_pruned_again(adaptive, tokens, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(adaptive[1])
    model.save_pretrained(tmp_path / "again")
    names = {p.name for p in (tmp_path / "again").iterdir()}
    assert {"modeling_hywia_adaptive.py", "configuration_hywia_adaptive.py"} <= names
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    plan = hk.plan(hk.score(again, tokens), group_ratio=0.5, layers=(1, 3), units=("mlp",), align=4)
    hk.prune(again, plan)
    hk.save(again, None, tmp_path / "smaller")
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    assert [g.units for g in hk.groups(smaller) if g.kind == "mlp"] == plan.widths("mlp")
    with torch.no_grad():
        assert torch.equal(smaller(tokens).logits, again(tokens).logits)


def test_a_checkpoint_without_its_changes_is_refused(adaptive):
    _, folder = adaptive
    config = json.loads((folder / "config.json").read_text())
    del config["module_changes"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected the config fields base_model_type and module_changes"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_attributes_and_configs_of_modules_are_carried(gqa, tmp_path, tokens):
    """What an attention that reads its own numbers needs."""
    import copy

    gqa.model.layers[1].self_attn.num_key_value_groups = 2
    gqa.model.layers[1].self_attn.head_dim = 4
    own = copy.copy(gqa.config)
    own.num_attention_heads = 3
    gqa.model.layers[1].self_attn.config = own
    changes = describe_changes(gqa)
    assert changes == {
        "model.layers.1.self_attn": {"attributes": {"head_dim": 4}, "config": {"num_attention_heads": 3}}
    }


def test_a_model_of_other_modules_is_refused(gqa):
    del gqa.model.layers[2]
    with pytest.raises(ValueError, match="expected its family's modules"):
        describe_changes(gqa)


def test_save_reports_what_cannot_be_described(gqa, tmp_path):
    hk.prune(gqa, make_plan(gqa, "adaptive"))
    gqa.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(HywiaError, match="cannot be written into a config"):
        hk.save(gqa, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_heads_that_the_family_refuses_under_channels_that_differ(tmp_path):
    """Five heads of eight are as many in every layer, and a Llama config takes no five with a hidden size of 48."""
    model = fresh(TINY[0])
    scores = hk.score(model, criterion="random", seed=5)
    heads = hk.plan(scores, group_ratio=0.2, units=("attention",))
    channels = hk.plan(scores, group_ratio=0.4, units=("mlp",), layers=(1, 3), align=4)
    keep = {name: (heads if name.endswith("attention") else channels).keep[name] for name in heads.keep}
    left = heads.parameters_after + channels.parameters_after - heads.parameters_before
    hk.prune(model, dataclasses.replace(channels, keep=keep, parameters_after=left))
    assert [layer.self_attn.q_proj.out_features for layer in model.model.layers] == [40] * 3
    hk.save(model, None, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
