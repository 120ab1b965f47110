"""Baichuan: 7B as LLaMA without its code, 13B through its code."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.checkpoint.adaptive.alibi_hywia_adaptive import SURVIVORS
from hywia_kernels.checkpoint.skeleton import skeleton
from hywia_kernels.cli import main
from tests.support.comparison import logits, relative
from tests.support.cuts import CUTS, layer_plan, make_plan
from tests.support.directories import assert_equal_directories
from tests.support.families import fresh_named, randomised, token_ids
from tests.support.structure import check_alike
from tests.support.tokenizers import text, write_tokenizer

CODE = Path(__file__).with_name("baichuan_code")
BOMB = 'raise AssertionError("code of the checkpoint was run")\n'
SIZES = dict(vocab_size=131, hidden_size=36, intermediate_size=44, num_hidden_layers=3, num_attention_heads=6)


@pytest.fixture(autouse=True, scope="session")
def modules(tmp_path_factory):
    """Code of checkpoints is copied to where nothing else is."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


@pytest.fixture
def seven(tmp_path):
    """`(directory of a Baichuan-7B, the LLaMA it equals)`; its code would fail the test."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    llama = randomised(LlamaForCausalLM(config).eval())
    state = dict(llama.state_dict())
    for i in range(3):
        prefix = f"model.layers.{i}.self_attn."
        state[prefix + "W_pack.weight"] = torch.cat([state.pop(f"{prefix}{x}_proj.weight") for x in "qkv"])
        state[prefix + "rotary_emb.inv_freq"] = 1.0 / 10000.0 ** (torch.arange(0, 6, 2).float() / 6)
    folder = tmp_path / "baichuan-7b"
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    content = dict(SIZES, model_type="baichuan", max_position_embeddings=64, model_max_length=64, hidden_act="silu")
    content |= dict(rms_norm_eps=1e-6, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    content["auto_map"] = {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(content))
    for name in ("configuration_baichuan.py", "modeling_baichuan.py"):
        (folder / name).write_text(BOMB)
    write_tokenizer(folder)
    return folder, llama


def test_seven_is_llama_bit_for_bit_and_runs_no_code(seven):
    folder, llama = seven
    model, tokenizer = hk.load(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(model, token_ids()), logits(llama, token_ids()))
    assert tokenizer("t5 t7")["input_ids"] == [5, 7]
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in llama.named_parameters()}


def test_packed_rows_are_queries_then_keys_then_values(seven):
    folder, _ = seven
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        packed = file.get_tensor("model.layers.1.self_attn.W_pack.weight")
    model, _ = hk.load(folder)
    x = torch.randn(5, 36, generator=torch.Generator().manual_seed(0))
    apart = (x @ packed.t()).unflatten(-1, (3, 36))  # as the original's attention takes it apart
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        with torch.no_grad():
            made = getattr(model.model.layers[1].self_attn, name)(x)
        torch.testing.assert_close(made, apart[:, i], rtol=1e-6, atol=1e-6)


def test_the_head_of_baichuan2_has_rows_of_length_one(seven):
    folder, llama = seven
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "z_loss_weight": 0}))
    model, _ = hk.load(folder)
    with torch.no_grad():
        llama.lm_head.weight.copy_(torch.nn.functional.normalize(llama.lm_head.weight))
    assert torch.equal(logits(model, token_ids()), logits(llama, token_ids()))


def test_seven_pruned_and_saved_is_a_stock_llama(seven, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = hk.load(seven[0], dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    hk.prune(model, make_plan(model, "mlp"))
    hk.save(model, tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.model_type == "llama"
    assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.norm.weight"), r"lacks \['model\.norm\.weight'\]"),
        (lambda s: s.update({"model.extra": torch.ones(2)}), r"unknown \['model\.extra'\]"),
        (lambda s: s["model.layers.0.self_attn.rotary_emb.inv_freq"].mul_(0.5), "rotary base of 10000"),
    ],
)
def test_a_seven_that_is_none_is_refused(seven, change, message):
    folder, _ = seven
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HywiaError, match=message):
        hk.load(folder)


@pytest.fixture
def thirteen(tmp_path):
    """The directory of a stand-in for Baichuan-13B, with its code."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "baichuan-13b"
    shutil.copytree(CODE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    content = dict(SIZES, model_type="baichuan", model_max_length=64, architectures=["BaichuanForCausalLM"])
    content |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=None, tie_word_embeddings=False)
    content["auto_map"] = {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(content))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(1)
    model = randomised(AutoModelForCausalLM.from_config(config, trust_remote_code=True))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    write_tokenizer(folder)
    return folder


def test_thirteen_needs_trust(thirteen):
    with pytest.raises(HywiaError, match="trust_remote_code"):
        hk.load(thirteen)


