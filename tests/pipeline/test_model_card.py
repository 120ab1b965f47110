"""The model card that a written directory carries."""

from __future__ import annotations

import json
import re

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.checkpoint import model_card, run_record
from hywia_kernels.checkpoint.saving import add_to_record
from hywia_kernels.cli import main
from tests.support.tiny import TINY, fresh, make_plan

EVALUATION = {
    "text": {"name": "dir/words.txt", "sha256": "5f" * 32, "blocks": 40, "block": 128, "tokens": 5120, "bos": False},
    "device": "A device",
    "before": {
        "parameters": 2000,
        "bytes": 8000,
        "perplexity": 10.0,
        "tokens_per_second": 5.0,
        "continuation": "a ```` b",
    },
    "after": {"parameters": 1500, "bytes": 6000, "perplexity": 12.0, "tokens_per_second": 6.0, "continuation": "c"},
}


def cells(card):
    """Rows of the card's tables, without heads; cells end at a bar that no backslash precedes."""
    rows = [line for line in card.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| |"))]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_a_pruning_run_writes_its_card(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    (tmp_path / "model" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# A base\n")
    words = ["prune", "model", "-o", "out", "--ratio", "0.2", "--calib", "text.txt", "--text", "text.txt"]
    words += ["--samples", "8", "--seq-len", "16", "--align", "4", "--block", "32", "--max-blocks", "3"]
    assert main(words) == 0
    record = json.loads((tmp_path / "out" / "hywia.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert metadata_load(tmp_path / "out" / "README.md") == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "language": ["en"],
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "structured-pruning", "hywia"],
    }
    rows = cells(card)
    after = record["evaluation"]["after"]
    (perplexity,) = [r for r in rows if r[0] == "perplexity"]
    assert perplexity[2] == f"{after['perplexity']:.2f}"
    assert ["mlp", "56", run_record.spans(record["plan"]["widths"]["mlp"])] in rows
    assert ["samples", "8"] in rows
    assert f"```sh\nhywia {' '.join(words)}\n```" in card
    assert f"text.txt, SHA-256 {record['evaluation']['text']['sha256']}, 3 blocks of 32 tokens" in card
    assert "It is a stock checkpoint" in card
    assert "AutoModelForCausalLM.from_pretrained('out')" in card
    assert "arXiv:2403.10799" in card
    assert "partial" not in card  # of the folder's name while it is written
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")) == []


def test_a_model_without_evaluation_has_no_table_of_it(tmp_path):
    model = fresh(TINY[2])
    plan = make_plan(model, "adaptive")
    hk.prune(model, plan)
    hk.save(model, None, tmp_path / "out", plan=plan)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Before and after" not in card
    assert "The model was not evaluated when it was written." in card
    assert "Repeat it" in card
    assert "hywia prune" not in card
    assert "import hywia_kernels  # makes transformers know the layers" in card
    assert "`trust_remote_code=True` does" in card
    record = json.loads((tmp_path / "out" / "hywia.json").read_text())
    assert (
        model_card.model_card(record, None, tmp_path / "out") in card
    )  # the same from the config.json that was written
    assert "custom_code" in metadata_load(tmp_path / "out" / "README.md")["tags"]
    assert f"{100 * plan.ratio:.2f} %" in card


def test_the_card_is_renewed_until_somebody_edits_it(tmp_path):
    model = fresh(TINY[2])
    hk.save(model, None, tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    assert "12.00" not in card.read_text()
    add_to_record(tmp_path / "out", {"evaluation": EVALUATION})
    assert ["perplexity", "10.00", "12.00", "1.200"] in cells(card.read_text())
    card.write_text(card.read_text().replace("# out", "# My model"))
    edited = card.read_text()
    add_to_record(tmp_path / "out", {"evaluation": None})
    assert card.read_text() == edited
    card.write_bytes(b"\xff\xfe not text")
    add_to_record(tmp_path / "out", {"evaluation": EVALUATION})
    assert card.read_bytes() == b"\xff\xfe not text"
    card.unlink()
    (tmp_path / "elsewhere").write_text("x")
    card.symlink_to(tmp_path / "elsewhere")
    add_to_record(tmp_path / "out", {"evaluation": EVALUATION})
    assert (tmp_path / "elsewhere").read_text() == "x"


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("owner/name", "owner/name"),
        ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("gpt2", None),
        ("./local", None),
        ("/a/b/models/x", None),
        ("owner/name\nlicense: evil", None),
        ("owner/na me", None),
        ("x.gguf", None),
        ("o" * 5000, None),
        ("x\0y/z", None),
        (None, None),
    ],
)
def test_only_a_name_on_the_hub_is_a_base_model(base, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = ModelCard(model_card.model_card({}, base, tmp_path / "out"))
    assert card.data.base_model == named
    assert card.data.license is None
    assert (f"[{named}](https://huggingface.co/{named})".replace("_", r"\_") in card.text) == (named is not None)


def test_a_snapshot_of_the_hubs_cache_and_a_second_cut_name_their_base(tmp_path):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nbase_model: x/y\n---\n"
    )
    first = ModelCard(model_card.model_card({}, str(snapshot), tmp_path / "one")).data
    assert first.base_model == "owner/name"
    assert (first.license, first.license_name) == ("other", "own")
    assert first.license_link == "https://huggingface.co/owner/name/blob/main/LICENSE"
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "README.md").write_text(model_card.model_card({}, str(snapshot), tmp_path / "one"))
    second = ModelCard(model_card.model_card({}, str(tmp_path / "one"), tmp_path / "two")).data
    assert (second.base_model, second.license, second.license_link) == (
        "owner/name",
        "other",
        "https://huggingface.co/owner/name/blob/main/LICENSE",
    )


