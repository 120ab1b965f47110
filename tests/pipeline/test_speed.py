"""`hywia bench`, `hywia report` and what they rest on."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.checkpoint import run_record
from hywia_kernels.cli import html_report, main
from hywia_kernels.deploy.speed import Case, cases, measure
from hywia_kernels.engine.static_driver import StaticDriver, drivable
from tests.support.tiny import TINY, fresh, make_plan


def test_the_static_driver_gives_the_models_logits(model, tokens):
    hk.prune(model, make_plan(model, "adaptive"))
    with torch.no_grad():
        want = model(tokens).logits
    before = {n: p.clone() for n, p in model.named_parameters()}
    driver = StaticDriver(model, len(tokens), tokens.shape[1], compile=False)
    torch.testing.assert_close(driver.prefill(tokens), want[:, -1], rtol=1e-4, atol=1e-4)
    fresh_cache = StaticDriver(model, len(tokens), tokens.shape[1], compile=False)
    for i in range(5):  # the cache is longer than what is in it
        got = fresh_cache.step(tokens[:, i : i + 1], torch.tensor([i]))
        torch.testing.assert_close(got, want[:, i], rtol=1e-4, atol=1e-4)
    assert drivable(model) is None
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_models_that_compute_something_else_are_not_driven(gqa):
    gqa.model.embed_tokens.register_forward_hook(lambda module, args, out: out)  # harmless: still driven
    assert drivable(gqa) is None
    gqa.config.sliding_window = 7
    assert (drivable(gqa, 7), drivable(gqa, 8)) == (None, "its attention slides over 7 tokens")
    gqa.config.sliding_window = None
    original = type(gqa.model).forward

    class Scaled(type(gqa.model)):
        def forward(self, *args, **kwargs):
            out = original(self, *args, **kwargs)
            out.last_hidden_state = out.last_hidden_state * 3.0
            return out

    gqa.model.__class__ = Scaled
    assert "does more than LLaMA's" in drivable(gqa)
    figures, reason = measure(gqa, [Case("decode", 1, 8)], runs=2)
    assert [f.mode for f in figures] == ["eager"]
    assert reason == drivable(gqa)


def test_measurements(gqa):
    figures, reason = measure(gqa, cases([1, 2], [8]), modes=("eager", "captured"), runs=3)
    assert reason is None
    assert [(f.phase, f.batch, f.mode) for f in figures] == [
        (p, b, m) for p in ("prefill", "decode") for b in (1, 2) for m in ("eager", "captured")
    ]
    for f in figures:
        tokens = f.batch * (8 if f.phase == "prefill" else 1)
        assert f.tokens_per_second == pytest.approx(tokens / f.ms * 1e3)
        assert 0 < f.ms_p20 <= f.ms <= f.ms_p80
        assert f.peak_bytes is None  # only CUDA counts


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: cases([0], [8]), "batch: expected positive numbers"),
        (lambda m: cases([1], []), "context: expected positive numbers"),
        (lambda m: measure(m, [], modes=("fast",)), "modes: expected some of eager, captured, static, got fast"),
        (lambda m: measure(m, [], runs=1), "runs: expected at least 2, got 1"),
    ],
)
def test_bad_requests(gqa, call, message):
    with pytest.raises(UsageError, match=message):
        call(gqa)


@pytest.mark.parametrize("many", [1, 10**6], ids=["a program a KV head", "pieces"])
def test_decode_attention_is_attention(many, monkeypatch):
    triton_kernel = pytest.importorskip("hywia_kernels.engine.decode_attention")
    if not torch.cuda.is_available() and not triton_kernel.triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is off")
    monkeypatch.setattr(triton_kernel, "MANY", many)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    for batch, heads, shared, length, size, position in (
        (2, 4, 2, 100, 16, 70),
        (1, 2, 1, 130, 32, 0),
        (1, 3, 3, 64, 16, 63),
        (3, 9, 3, 40, 16, 33),
    ):
        generator = torch.Generator().manual_seed(position)
        query = torch.randn((batch, heads, 1, size), generator=generator).to(place)
        keys, values = (torch.randn((batch, shared, length, size), generator=generator).to(place) for _ in range(2))
        mask = (torch.arange(length, device=place) <= position)[None, None, None]
        want = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=0.3, enable_gqa=True
        )
        keys[:, :, position + 1 :] = torch.nan  # what was there before, and is not to be read
        values[:, :, position + 1 :] = torch.nan
        got = triton_kernel.decode_attention(query, keys, values, torch.tensor([position], device=place), 0.3)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


class Tags(HTMLParser):
    """Balanced, and nothing that would be fetched or run."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        assert not {"src", "href"} & {name for name, _ in attributes}
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)


