"""Quantised checkpoints that transformers turns into floating-point numbers: loaded, cut, written in 16 bits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.checkpoint import sources
from hywia_kernels.cli import main
from tests.support.families import randomised
from tests.support.tokenizers import byte_tokenizer

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}


def _marked(folder, **quantisation):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**values, "dtype": "bfloat16", "quantization_config": quantisation})
    )
    return folder


def _made(model_type, **fields):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(model_type, num_hidden_layers=2, vocab_size=131, **fields)
    return randomised(AutoModelForCausalLM.from_config(config)).to(torch.bfloat16)


def _fp8(folder):
    """A tiny LLaMA whose matrices lie in blocks of 16 by 16, one scale each; and what they stand for."""
    fields = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    model = _made("llama", **fields)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    wanted = {}
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        weight = tensors.pop(name).float()
        rows, columns = weight.shape
        blocks = weight.unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
        scale = blocks.abs().amax((1, 3)) / 448.0
        packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name] = packed.view(rows, columns)
        tensors[f"{name}_scale_inv"] = scale
        wanted[name] = (packed.float() * scale[:, None, :, None]).view(rows, columns)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return _marked(folder, **FP8), wanted


def test_blocks_of_fp8_are_dequantised_and_written_in_16_bits(tmp_path, capsys):
    folder, wanted = _fp8(tmp_path / "fp8")
    model, _ = hk.load(folder)
    assert len(wanted) == 14
    for name, weight in wanted.items():
        got = model.get_parameter(name)
        assert got.dtype == torch.bfloat16
        assert torch.allclose(got.float(), weight, rtol=8e-3, atol=0), name
    arguments = ["--group-ratio", "0.4", "--criterion", "magnitude", "--align", "1", "--no-eval"]
    assert main(["prune", str(folder), "-o", str(tmp_path / "small"), *arguments]) == 0
    assert (
        "the checkpoint is quantised (fp8); dequantised to bfloat16, in which it is written" in capsys.readouterr().out
    )
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert "quantization_config" not in config
    assert {t.dtype for t in load_file(tmp_path / "small" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "small" / "hywia.json").read_text())["dequantised"] == "fp8"
    again, _ = hk.load(tmp_path / "small")
    assert {g.units for g in hk.groups(again) if g.kind == "mlp"} == {29}


def test_blocks_of_mxfp4_are_dequantised(tmp_path):
    """gpt-oss's experts: 32 numbers of 4 bits share an exponent of two; the low half of a byte comes first."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
    fields = dict(hidden_size=64, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    model = _made("gpt_oss", num_local_experts=3, num_experts_per_tok=2, **fields)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    generator, wanted = torch.Generator().manual_seed(0), {}
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        groups = -(-inputs // 32)
        codes = torch.randint(0, 16, (experts, outputs, groups, 32), generator=generator)
        exponents = torch.randint(120, 126, (experts, outputs, groups), generator=generator)
        tensors[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{name}_scales"] = exponents.to(torch.uint8)
        wanted[name] = (values[codes] * 2.0 ** (exponents - 127.0)[..., None]).flatten(2).transpose(1, 2)
    assert len(wanted) == 4
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, _ = hk.load(_marked(tmp_path, quant_method="mxfp4"))
    for name, weight in wanted.items():
        assert torch.equal(loaded.get_parameter(name).float(), weight), name


def test_files_that_are_cut_as_they_lie_are_not_dequantised(tmp_path):
    folder, _ = _fp8(tmp_path)
    with pytest.raises(HywiaError, match=r"is quantised \(fp8\); .*load the model it was made from"):
        sources.judged(sources.located(folder), trusted=False, quantised=False)


def test_what_cannot_be_dequantised_is_refused_by_name(tmp_path, monkeypatch):
    folder, _ = _fp8(tmp_path)
    _marked(folder, quant_method="awq", bits=4)
    with pytest.raises(HywiaError, match=r"is quantised \(awq\); .*load the model it was made from"):
        hk.load(folder)
    _marked(folder, quant_method="compressed-tensors")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HywiaError, match=r"needs the package 'compressed_tensors': pip install compressed-tensors"):
        hk.load(folder)
