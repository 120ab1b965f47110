"""What is written is the model: compared before it is in its place, heads of their own kept, companions copied."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.checkpoint.decilm import write_decilm
from hywia_kernels.checkpoint.gguf import write_gguf
from tests.support.models import random_model, sizes
from tests.support.tiny import TINY, fresh, make_plan


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()


def _logits(model):
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(tokens).logits


def _same(folder, model):
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(_logits(again), _logits(model))
    return again


def _own_head(model):
    """As full fine-tuning under DeepSpeed leaves it: the config still says tied."""
    head = model.get_output_embeddings()
    noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(5))
    head.weight = torch.nn.Parameter(noise * 0.1)
    return model


@pytest.mark.parametrize("cut", ["none", "both", "adaptive"])
def test_a_head_of_its_own_is_kept(tmp_path, cut):
    model = _own_head(fresh(TINY[2]))
    assert model.config.tie_word_embeddings
    if cut != "none":
        hk.prune(model, make_plan(model, cut))
    hk.save(model, None, tmp_path / "out")
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    _same(tmp_path / "out", model)
    assert model.config.tie_word_embeddings, "the model in memory is the caller's"


def test_a_head_that_was_tied_by_hand_stays_so(tmp_path):
    model = fresh(TINY[1])
    model.lm_head.weight = model.model.embed_tokens.weight
    hk.save(model, None, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    again = _same(tmp_path / "out", model)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_served_formats_keep_it_too(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_token_list([f"t{i}" for i in range(259)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    model = _own_head(fresh(TINY[2]))
    # A matrix in another dtype than the embedding's is written in its own.
    model.model.layers[1].mlp.up_proj.weight.data = model.model.layers[1].mlp.up_proj.weight.data.bfloat16()
    tensors = {t.name: t for t in gguf.GGUFReader(write_gguf(model, tmp_path / "v.gguf", tmp_path / "o.gguf")).tensors}
    assert np.array_equal(tensors["output.weight"].data, model.lm_head.weight.detach().numpy())
    assert tensors["blk.1.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    got = torch.from_numpy(np.array(tensors["blk.1.ffn_up.weight"].data)).view(torch.bfloat16)
    assert torch.equal(got, model.model.layers[1].mlp.up_proj.weight)
    folder = write_decilm(model, None, tmp_path / "decilm")
    assert torch.equal(load_file(folder / "model.safetensors")["lm_head.weight"], model.lm_head.weight)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def _bit(state, name):
    state[name].view(torch.uint8).reshape(-1)[0] ^= 1


FAULTS = {
    "model.layers.1.mlp.up_proj.weight in model.safetensors is not what": lambda s: _bit(
        s, "model.layers.1.mlp.up_proj.weight"
    ),
    "expected model.norm.weight in .*, it was not written": lambda s: s.pop("model.norm.weight"),
    "holds extra.weight, which the model has not": lambda s: s.update({"extra.weight": torch.zeros(2)}),
    r"model.norm.weight: expected torch.float32 \(48,\).* got torch.float16": lambda s: s.update(
        {"model.norm.weight": s["model.norm.weight"].half()}
    ),
    r"model.norm.weight: expected torch.float32 \(48,\).* \(47,\)": lambda s: s.update(
        {"model.norm.weight": s["model.norm.weight"][:47].clone()}
    ),
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_was_written_wrongly_is_named_and_leaves_nothing(tmp_path, monkeypatch, message):
    model = fresh(TINY[2])
    hk.save(model, None, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    serialize = safetensors.torch.serialize_file

    def wrong(tensors, path, *args, **kwargs):
        serialize(tensors, path, *args, **kwargs)
        state = {name: t.clone() for name, t in load_file(path).items()}
        FAULTS[message](state)
        with monkeypatch.context() as patch:
            patch.setattr(safetensors.torch, "serialize_file", serialize)
            save_file(state, path, {"format": "pt"})

    monkeypatch.setattr(safetensors.torch, "serialize_file", wrong)
    with pytest.raises(HywiaError, match=message):
        hk.save(model, None, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    with pytest.raises(HywiaError, match=message):
        write_decilm(model, None, tmp_path / "decilm")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_scores_are_read_back(tmp_path, monkeypatch):
    serialize = safetensors.torch.serialize_file

    def wrong(tensors, path, *args, **kwargs):
        serialize(tensors, path, *args, **kwargs)
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    monkeypatch.setattr(safetensors.torch, "serialize_file", wrong)
    with pytest.raises(HywiaError, match="in scores.safetensors is not what"):
        hk.save_scores(tmp_path / "s", hk.score(fresh(TINY[2]), criterion="random"))
    assert list(tmp_path.iterdir()) == []


def test_matrices_shared_between_layers_are_written_for_each(tmp_path):
    model = fresh(TINY[2])
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    hk.save(model, None, tmp_path / "out")
    _same(tmp_path / "out", model)


def test_dtypes_that_loading_does_not_keep_are_told(tmp_path):
    model = fresh(TINY[1]).bfloat16()
    model.model.norm.weight.data = torch.rand(48, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match=r"model\.norm\.weight is stored in float32 as it is, but loading rounds"):
        hk.save(model, None, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    model.model.norm.weight.data = model.model.norm.weight.data.bfloat16().float()  # rounding loses nothing
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hk.save(model, None, tmp_path / "out", overwrite=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.model.norm.weight.float(), model.model.norm.weight)


def test_weights_that_are_not_in_memory_are_named(tmp_path):
    model = fresh(TINY[2])
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.empty(56, 48, device="meta"))
    with pytest.raises(
        HywiaError, match=r"layers\.0\.mlp\.up_proj\.weight: expected weights with values, got them on the meta device"
    ):
        hk.save(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_generation_config_that_contradicts_itself_is_kept(tmp_path):
    model = fresh(TINY[2])
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.6
    hk.save(model, None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.temperature == 0.6


def test_companions_are_copied_and_nothing_else(saved, tmp_path):
    wanted = {
        "preprocessor_config.json": '{"image_processor_type": "X", "auto_map": {"AutoImageProcessor": "evil.X"}}',
        "processor_config.json": "{}",
        "video_preprocessor_config.json": "{}",
        "chat_template.json": "{}",
        "vocab.json": "{}",
        "merges.txt": "",
        "tokenizer.model": "x",
        "added_tokens.json": '{"<pad>": 258}',
        "special_tokens_map.json": '{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}',
        "LICENSE": "terms",
        "USE_POLICY.md": "terms",
        "NOTICE.txt": "terms",
    }
    unwanted = {
        "evil.py": "raise SystemExit",
        "pytorch_model.bin": "x",
        "training_args.bin": "x",
        "consolidated.safetensors": "x",
        "adapter_model.safetensors": "x",
        "original.pth": "x",
        "LICENSE.py": "x",
        "notes.md": "x",
        "params.json": "{}",
        "tokenizer_config.json.bak": "x",
    }
    for name, text in {**wanted, **unwanted, "README.md": "# Model"}.items():
        (saved / name).write_text(text)
    model, tokenizer = hk.load(saved)
    hk.save(model, tokenizer, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert wanted.keys() <= names
    assert not names & unwanted.keys()
    assert (tmp_path / "out" / "README.original.md").read_text() == "# Model"
    card = (tmp_path / "out" / "README.md").read_text()  # of the new model, which the old one's is no card of
    assert "# Model\n" not in card
    assert "card of hywia_kernels" in card
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == {"image_processor_type": "X"}
    hk.save(model, tokenizer, tmp_path / "out", overwrite=True)  # all of it is accounted for
    again, tokenizer = hk.load(tmp_path / "out")
    tokenizer.eos_token = "<pad>"
    hk.save(again, tokenizer, tmp_path / "more")
    names = {p.name for p in (tmp_path / "more").iterdir()}
    assert "special_tokens_map.json" not in names, "it contradicts the tokenizer in memory"
    assert {"README.original.md", "added_tokens.json"} <= names
    hk.save(again, None, tmp_path / "none")
    names = {p.name for p in (tmp_path / "none").iterdir()}
    assert "preprocessor_config.json" in names
    assert not names & {"tokenizer.json", "vocab.json", "tokenizer.model"}


def test_phi_names_its_channels_where_vllm_reads_them(tmp_path):
    """vLLM 0.23.0, `phi.py`: `n_inner`, or four times the hidden size where there is none; tried on its CPU engine."""
    model = random_model("phi", **sizes(97, 32, 128, 2, 4, 4))
    hk.prune(model, hk.plan(hk.score(model, criterion="random", seed=5), group_ratio=0.5, units=("mlp",), align=4))
    hk.save(model, None, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["intermediate_size"], config["n_inner"], config["hidden_size"]) == (64, 64, 32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.model.layers[0].mlp.fc1.weight.shape == (64, 32)