@pytest.mark.parametrize("cut", [*CUTS, "layers"])
def test_thirteen_pruned_equals_masked_and_reloads(thirteen, tmp_path, cut):
    tokens = token_ids()
    model, tokenizer = hk.load(thirteen, trust_remote_code=True)
    plan = layer_plan(model, (0, 2), units=("attention",)) if cut == "layers" else make_plan(model, cut)
    masked = copy.deepcopy(model)
    hk.mask(masked, plan)
    want = logits(masked, tokens)
    assert relative(want, logits(model, tokens)) > 1e-2
    hk.prune(model, plan)
    assert relative(logits(model, tokens), want) <= 1e-5
    hk.save(model, tokenizer, tmp_path / "out")
    again, _ = hk.load(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    ask = dict(attention_mask=torch.ones_like(tokens[:2]), do_sample=False, max_new_tokens=6)
    assert torch.equal(again.generate(tokens[:2], **ask), model.generate(tokens[:2], **ask))
    if cut != "mlp":
        with pytest.raises(HywiaError, match="trust_remote_code"):
            hk.load(tmp_path / "out")


@pytest.mark.parametrize("name", ["bloom", "baichuan"])
def test_every_surviving_head_keeps_its_slope(name, thirteen):
    """Cut head by head to the last, which is not the first: its scores must be what they were."""
    tokens = token_ids()
    model = fresh_named("bloom") if name == "bloom" else hk.load(thirteen, trust_remote_code=True)[0]
    whole = copy.deepcopy(model)
    scores = hk.score(model, criterion="random", seed=1)
    for g in scores.groups:
        if g.kind == "attention":
            scores.values[g.name].copy_(torch.arange(g.units).float() + g.layer)  # later heads stay
    first = hk.plan(scores, group_ratio=0.5, units=("attention",))
    hk.prune(model, first)
    again = hk.score(model, criterion="random", seed=1)
    for g in again.groups:
        if g.kind == "attention":
            again.values[g.name].copy_(torch.arange(g.units).float())
    second = hk.plan(again, group_ratio=0.6, units=("attention",))
    hk.prune(model, second)
    kept = {g.name: first.keep[g.name][second.keep[g.name]] for g in first.groups if g.kind == "attention"}
    assert all(keep.tolist() == [5] for keep in kept.values())
    at = "self_attention" if name == "bloom" else "self_attn"
    layers = model.transformer.h if name == "bloom" else model.model.layers
    assert [getattr(getattr(layer, at), SURVIVORS)["heads"] for layer in layers] == [[5], [5], [5]]
    plan = hk.plan(scores, group_ratio=0.83, units=("attention",))
    assert all(plan.keep[n].tolist() == [5] for n in kept)
    hk.mask(whole, plan)
    assert relative(logits(model, tokens), logits(whole, tokens)) <= 1e-5


def test_thirteen_is_scored(thirteen):
    model, _ = hk.load(thirteen, trust_remote_code=True)
    fused, plain = (hk.calibrate(model, token_ids(), engine=engine) for engine in ("fused", "autograd"))
    for name, coarse in plain.coarse.items():
        torch.testing.assert_close(fused.coarse[name], coarse, rtol=1e-4, atol=1e-5 * float(coarse.abs().max()))


def test_thirteen_by_command(thirteen, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(text())
    monkeypatch.chdir(tmp_path)
    request = [
        "--ratio",
        "0.2",
        "--align",
        "4",
        "--no-eval",
        "--calib",
        "text.txt",
        "--samples",
        "3",
        "--seq-len",
        "12",
    ]
    command = ["prune", thirteen.name, "-o", "out", *request]
    assert main(command) == 1
    assert "pass --trust-remote-code" in capsys.readouterr().err
    assert main([*command, "--trust-remote-code"]) == 0
    again, _ = hk.load("out", trust_remote_code=True)
    assert sum(p.numel() for p in again.parameters()) < sum(
        t.numel() for t in load_file(thirteen / "model.safetensors").values()
    )


def test_skeletons(seven, thirteen, tmp_path):
    check_alike(skeleton(seven[0]), hk.load(seven[0], device="cpu")[0])
    with pytest.raises(HywiaError, match="--trust-remote-code"):
        skeleton(thirteen)
    trusted = dict(device="cpu", trust_remote_code=True)
    model, tokenizer = hk.load(thirteen, **trusted)
    check_alike(skeleton(thirteen, trust_remote_code=True), model)
    plan = make_plan(model, "adaptive-mlp")
    hk.prune(model, plan)
    hk.save(model, tokenizer, tmp_path / "cut", plan=plan)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["module_changes"]
    check_alike(skeleton(tmp_path / "cut", trust_remote_code=True), hk.load(tmp_path / "cut", **trusted)[0])


@pytest.mark.parametrize("which", ["seven", "Baichuan2", "thirteen"])
def test_files_to_files_is_prune_and_save(which, request, tmp_path):
    """Packed matrices are taken apart and the head brought to length on the way; or the checkpoint's code runs."""
    trusted = {"trust_remote_code": which == "thirteen"}
    folder = request.getfixturevalue("thirteen") if which == "thirteen" else request.getfixturevalue("seven")[0]
    if which == "Baichuan2":
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "z_loss_weight": 0}))
    for cut in ("mlp", "adaptive"):
        model, tokenizer = hk.load(folder, **trusted)
        plan = make_plan(model, cut)
        hk.prune_files(folder, plan, tmp_path / f"files-{cut}" / "out", **trusted)
        hk.prune(model, plan)
        hk.save(model, tokenizer, tmp_path / f"memory-{cut}" / "out", plan=plan)
        assert_equal_directories(tmp_path / f"files-{cut}" / "out", tmp_path / f"memory-{cut}" / "out")
