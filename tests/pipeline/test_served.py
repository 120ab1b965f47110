"""What servers' files of models whose layers differ in width hold. (That llama.cpp runs them is tried by hand.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.checkpoint.decilm import ffn_mult, write_decilm
from hywia_kernels.checkpoint.gguf import _interleaved, write_gguf
from hywia_kernels.cli import main
from tests.support.tiny import TINY, fresh, make_plan
from tests.support.tokenizers import write_vocabulary

gguf = pytest.importorskip("gguf")


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocabulary.gguf"
    write_vocabulary(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_widths_and_weights_by_layer(vocabulary, tmp_path, dtype):
    model = fresh(TINY[2]).to(dtype)
    hk.prune(model, make_plan(model, "adaptive"))
    reader = gguf.GGUFReader(write_gguf(model, vocabulary, tmp_path / "out.gguf"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "deci"
    assert fields["deci.feed_forward_length"] == [56, 32, 32]
    assert fields["deci.attention.head_count"] == [6, 4, 4]
    assert fields["deci.attention.head_count_kv"] == [3, 2, 2]
    assert (fields["deci.attention.key_length"], fields["deci.rope.dimension_count"]) == (8, 8)
    assert fields["tokenizer.ggml.tokens"][:2] == ["t0", "t1"]
    assert fields["tokenizer.ggml.merges"] == ["t1 t2"]
    tensors = {t.name: t for t in reader.tensors}
    assert "output.weight" not in tensors  # tied
    for name, want in (
        ("blk.1.ffn_down.weight", model.model.layers[1].mlp.down_proj.weight),
        ("blk.2.attn_k.weight", _interleaved(model.model.layers[2].self_attn.k_proj.weight, 8)),
        ("token_embd.weight", model.model.embed_tokens.weight),
    ):
        got = tensors[name].data
        if dtype == torch.bfloat16:
            got = torch.from_numpy(np.array(got)).view(torch.bfloat16)
        assert torch.equal(torch.as_tensor(np.array(got)) if dtype != torch.bfloat16 else got, want.detach())
    norm = tensors["blk.0.attn_norm.weight"].data
    assert norm.dtype == np.float32
    assert np.array_equal(norm, model.model.layers[0].input_layernorm.weight.detach().float().numpy())


def test_interleaving_turns_halves_into_pairs():
    rows = torch.arange(8)[:, None].float().expand(8, 3)
    assert _interleaved(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_what_does_not_fit_is_refused(vocabulary, tmp_path):
    biased = fresh(TINY[4])
    with pytest.raises(HywiaError, match="expected biases False, got True"):
        write_gguf(biased, vocabulary, tmp_path / "x.gguf")
    model = fresh(TINY[2])
    model.config.hidden_act = "gelu"
    with pytest.raises(HywiaError, match="expected hidden_act silu, got gelu"):
        write_gguf(model, vocabulary, tmp_path / "x.gguf")
    model.config.hidden_act = "silu"
    (tmp_path / "text").write_text("x")
    with pytest.raises(UsageError, match="is no GGUF file"):
        write_gguf(model, tmp_path / "text", tmp_path / "x.gguf")
    model.resize_token_embeddings(260)
    with pytest.raises(UsageError, match="expected 260 tokens as the model has, .* has 259"):
        write_gguf(model, vocabulary, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_export_command(saved, vocabulary, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "model", "-o", "m.gguf", "--vocabulary", "vocabulary.gguf"]) == 0
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["deci.block_count"].contents() == 3
    assert main(["export", "model", "-o", "m.gguf", "--vocabulary", "vocabulary.gguf"]) == 2
    assert "exists; choose another file" in capsys.readouterr().err
    assert main(["export", "model", "-o", "n.gguf"]) == 2
    assert "vocabulary: goes with --format gguf" in capsys.readouterr().err


def vllm_width(ffn, hidden):
    """As vLLM's nemotron_nas.py reads a block."""
    if not hasattr(ffn, "ffn_mult"):
        return ffn.intermediate_size
    made = int(2 * ffn.ffn_mult * hidden / 3)
    return made if made % 256 == 0 else made + 256 - made % 256


@pytest.mark.parametrize("hidden", [576, 2048, 4096, 5120])
def test_every_width_of_whole_256s_has_a_multiplier(hidden):
    for width in range(256, 16384, 256):
        assert vllm_width(type("ffn", (), {"ffn_mult": ffn_mult(width, hidden)}), hidden) == width
    assert ffn_mult(300, hidden) is None


def test_decilm_blocks(tmp_path, tokenizer, monkeypatch):
    from safetensors.torch import load_file
    from transformers import AutoConfig

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = fresh(TINY[2])
    scores = hk.score(model, criterion="random", seed=5)
    hk.prune(model, hk.plan(scores, group_ratio=0.4, layers=(1, 3), units=("mlp",), align=4))
    folder = write_decilm(model, tokenizer, tmp_path / "out")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.architectures == ["DeciLMForCausalLM"]
    assert [vllm_width(b.ffn, config.hidden_size) for b in config.block_configs] == [56, 32, 32]
    assert [config.num_attention_heads // b.attention.n_heads_in_group for b in config.block_configs] == [3, 3, 3]
    assert not any(b.attention.no_op or b.ffn.no_op for b in config.block_configs)
    assert (config.head_dim, config.num_key_value_heads) == (8, 3)
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert again.block_configs == config.block_configs
    state = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in state  # tied
    assert torch.equal(state["model.layers.1.mlp.down_proj.weight"], model.model.layers[1].mlp.down_proj.weight)


def test_decilm_needs_equal_heads(tmp_path):
    model = fresh(TINY[2])
    hk.prune(model, make_plan(model, "adaptive"))
    with pytest.raises(HywiaError, match=r"as many heads in every layer, got \[2, 3\]; plan with --units mlp"):
        write_decilm(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
