"""Hub ids: the description is fetched and judged first, then the files of the weights, and nothing else."""

from __future__ import annotations

import fnmatch
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from tests.support.tiny import TINY, fresh

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """`(what the hub offers, files fetched so far)`; the download takes patterns as the hub's client does."""
    fetched: list[str] = []
    cache = tmp_path / "hub" / "snapshots" / COMMIT

    def snapshot_download(name, *, allow_patterns, ignore_patterns, revision=None):
        assert name == "someone/model"
        # The weights come from the commit whose description was judged.
        assert revision == (None if "*.json" in allow_patterns else COMMIT)
        cache.mkdir(parents=True, exist_ok=True)
        for path in sorted(saved.rglob("*")):
            relative = str(path.relative_to(saved))
            taken = any(fnmatch.fnmatch(relative, pattern) for pattern in allow_patterns)
            if path.is_file() and taken and not any(fnmatch.fnmatch(relative, p) for p in ignore_patterns):
                target = cache / relative
                if not target.exists():
                    shutil.copy(path, target)
                    fetched.append(relative)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for name in ("pytorch_model.bin", "evil.py", "README.md", "consolidated.safetensors", "tf_model.h5", "model.gguf"):
        (saved / name).write_bytes(b"x")
    (saved / "onnx").mkdir()
    (saved / "onnx" / "config.json").write_text("{}")
    return saved, fetched


def test_weights_come_last_and_alone(hub):
    _, fetched = hub
    model, tokenizer = hk.load("someone/model")
    assert fetched[-1] == "model.safetensors"
    assert set(fetched) >= {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert not [name for name in fetched if name.endswith((".bin", ".py", ".md", ".h5", ".gguf")) or "/" in name]
    assert "consolidated.safetensors" not in fetched
    assert model.name_or_path == model.config.name_or_path == tokenizer.name_or_path == "someone/model"
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, fresh(TINY[2])(ids).logits)


def test_shards_are_those_of_the_index(hub):
    folder, fetched = hub
    (folder / "model.safetensors").unlink()
    fresh(TINY[2]).save_pretrained(folder, max_shard_size="60KB")
    names = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(names) > 2
    save_file({"x": torch.zeros(1)}, folder / "model-00009-of-00009.safetensors")
    hk.load("someone/model")
    assert {name for name in fetched if name.endswith(".safetensors")} == names


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", dict(model_type="t5"), "model_type 't5'"),
        ("config.json", dict(model_type="lama"), "did you mean 'llama'"),
        ("config.json", dict(vocab_size="abc"), "expected vocab_size to be a whole number above 0, got 'abc'"),
        ("config.json", dict(quantization_config={"quant_method": "awq"}), r"quantised \(awq\)"),
        ("config.json", dict(model_type="baichuan", max_position_embeddings=None), "."),
        ("adapter_config.json", dict(base_model_name_or_path="a/b"), "holds an adapter"),
        ("model.safetensors.index.json", dict(weight_map={"a": "../../x.safetensors"}), "file of the same directory"),
        ("model.safetensors.index.json", dict(weight_map={"a": "pytorch_model.bin"}), "never loaded"),
    ],
)
def test_refused_before_any_weight_is_fetched(hub, file, fields, message):
    folder, fetched = hub
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**content, **fields}))
    with pytest.raises(HywiaError, match=message):
        hk.load("someone/model")
    assert "config.json" in fetched
    assert not [name for name in fetched if name.endswith((".safetensors", ".py"))]


def test_a_model_of_pickles_alone(hub):
    folder, fetched = hub
    (folder / "model.safetensors").unlink()
    with pytest.raises(HywiaError, match=r"someone/model has neither model\.safetensors nor .* pickles"):
        hk.load("someone/model")
    assert "pytorch_model.bin" not in fetched


def test_code_is_fetched_for_trust_only(hub):
    folder, fetched = hub
    config = json.loads((folder / "config.json").read_text())
    config.pop("max_position_embeddings")
    config |= dict(model_type="baichuan", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HywiaError, match="pass --trust-remote-code"):
        hk.load("someone/model")
    assert not [name for name in fetched if name.endswith((".safetensors", ".py"))]
    with pytest.raises(HywiaError, match="could not load 'someone/model'"):  # evil.py holds no such class
        hk.load("someone/model", trust_remote_code=True)
    assert "evil.py" in fetched


def test_revision_token_and_cache_reach_the_hub(saved, tmp_path, monkeypatch):
    """The description comes of the revision, the weights of the commit that it was; the client gets its options."""
    asked = []
    cache = tmp_path / "hub" / "snapshots" / COMMIT

    def snapshot_download(name, **options):
        asked.append({k: options.get(k) for k in ("revision", "token", "cache_dir")})
        shutil.copytree(saved, cache, dirs_exist_ok=True)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    hk.load("someone/model", revision="v2", token="secret", cache_dir=tmp_path / "cache")
    theirs = {"token": "secret", "cache_dir": tmp_path / "cache"}
    assert asked == [{"revision": "v2", **theirs}, {"revision": COMMIT, **theirs}]
    with pytest.raises(UsageError, match=r"revision: goes with a hub id, got 'v2'"):
        hk.load(saved, revision="v2")
