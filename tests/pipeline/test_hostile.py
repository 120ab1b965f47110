"""Nothing of a checkpoint runs unasked: directories of every shape whose code leaves a mark when it is run."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.cli import main
from tests.support.tiny import TINY, fresh

BAICHUAN = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", "evil.T"]}
LLAMA = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
OTHER = {name: f"someone/else--{value}" for name, value in LLAMA.items()}
OUT = {name: f"../outside/{value}" for name, value in LLAMA.items()}


@pytest.fixture
def hostile(saved, tmp_path, monkeypatch):
    """`(directory, mark)`: code in every file that anything could import, and other code one level up."""
    mark = tmp_path / "mark"
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = (
        f"open({str(mark)!r}, 'a').write(__name__)\nclass Evil: pass\nclass Config: pass\nclass Model: pass\nT = Evil\n"
    )
    names = ("evil", "configuration_evil", "modeling_evil", "tokenization_evil", "conftest", "sitecustomize")
    for name in (*names, "modeling_hywia_adaptive", "configuration_hywia_adaptive", "alibi_hywia_adaptive"):
        (saved / f"{name}.py").write_text(code)
    for place in (saved / "custom_generate" / "generate.py", tmp_path / "outside" / "evil.py", saved / "setup.py"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(code + "def generate(*a, **k): open(" + repr(str(mark)) + ", 'a').write('g')\n")
    return saved, mark


def edit(folder, file, **fields):
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **fields}))


def outcome(folder, **request) -> str:
    """The refusal's text, or "loaded"; anything but a HywiaError fails the test."""
    try:
        model, tokenizer = hk.load(folder, **request)
    except HywiaError as refused:
        return str(refused)
    assert type(model).__module__.startswith(("transformers.", "hywia_kernels."))
    assert type(tokenizer).__module__.startswith("transformers.")
    return "loaded"


@pytest.mark.parametrize("trust", [False, True, 1, "yes", "False", None])
@pytest.mark.parametrize("auto_map", [LLAMA, OTHER, OUT, {"AutoModelForCausalLM": 3}, ["evil.Evil"], "evil.Evil", None])
@pytest.mark.parametrize("changes", [None, {}, {"model.layers.0.mlp": {"attributes": {"hidden_size": 3}}}])
def test_a_family_that_transformers_has_never_runs_code(hostile, trust, auto_map, changes):
    folder, mark = hostile
    edit(folder, "config.json", auto_map=auto_map, **({} if changes is None else {"module_changes": changes}))
    said = outcome(folder, trust_remote_code=trust)
    assert not mark.exists(), said
    assert said == "loaded" or not isinstance(auto_map, dict) or not all(isinstance(v, str) for v in auto_map.values())


def test_by_command(hostile, capsys, monkeypatch, tmp_path):
    folder, mark = hostile
    edit(folder, "config.json", auto_map=LLAMA, module_changes={})
    (tmp_path / "text.txt").write_text("some text " * 200)
    request = ["eval", str(folder), "--text", str(tmp_path / "text.txt"), "--block", "16", "--max-blocks", "2"]
    assert main(request) == 0
    assert main([*request, "--trust-remote-code"]) == 0
    assert not mark.exists()


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    "auto_map", [{"AutoTokenizer": ["evil.T", None]}, ["evil.T", "evil.T"], {"AutoTokenizer": OTHER}]
)
@pytest.mark.parametrize("name", ["Evil", "LlamaTokenizerFast", "TokenizersBackend", None])
def test_code_of_tokenizers(hostile, trust, auto_map, name):
    folder, mark = hostile
    edit(folder, "tokenizer_config.json", auto_map=auto_map, tokenizer_class=name)
    outcome(folder, trust_remote_code=trust)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "AutoModel", "pipeline", "os", "Trainer", 3, "evil.T"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_class_that_is_none(hostile, name, file):
    folder, mark = hostile
    edit(folder, "tokenizer_config.json", tokenizer_class=None)
    edit(folder, file, tokenizer_class=name)
    assert "expected tokenizer_class to name a tokenizer" in outcome(folder, trust_remote_code=True)
    assert not mark.exists()


@pytest.mark.parametrize(
    "file", ["processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"]
)
def test_code_of_processors_is_not_looked_at(hostile, file):
    folder, mark = hostile
    maps = {"AutoProcessor": "evil.Evil", "AutoImageProcessor": "evil.Evil", "AutoFeatureExtractor": "evil.Evil"}
    edit(folder, file, auto_map=maps, processor_class="Evil")
    assert outcome(folder, trust_remote_code=True) == "loaded"
    assert not mark.exists()


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("auto_map", [BAICHUAN, OTHER, OUT])
@pytest.mark.parametrize("changes", [None, {}, {"model": {"config": {"a": 1}}}])
def test_a_family_of_code_needs_trust_and_its_own_files(hostile, trust, auto_map, changes):
    folder, mark = hostile
    config = json.loads((folder / "config.json").read_text())
    config.pop("max_position_embeddings")
    config |= dict(model_type="baichuan", auto_map=auto_map, module_changes=changes)
    (folder / "config.json").write_text(json.dumps(config))
    said = outcome(folder, trust_remote_code=trust)
    if not trust:
        assert "pass --trust-remote-code" in said
    elif auto_map is not BAICHUAN:
        assert "code of other repositories and directories is never run" in said
    assert mark.exists() == (trust and auto_map is BAICHUAN)


