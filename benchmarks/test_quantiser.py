"""What llama.cpp's quantiser makes of rows of any length, and whether the rules that name it say so.

Tried with cyllama 0.2.18, which holds llama.cpp b9190; needs `pip install cyllama gguf`.
"""

from __future__ import annotations

import pytest
import torch

from hywia_kernels.deploy import serving_rules
from hywia_kernels.types import Group, Member

from . import gguf_files

gguf = pytest.importorskip("gguf")
pytest.importorskip("cyllama", reason="cyllama: llama.cpp's quantiser, tried with 0.2.18 (llama.cpp b9190)")

HIDDEN = 256
DOWN, UP = "blk.0.ffn_down.weight", "blk.0.ffn_up.weight"


@pytest.fixture(params=[512, 288, 272, 100])
def file(request, tmp_path):
    """A LLaMA of one layer with so many channels, and its file in float16."""
    width = request.param
    path = tmp_path / "floats.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (64, HIDDEN), "output": (64, HIDDEN)}
    shapes |= {f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (width, HIDDEN), "blk.0.ffn_up": (width, HIDDEN), "blk.0.ffn_down": (HIDDEN, width)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (0.02 * torch.randn(shape, generator=generator)).half().numpy())
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(HIDDEN).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return width, path


def admits(rule, width):
    """Whether the rule of this name takes an MLP of so many channels."""
    group = Group("0.mlp", "mlp", 0, width, "channel", (Member("up", 0, 1), Member("down", 1, 1)), 1)
    (found,) = serving_rules.constraints((rule,))
    return found.admits(group, width)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_formats_in_blocks_refuse_the_rows_that_their_rule_excludes(file, tmp_path, name):
    width, path = file
    target = tmp_path / "out.gguf"
    if admits("llama.cpp.blocks", width):
        assert gguf_files.types(gguf_files.quantised(path, target, name))[DOWN] == name
        return
    with pytest.raises(RuntimeError, match=f"no tensor type fallback is defined for type {name.lower()}"):
        gguf_files.quantised(path, target, name)
    assert not target.exists()


def test_k_quants_fall_back_where_their_rule_excludes_rows(file, tmp_path):
    width, path = file
    made = gguf_files.types(gguf_files.quantised(path, tmp_path / "out.gguf", "Q4_K_M"))
    assert made[UP] == "Q4_K", "rows of the hidden size, which no cut changes"
    if admits("llama.cpp.k_quants", width):
        assert made[DOWN] == "Q6_K"
    else:
        assert made[DOWN] == ("Q8_0" if admits("llama.cpp.blocks", width) else "F16")
    assert admits("llama.cpp.blocks", width) == (width in (512, 288))
    assert admits("llama.cpp.k_quants", width) == (width == 512)
