"""What cannot be loaded is refused by what is wrong with it."""

from __future__ import annotations

import json

import pytest

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.cli import main

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "mps:0", "hpu", "cpu:x", "", "cuda:-1", 3.5, None])
def test_devices_that_are_not_supported(saved, device):
    with pytest.raises(UsageError, match="device: .*(expected auto, cpu, cuda or cuda:N|not on this machine)"):
        hk.load(saved, device=device)


@pytest.mark.parametrize("model", ["", " ", None, 3, b"x"])
def test_names_of_nothing(model):
    with pytest.raises(UsageError, match="model: expected a hub id, a directory or a .gguf file"):
        hk.load(model)


@pytest.mark.parametrize("model", ["a\0b", "a b", "x" * 300, "-x-", "a/b/c", "~/nowhere", "..", "a//b"])
def test_names_of_no_model(model, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HywiaError, match="model: "):
        hk.load(model)


def test_no_tokenizer(saved, capsys):
    for file in saved.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(HywiaError, match=f"no tokenizer in {saved}: expected tokenizer.json"):
        hk.load(saved)
    assert main(["eval", str(saved)]) == 1
    assert f"no tokenizer in {saved}" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "Git LFS pointer, .*git lfs pull"),
        (b"", "it is empty"),
        (b"<!doctype html><title>Sign in</title>", "web page"),
    ],
)
def test_other_things_in_a_files_place(saved, file, content, message):
    (saved / file).write_bytes(content)
    with pytest.raises(HywiaError, match=rf"{saved}/{file}: .*{message}"):
        hk.load(saved)


@pytest.mark.parametrize(
    "content", ["[1]", "3", "null", '"llama"', "{", "nonsense", '{"model_type": NaN}', "[" * 99999]
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_json_that_is_no_object(saved, file, content):
    (saved / file).write_text(content)
    with pytest.raises(HywiaError, match=f"could not load {saved}/{file}: it is damaged: expected"):
        hk.load(saved)


@pytest.mark.parametrize("content", ["[1]", "{}", '{"version": "1.0"}', '{"model": {"type": "BPE"}}', "{"])
def test_a_damaged_tokenizer(saved, content):
    (saved / "tokenizer.json").write_text(content)
    with pytest.raises(HywiaError, match="could not load"):
        hk.load(saved)


@pytest.mark.parametrize(
    "content",
    [
        *("[1]", "3", "{", "", '{"max_length": "x"}', '{"eos_token_id": {}}', '{"eos_token_id": [1, "2"]}'),
        *('{"from_dict": 3}', '{"__class__": 3}', '{"temperature": "hot"}', '{"do_sample": "no"}', '{"top_k": [1]}'),
    ],
)
def test_a_damaged_generation_config(saved, content):
    (saved / "generation_config.json").write_text(content)
    with pytest.raises(HywiaError, match="generation_config.json"):
        hk.load(saved)


def test_a_usual_generation_config(saved):
    usual = dict(eos_token_id=[1, 2], temperature=0.6, top_p=0.9, do_sample=True, bos_token_id=None, max_length=64)
    (saved / "generation_config.json").write_text(json.dumps(usual))
    config = hk.load(saved)[0].generation_config
    assert {name: getattr(config, name) for name in usual} == usual


@pytest.mark.parametrize(
    "fields",
    [
        dict(vocab_size="abc"),
        dict(vocab_size=-3),
        dict(vocab_size=0),
        dict(hidden_size=48.5),
        dict(hidden_size=True),
        dict(num_hidden_layers=-1),
        dict(num_hidden_layers=None),
        dict(num_hidden_layers=10**9),
        dict(num_attention_heads=[6]),
        dict(num_key_value_heads="3"),
        dict(intermediate_size={}),
        dict(head_dim=0),
        dict(max_position_embeddings="long"),
        dict(dtype="load"),
        dict(dtype=3),
        dict(torch_dtype="float8_e4m3fn"),
        dict(tie_word_embeddings="false"),
        dict(text_config={"hidden_size": -1}),
    ],
)
def test_fields_of_another_type(saved, fields):
    (saved / "model.safetensors").write_bytes(b"not there yet")  # before weights are read
    edit(saved, **fields)
    name = "layers" if fields == dict(num_hidden_layers=10**9) else next(iter(fields.get("text_config", fields)))
    with pytest.raises(HywiaError, match=rf"config\.json.*: expected .*{name}"):
        hk.load(saved)


@pytest.mark.parametrize("fields", [dict(hidden_act="nonsense"), dict(rope_parameters="x"), dict(rms_norm_eps="a")])
def test_fields_that_the_family_refuses(saved, fields):
    edit(saved, **fields)
    with pytest.raises(HywiaError, match="could not load"):
        hk.load(saved)


@pytest.mark.parametrize("fields", [dict(hidden_size=96), dict(intermediate_size=57), dict(vocab_size=10**9)])
def test_sizes_of_another_model(saved, fields):
    edit(saved, **fields)
    with pytest.raises(HywiaError, match="has other shapes than its config says|could not load"):
        hk.load(saved)


@pytest.mark.parametrize("model_type", ["t5", "whisper", "lama", "LLAMA", 3, None, ["llama"], {}])
def test_a_family_that_is_not_supported(saved, model_type):
    (saved / "model.safetensors").write_bytes(b"not there yet")
    edit(saved, model_type=model_type)
    with pytest.raises(HywiaError) as refused:
        hk.load(saved)
    if model_type is not None:
        assert "which is not supported" in str(refused.value)
        assert "bloom, gemma, gemma2" in str(refused.value)
    assert ("did you mean 'llama'" in str(refused.value)) == (model_type == "lama")


def test_a_family_that_transformers_makes_of_another(saved):
    """A Mistral config with kinds of layers is a Ministral, which is not in the table."""
    edit(saved, model_type="mistral", layer_types=["full_attention"] * 3)
    with pytest.raises(HywiaError, match="for a ministral model, which is not supported"):
        hk.load(saved)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["params.json", "consolidated.00.pth"], "original layout .*convert_llama_weights_to_hf"),
        (["consolidated.safetensors", "params.json"], "original layout"),
        (["adapter_config.json", "adapter_model.safetensors"], "it is an adapter .*merge_and_unload"),
        (["small.gguf"], "name the GGUF file itself: .*small.gguf"),
        ([], r"has no config\.json; expected a directory written by save_pretrained"),
    ],
)
def test_directories_of_other_kinds(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(HywiaError, match=message):
        hk.load(tmp_path)


@pytest.mark.parametrize("content", [b"", LFS, b"<html>", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 60, b"junk"])
def test_gguf_files_that_are_none(tmp_path, content):
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(HywiaError, match="model: "):
        hk.load(tmp_path / "x.gguf")
