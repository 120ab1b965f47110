"""The runner of served checkpoints at sizes that take seconds; llama.cpp where its bindings are installed."""

from __future__ import annotations

import argparse
import math
import sys

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.evaluation import blocks
from hywia_kernels.method.reading import bundled_text
from tests.support.cuts import make_plan
from tests.support.tiny import TINY, fresh
from tests.support.tokenizers import byte_tokenizer

from . import bench_served, gguf_files, rows
from .served_agreement import Reference
from .served_engines import Engine, LlamaCpp, RefusedError, Transformers, VllmSettings

CPU = torch.device("cpu")
SIZES = ["--device", "cpu", "--context", "5", "--new", "3", "--runs", "1", "--seed", "3"]


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny pruned model; its tokens are bytes."""
    model = fresh(TINY[2])
    hk.prune(model, make_plan(model, "both"))
    path = tmp_path / "pruned"
    hk.save(model, byte_tokenizer(), path)
    return str(path)


@pytest.fixture
def vocabulary(tmp_path):
    """As llama.cpp's converter would write it for the byte tokenizer."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = byte_tokenizer().convert_ids_to_tokens(list(range(259)))
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 3)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(path)


def test_rows_of_transformers(checkpoint, tmp_path):
    path = tmp_path / "served.csv"
    argv = [checkpoint, "--engines", "transformers", "--sequences", "1", "2", "--blocks", "2", "--csv", str(path)]
    assert bench_served.main([*argv, *SIZES]) == 0
    made = rows.read(path)
    assert [(row["engine"], row["format"], row["sequences"]) for row in made] == [
        ("transformers", "float32", "1"),
        ("transformers", "float32", "2"),
    ]
    model, tokenizer = hk.load(checkpoint)
    want = hk.perplexity(model, blocks(tokenizer, bundled_text(), max_blocks=2))
    for row in made:
        assert (row["error"], row["asked"], row["same"], row["parted"], row["gap"]) == ("", "192", "192", "0", "")
        assert float(row["perplexity"]) == pytest.approx(want, rel=1e-4)
        assert int(row["parameters"]) == sum(p.numel() for p in model.parameters())
        assert float(row["tokens_per_second"]) > 0 < float(row["first_ms"])


@pytest.mark.skipif("vllm" in sys.modules, reason="vLLM is there")
def test_an_engine_that_is_not_there_is_named_in_its_row(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    path = tmp_path / "served.csv"
    assert bench_served.main([checkpoint, "--engines", "vllm", "--csv", str(path), *SIZES]) == 0
    (row,) = rows.read(path)
    assert (row["engine"], row["sequences"], row["tokens_per_second"]) == ("vllm", "", "")
    assert "vllm" in row["error"]


def test_where_tokens_part(checkpoint):
    reference = Reference(checkpoint, "float32", CPU, new=4)
    written = [list(tokens) for tokens in reference.tokens]
    assert vars(reference.against(written)) == {"asked": 32, "same": 32, "parted": 0, "gap": None}
    other = (written[1][2] + 1) % 259
    written[1][2] = other
    told = reference.against(written)
    with torch.no_grad():
        logits = reference.model(torch.tensor([[*reference.prompts[1], *written[1][:2]]])).logits[0, -1]
    assert (told.asked, told.same, told.parted) == (32, 30, 1)
    assert told.gap == pytest.approx(float(logits.max() - logits[other]), abs=1e-5)


def test_time_to_the_first_token_and_rate(monkeypatch):
    class Slow:
        """Takes a second for a prompt's token and a tenth for one that it writes."""

        now = 0.0

        def write(self, prompts, new):
            Slow.now += sum(map(len, prompts)) + 0.1 * len(prompts) * (new - 1)
            return [[0] * new for _ in prompts]

        def held(self):
            return 7

        def kv_tokens(self):
            return None

    monkeypatch.setitem(bench_served.CLOCKS, "wall", lambda: Slow.now)
    engine: Engine = Slow()  # type: ignore[assignment]
    figures = bench_served.speed(engine, sequences=2, context=3, new=11, vocabulary=9, runs=3, clock="wall")
    assert figures["first_ms"] == pytest.approx(6000)
    assert figures["tokens_per_second"] == pytest.approx(22 / 8)
    assert (figures["memory_bytes"], figures["kv_tokens"]) == (7, None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--engines", "llama.cpp"], "--vocabulary: llama.cpp needs one"),
        (["--engines", "vllm", "--clock", "process"], "measure it by wall"),
    ],
)
def test_arguments_that_do_not_go(capsys, more, message):
    with pytest.raises(SystemExit):
        bench_served.main(["smollm2", *more])
    assert message in capsys.readouterr().err


def test_what_vllm_is_asked_for():
    assert VllmSettings().arguments() == {"tensor_parallel_size": 1, "enforce_eager": False}
    parser = argparse.ArgumentParser()
    bench_served.add_vllm(parser)
    flags = "--tensor-parallel 2 --eager --share 0.5 --dummy --quantization fp8 --attention TRITON_ATTN --remote"
    given = vars(parser.parse_args([*flags.split(), "--implementation", "transformers"]))
    assert VllmSettings(**given).arguments() == {
        **{"tensor_parallel_size": 2, "enforce_eager": True, "gpu_memory_utilization": 0.5, "load_format": "dummy"},
        **{"skip_tokenizer_init": True, "quantization": "fp8", "attention_backend": "TRITON_ATTN"},
        **{"trust_remote_code": True, "model_impl": "transformers"},
    }


def test_llama_cpp_writes_the_same(checkpoint, vocabulary, tmp_path):
    pytest.importorskip("xllamacpp")
    pytest.importorskip("cyllama")
    path = tmp_path / "served.csv"
    argv = [checkpoint, "--engines", "transformers", "llama.cpp", "--vocabulary", vocabulary, "--formats", "F16"]
    more = ["Q8_0", "--sequences", "2", "--blocks", "2"]
    assert bench_served.main([*argv, *more, "--csv", str(path), *SIZES]) == 0
    own, floats, refused = rows.read(path)
    assert (floats["engine"], floats["format"], floats["error"]) == ("llama.cpp", "F16", "")
    assert int(floats["same"]) == 192 or float(floats["gap"]) < 0.01
    assert float(floats["perplexity"]) == pytest.approx(float(own["perplexity"]), rel=1e-3)
    assert refused["format"] == "Q8_0"
    assert "no tensor type fallback is defined for type q8_0" in refused["error"]  # rows of 48


def test_what_llama_cpp_says_of_a_file_that_it_does_not_load(tmp_path):
    pytest.importorskip("xllamacpp")
    path = tmp_path / "none.gguf"
    path.write_bytes(b"GGUF1234")
    with pytest.raises(RefusedError, match="failed to load model from"):
        LlamaCpp(path, 1, 8)


def test_prompts_of_several_lengths(checkpoint):
    engine = Transformers(checkpoint, CPU)
    short, long = [5, 6], [7, 8, 9]
    both = engine.write([short, long], 4)
    assert both == [engine.write([short], 4)[0], engine.write([long], 4)[0]]
    assert [len(tokens) for tokens in both] == [4, 4]
    assert math.isfinite(engine.held() or 0)


def test_formats_are_llama_cpps():
    library = pytest.importorskip("cyllama.llama.llama_cpp")
    gguf = pytest.importorskip("gguf")
    names = {f"MOSTLY_{name}": number for name, number in gguf_files.FORMATS.items()}
    assert {name: int(gguf.LlamaFileType[name]) for name in names} == names
    assert library.LlamaModelQuantizeParams() is not None