def test_an_adaptive_checkpoint_is_loaded_by_the_package(hostile, tmp_path, gqa, tokenizer):
    """Whatever stands in the copies of its classes that it carries."""
    _, mark = hostile
    scores = hk.score(gqa, criterion="random", seed=5)
    hk.prune(gqa, hk.plan(scores, group_ratio=0.4, layers=(1, 3), align=4))
    folder = hk.save(gqa, tokenizer, tmp_path / "adaptive")
    for file in folder.glob("*.py"):
        file.write_text(f"open({str(mark)!r}, 'w')\n")
    ids = torch.arange(12)[None]
    for trust in (False, True):
        again, _ = hk.load(folder, trust_remote_code=trust)
        assert torch.equal(again(ids).logits, gqa(ids).logits)
    for reference in ("evil.Evil", "someone/else--evil.Evil"):
        edit(folder, "config.json", auto_map={"AutoConfig": reference, "AutoModelForCausalLM": reference})
        assert outcome(folder, trust_remote_code=True) == "loaded"
    assert not mark.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(base_model_type="t5"), "model_type 't5'"),
        (dict(base_model_type="baichuan"), "pass --trust-remote-code"),
        (dict(base_model_type="hywia_adaptive"), "model_type 'hywia_adaptive'"),
        (dict(base_model_type=["llama"]), "not supported"),
        (dict(base_model_type=None), "not supported"),
        (dict(module_changes=None), "lacks module_changes"),
        (dict(module_changes={"model.layers.9": {}}), "has no module 'model.layers.9'"),
        (dict(module_changes={"model": {"forward": {}}}), "expected parts"),
        (dict(module_changes={"model": {"attributes": {"forward": 3}}}), "no number 'forward'"),
        (dict(module_changes={"model": {"attributes": {"_modules": 3}}}), "to be numbers"),
        (dict(module_changes={"model": {"attributes": {"training": {}}}}), "to be numbers"),
        (dict(module_changes={"model": {"parameters": {"weight": [3]}}}), "has no parameter 'weight'"),
        (dict(module_changes={"model.norm": {"parameters": {"weight": [-3]}}}), "to be numbers"),
        (dict(module_changes={"model.norm": {"parameters": {"weight": [10**9, 2]}}}), "has no parameter"),
        (dict(module_changes={"model": {"config": {"_attn_implementation": "a/b"}}}), "to be numbers"),
        (dict(module_changes={"model": {"config": {"to_dict": 3}}}), "has no field"),
        (dict(module_changes={"model": {"alibi": {"heads": [0]}}}), "expected alibi"),
        (
            dict(module_changes={"model": {"alibi": {"heads": [2, 1], "of": 3, "argument": "a", "axis": 0}}}),
            "ascending",
        ),
    ],
)
def test_changes_of_modules_that_no_pruning_makes(hostile, fields, message):
    folder, mark = hostile
    edit(
        folder,
        "config.json",
        model_type="hywia_adaptive",
        **{"base_model_type": "llama", "module_changes": {}} | fields,
    )
    assert message in outcome(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(text_config={"auto_map": LLAMA}), "expected no auto_map here"),
        (dict(vision_config={"model_type": "timm_wrapper", "architecture": "hf-hub:a/b"}), "siglip_vision_model"),
        (
            dict(model_type="llava", vision_config={"model_type": "timm_wrapper", "architecture": "hf-hub:a/b"}),
            "expected a model_type that transformers has, got 'timm_wrapper'",
        ),
        (dict(model_type="llava", text_config={"model_type": "evil"}), "expected a model_type that transformers has"),
        (dict(fusion_config={"patch_embeddings": True}), "it patches model classes"),
        (dict(distributed_config={"tp_size": 2}), "it sets up processes"),
        (dict(transformers_weights="../other.safetensors"), "it names other files"),
        (dict(per_layer_config={"0": {"intermediate_size": 8}}), "layers differ"),
        (dict(to_dict=3), "would replace a method"),
        (dict(__class__="os"), "would replace a method"),
        (dict(get_text_config="x"), "would replace a method"),
        (dict(attn_implementation="someone/kernel"), "loaded"),
        (dict(_attn_implementation="someone/kernel"), "loaded"),
        (dict(_attn_implementation_internal="someone/kernel"), "loaded"),
        (dict(experts_implementation="someone/kernel"), "loaded"),
        (dict(custom_pipelines={"x": {"impl": "evil.Evil"}}), "loaded"),
        (dict(custom_generate="evil"), "loaded"),
    ],
)
def test_configs_that_ask_for_more_than_a_model(hostile, fields, message):
    folder, mark = hostile
    edit(folder, "config.json", **fields)
    assert message in outcome(folder, trust_remote_code=True)
    assert not mark.exists()