@pytest.mark.parametrize(
    "head",
    [
        "license: [a, b]",
        "license: 'mit\n\n  ---\n\n  # x'",
        "license: <script>",
        "license: {a: [}",
        "- a list",
        "license_link: javascript:x",
        "license_link: ../../secret",
        "language: [en, '</x>']",
        "license: !!python/object/apply:os.getcwd []",
        "tags: hywia\nbase_model: a/b",
    ],
)
def test_of_a_bases_damaged_card_nothing_is_copied(tmp_path, head):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(f"---\n{head}\n---\n# x\n")
    data = ModelCard(model_card.model_card({}, str(base), tmp_path / "out")).data.to_dict()
    assert sorted(data) == ["library_name", "pipeline_tag", "tags"]


EVIL = (
    "x](http://evil.example) | `a` **b** <script>alert(1)</script> $x$ ~~s~~ ![i](j) www.evil.example &lt; \n---\n"
    "license: evil\n\n# H\x1b\u202e\ud800"
)


def test_what_users_wrote_is_text_and_no_markup(tmp_path):
    record = {
        "versions": {EVIL: EVIL},
        "arguments": {"model": EVIL, "argv": ["prune", EVIL, "````"]},
        "plan": {
            "parameters_before": 4,
            "parameters_after": 3,
            "layout": EVIL,
            "widths": {EVIL: [1]},
            "scores": {"statistics": {"calib": EVIL}},
        },
        "not_stock": EVIL,
        "evaluation": {
            **EVALUATION,
            "text": {"name": EVIL, "block": 2},
            "device": EVIL,
            "after": {**EVALUATION["after"], "continuation": EVIL + "\n```\n# Out"},
        },
    }
    (tmp_path / "config.json").write_text('{"model_type": "hywia_adaptive", "auto_map": {}}')
    text = model_card.model_card(record, EVIL, tmp_path, name=EVIL)
    text.encode("utf-8")
    card = ModelCard(text)
    assert sorted(card.data.to_dict()) == ["library_name", "pipeline_tag", "tags"]
    body = re.sub(r"^(`{3,})\w+\n.*?\n\1$", "", card.text, flags=re.DOTALL | re.MULTILINE)  # without blocks of code
    assert "`````sh" in card.text  # longer than the four in the command
    assert not re.search(r"(?<!\\)<", body.split("<!--")[0])
    assert not re.search(r"(?<!\\)\]\(http://evil", body)
    assert not re.search(r"://evil|www\.evil|\x1b|\u202e", body)
    assert [line for line in body.splitlines() if line.startswith("# ")] == [body.strip().splitlines()[0]]
    assert {len(row) for row in cells(body)} == {2, 3, 4}
    (layout,) = [row for row in cells(body) if row[0] == "layout"]
    unescaped = re.sub(r"\\([^\w\s])", r"\1", layout[1])
    assert unescaped == " ".join(run_record.plain(EVIL).split())


def test_fences_are_longer_than_what_they_hold(tmp_path):
    card = model_card.model_card({"evaluation": EVALUATION}, None, tmp_path / "out")
    assert "`````text\na ```` b\n`````" in card


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama"}, "It is a stock checkpoint"),
        (
            {"model_type": "baichuan", "auto_map": {"AutoConfig": "c.C"}},
            "Its architecture is Python code that the checkpoint carries",
        ),
        (
            {"model_type": "baichuan", "auto_map": {"AutoConfig": "c.C"}, "module_changes": {}},
            "it needs hywia\\_kernels and `trust_remote_code=True`",
        ),
        ({"model_type": "hywia_adaptive", "auto_map": {}, "module_changes": {}}, "Without the package"),
        ([], "It is a stock checkpoint"),
    ],
)
def test_how_it_loads_follows_the_config(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert words in model_card.model_card({}, None, tmp_path)


def test_a_recorded_recipe_is_the_cards_recipe(tmp_path):
    record = {
        "recipe": {"ratio": 0.5, "head_ranking": True, "layers": None, "group_ratio": {"mlp": 0.5}},
        "plan": {"layout": "uniform"},
    }
    rows = cells(model_card.model_card(record, None, tmp_path))
    assert rows[1:] == [["ratio", "0.5"], ["head ranking", "yes"], ["group ratio", "mlp 0.5"]]


@pytest.mark.parametrize(
    "record", [{"plan": 3, "history": 4, "versions": 5, "evaluation": []}, {"plan": {"widths": {"mlp": "x"}}}]
)
def test_records_of_other_shapes_make_a_card(tmp_path, record):
    assert model_card.write_card(tmp_path, record, name="m")
    assert "# m" in (tmp_path / "README.md").read_text()
    assert "## Widths" not in (tmp_path / "README.md").read_text()


def test_a_card_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(HywiaError, match="cannot write"):
        model_card.write_card(tmp_path / "absent", {})


def test_the_card_is_there_before_what_makes_a_directory_load(tmp_path, monkeypatch):
    """A killed run must leave nothing that loads: the weights and the config come after everything else."""
    model = fresh(TINY[2])
    present = []
    write = model_card.write_card

    def watched(folder, *arguments, **options):
        present.append(sorted(p.name for p in folder.iterdir()))
        return write(folder, *arguments, **options)

    monkeypatch.setattr(model_card, "write_card", watched)
    hk.save(model, None, tmp_path / "out")
    assert present == [["hywia.json"]]
