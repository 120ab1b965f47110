"""Loading a GGUF file parses its header once, whatever transformers asks of it."""

from __future__ import annotations

import gguf

import hywia_kernels as hk
from hywia_kernels.checkpoint.loaded_weights import parsed_once


def test_a_load_parses_the_file_once(monkeypatch):
    parsed = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path, mode="r"):
            parsed.append(str(path))
            super().__init__(path, mode)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    model, tokenizer = hk.load("smollm2")
    assert [path.rpartition("/")[2] for path in parsed] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert gguf.GGUFReader is Counted
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer("The capital of France is")["input_ids"] == [504, 3575, 282, 4649, 314]


def test_other_code_meets_the_library_as_it_was():
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with parsed_once():
        assert gguf.GGUFReader is not before[0]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