def test_kernels_that_a_config_names_are_not_chosen(hostile):
    folder, _ = hostile
    edit(folder, "config.json", attn_implementation="someone/kernel")
    assert hk.load(folder)[0].config._attn_implementation in ("sdpa", "eager")


def test_generation_is_transformers_own(hostile):
    folder, mark = hostile
    edit(folder, "generation_config.json", custom_generate="evil", trust_remote_code=True)
    model, _ = hk.load(folder, trust_remote_code=True)
    model.generate(torch.arange(4)[None], max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(quant_method="gptq", bits=4), r"is quantised \(gptq\); .*'hywia eval' takes it"),
        (dict(quant_method="bitsandbytes", load_in_4bit=True), r"quantised \(bitsandbytes\)"),
        (dict(load_in_8bit=True), r"quantised \(bitsandbytes\)"),
        (dict(quant_method="higgs"), r"quantised \(higgs\)"),
        (dict(quant_method="torchao", quant_type="int4_weight_only"), r"quantised \(torchao\)"),
        (dict(quant_method="evil.Quantizer"), "expected one of .*got 'evil.Quantizer'"),
        (dict(), "expected one of .*got None"),
        ("evil", "expected one of .*got None"),
    ],
)
@pytest.mark.parametrize("place", ["whole", "text_config"])
def test_quantised_checkpoints_are_refused_by_name_before_weights_are_read(hostile, fields, message, place):
    folder, mark = hostile
    (folder / "model.safetensors").write_bytes(b"not there yet")
    inner = dict(quantization_config=fields)
    edit(folder, "config.json", **(inner if place == "whole" else {"text_config": inner}))
    with pytest.raises(HywiaError, match=message):
        hk.load(folder)
    assert not mark.exists()


def test_adapters_do_not_replace_the_model(hostile):
    folder, mark = hostile
    for content in ({"base_model_name_or_path": "someone/else"}, {"auto_mapping": {"parent_library": "evil"}}):
        (folder / "adapter_config.json").write_text(json.dumps(content))
        assert "holds an adapter (adapter_config.json)" in outcome(folder, trust_remote_code=True)
    (folder / "adapter_config.json").unlink()
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")  # a file alone changes nothing
    assert outcome(folder) == "loaded"
    assert not mark.exists()


@pytest.fixture
def bomb(tmp_path):
    """`(what marks when it is unpickled, mark)`."""
    mark = tmp_path / "opened"

    class Bomb:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    return Bomb, mark


@pytest.mark.parametrize("beside", ["unrelated", "adapter_model", "consolidated", "model-00001-of-00001", "index"])
def test_pickles_beside_other_files(saved, bomb, beside, monkeypatch):
    made, mark = bomb
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was opened"))
    (saved / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "consolidated.00.pth", "vocab.pkl"):
        torch.save({"x": made()}, saved / name)
    (saved / ".metadata").write_bytes(pickle.dumps(made()))
    if beside == "index":
        weight_map = {"weight_map": {"x": "pytorch_model.bin"}}
        (saved / "model.safetensors.index.json").write_text(json.dumps(weight_map))
        (saved / "pytorch_model.bin.index.json").write_text(json.dumps(weight_map))
    else:
        save_file({"x": torch.zeros(1)}, saved / f"{beside}.safetensors")
    with pytest.raises(HywiaError):
        hk.load(saved)
    shutil.copy(saved / "pytorch_model.bin", saved / "model.safetensors")
    if beside == "index":
        (saved / "model.safetensors.index.json").unlink()
    with pytest.raises(HywiaError, match="pickle under another name"):
        hk.load(saved)
    assert not mark.exists()


def test_consolidated_and_adapters_beside_are_not_read(saved):
    want = load_file(saved / "model.safetensors")
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "model-00001-of-00002.safetensors"):
        save_file({k: v + 1 for k, v in want.items()}, saved / name)
    model, _ = hk.load(saved)
    assert torch.equal(model.model.embed_tokens.weight, want["model.embed_tokens.weight"])


def test_a_distributed_checkpoint_is_not_opened(saved, bomb):
    made, mark = bomb
    shutil.copy(saved / "model.safetensors", saved / "shard-00001-model-00001-of-00001.safetensors")
    (saved / ".metadata").write_bytes(pickle.dumps(made()))
    with pytest.raises(HywiaError, match="holds a distributed checkpoint"):
        hk.load(saved)
    assert not mark.exists()


def test_models_are_what_the_fixture_made(saved):
    """The fixture's own model loads: what the tests above refuse is refused for what they changed."""
    again, _ = hk.load(saved)
    assert torch.equal(again(torch.arange(9)[None]).logits, fresh(TINY[2])(torch.arange(9)[None]).logits)