def parsed(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "script" not in tags.seen
    return tags.seen


def test_bench_and_report_of_a_pruning_run(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    small = ["--samples", "3", "--seq-len", "16", "--align", "4", "--block", "32", "--max-blocks", "3"]
    assert (
        main(["prune", "model", "-o", "out", "--ratio", "0.2", "--calib", "text.txt", "--text", "text.txt", *small])
        == 0
    )
    assert "predicted on" in capsys.readouterr().out
    options = ["--batch", "1", "2", "--context", "8", "--modes", "eager", "captured", "--runs", "3", "--record"]
    assert main(["bench", "model", "out", *options, "--json", "b.json", "--plot", "b.svg"]) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert [m["model"] for m in found["models"]] == ["model", "out"]
    assert [len(m["figures"]) for m in found["models"]] == [8, 8]
    assert all(f["speedup"] == f["ideal"] == 1.0 for f in found["models"][0]["figures"])
    assert all(f["ideal"] > 1.05 for f in found["models"][1]["figures"])
    assert found["models"][1]["kv_bytes_per_token"] <= found["models"][0]["kv_bytes_per_token"]
    drawn = ElementTree.fromstring((tmp_path / "b.svg").read_text())
    assert [e.tag.rpartition("}")[2] for e in drawn] == ["style", *["svg"] * 4]  # a figure a mode and phase
    record = json.loads((tmp_path / "out" / "hywia.json").read_text())
    assert record["bench"]["models"] == found["models"]
    assert record["evaluation"]["after"]["perplexity"] > 1
    assert main(["report", "out"]) == 0
    page = (tmp_path / "out.html").read_text()
    seen = parsed(page)
    lost = {r["kind"] for r in record["scores_summary"] if r["loss_removed"]}
    assert seen.count("svg") == 2 + len(lost) + 4  # scores and losses by kind; speed; widths are equal
    for word in ("Before and after", "Widths by layer", "Scores", "Speed", "How it was made"):
        assert f"<h2>{word}</h2>" in page
    assert f"{record['evaluation']['after']['perplexity']:.2f}" in page
    assert main(["eval", "out", "--text", "text.txt", "--block", "32", "--max-blocks", "3"]) == 0


def test_report_of_other_directories(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "model"]) == 1
    assert "it has no hywia.json" in capsys.readouterr().err
    (tmp_path / "model" / "hywia.json").write_text("[]")
    assert main(["report", "model"]) == 1
    assert "damaged" in capsys.readouterr().err
    assert main(["report", "model", "--html", "no/where.html"]) == 2
    assert main(["bench", "model", "--plot", "no/where.svg"]) == 2
    (tmp_path / "model" / "hywia.json").unlink()
    assert main(["bench", "model", "--record"]) == 2
    assert "none of the models is a directory with a hywia.json" in capsys.readouterr().err


def test_page_of_a_record_without_a_plan_escapes_what_it_shows():
    page = html_report.page({"versions": {"x": "<script>"}, "arguments": {}}, "a<b")
    parsed(page)
    assert "a&lt;b" in page
    assert "holds no plan" in page


def test_score_summary(gqa):
    scores = hk.score(gqa, torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1)))
    plan = hk.plan(scores, group_ratio=0.4, align=4)
    for row in run_record.score_summary(scores, plan):
        assert row["least_kept"] >= row["largest_removed"]
        assert row["quantiles"] == sorted(row["quantiles"])
        assert 0 < row["loss_removed"] < 1


def test_adding_to_a_record_that_is_not_there(tmp_path):
    from hywia_kernels.checkpoint.saving import add_to_record

    with pytest.raises(HywiaError, match=r"it has no hywia\.json"):
        add_to_record(tmp_path, {})


def test_a_head_cut_llama_is_stored_where_servers_read_the_heads_size(tokenizer, tmp_path):
    from transformers import AutoConfig

    for tiny, plan, kind in (
        (TINY[2], "attention", "mistral"),
        (TINY[2], "mlp", "llama"),
        (TINY[4], "attention", "llama"),
    ):
        model = fresh(tiny)
        hk.prune(model, make_plan(model, plan))
        folder = tmp_path / f"{tiny.name}-{plan}"
        hk.save(model, tokenizer, folder)
        config = AutoConfig.from_pretrained(folder)
        assert config.model_type == kind  # with biases there is no stand-in
        assert config.head_dim == 8
