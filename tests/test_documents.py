"""What the documents say is what is there: files, links, commands, names and the figures of quality."""

from __future__ import annotations

import csv
import itertools
import math
import re
import shlex
from pathlib import Path

import pytest

import hywia_kernels as hk
from hywia_kernels.cli import parser
from tests.support import documents as support

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hywia_kernels"
DOCUMENTS = [*support.DOCUMENTS, ROOT / "CONTRIBUTING.md"]
NAMES = [str(document.relative_to(ROOT)) for document in DOCUMENTS]


def _blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _drawn(text: str) -> list[str]:
    """Python files that CONTRIBUTING draws, relative to the package."""
    tree = next(block for block in _blocks(text) if block.startswith("hywia_kernels/\n"))
    files, folders = [], list[str]()
    for line in itertools.takewhile(lambda line: line.startswith(" "), tree.splitlines()[1:]):
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = [*folders[: depth - 1], name.rstrip("/")]
        if name.endswith(".py"):
            files.append("/".join(folders))
    return files


def test_contributing_draws_every_file_once():
    """If it fails: draw the file that is new, or take out the one that is gone."""
    drawn = _drawn((ROOT / "CONTRIBUTING.md").read_text())
    files = {str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py")}
    assert sorted(drawn) == sorted(f for f in files if f == "__init__.py" or not f.endswith("/__init__.py"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    assert [link for link in links if "://" not in link and not _leads(document, link)] == []


def _leads(document: Path, link: str) -> bool:
    """Whether there is such a file, and such a heading in it where the link names one."""
    name, _, anchor = link.partition("#")
    target = document.parent / name if name else document
    return target.exists() and (not anchor or anchor in _anchors(target.read_text()))


def _anchors(text: str) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}


def test_links_to_headings():
    assert _leads(ROOT / "README.md", "docs/models.md#what-is-loaded")
    assert not _leads(ROOT / "README.md", "docs/models.md#what-is-not")
    assert not _leads(ROOT / "README.md", "docs/none.md")


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_files_that_are_named_exist(document):
    named = re.findall(
        r"`((?:benchmarks|csrc|docs|examples|hywia_kernels|tests)/[\w/.-]+\.(?:py|csv|svg|md|cpp|cu|cuh|h))`",
        document.read_text(),
    )
    assert [name for name in named if "/NAME." not in name and not (ROOT / name).exists()] == []


def _commands(text: str) -> list[list[str]]:
    lines = [line for block in _blocks(text) for line in block.splitlines() if line.startswith("hywia ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_commands_are_in_the_grammar(document):
    for command in _commands(document.read_text()):
        assert parser().parse_args(command).command == command[0]


def test_commands_are_seen():
    every = [command for document in DOCUMENTS for command in _commands(document.read_text())]
    assert {command[0] for command in every} >= {
        "prune",
        "score",
        "recover",
        "eval",
        "bench",
        "export",
        "report",
        "info",
    }
    commands = _commands((ROOT / "README.md").read_text())
    assert ["prune", "smollm2", "-o", "smollm2-small", "--ratio", "20%"] in commands


def test_readme_is_read_aloud_in_three_minutes():
    """Without code, tables and headings, at an unhurried reader's 170 words a minute."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 125
    aside = r"```.*?```|<!-- table .*?<!-- end of table -->|<!--.*?-->|^#.*?$"
    prose = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(aside, "", text, flags=re.DOTALL | re.MULTILINE))
    assert 300 <= len(re.findall(r"\S*\w\S*", prose)) <= 3 * 170


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_options_that_are_named_exist(document):
    """Of `hywia`, of a benchmark's runner (whose own tests know them), or of pytest."""
    commands = parser()._subparsers._group_actions[0].choices.values()
    options = {option for command in commands for option in command._option_string_actions}
    text = re.sub(r"`[^`]*benchmarks\.[^`]*`", "", re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL))
    assert sorted(set(re.findall(r"`(--[a-z][a-z-]*)", text)) - options - {"--help"}) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_public_names_are_public(document):
    names = set(re.findall(r"\bhk\.([A-Za-z]\w*)", document.read_text()))
    assert sorted(names - set(hk.__all__)) == []


ROWS = {  # how a line of the tables begins -> criterion in quality.csv
    "LLM-Pruner param_second": "lp:param_second",
    "LLM-Pruner param_mix": "lp:param_mix",
    "LLM-Pruner vectorize": "lp:vectorize",
    "coarse, second order": "coarse",
    "attention": "attention",
    "Wanda-sp": "wanda-sp",
    "FLAP": "flap",
    "fine, second order": "fine",
    "the recipe without": "recipe-unrefitted",
    "the recipe, layers uniform": "recipe-uniform",
    "the recipe with attention's": "recipe-attention",
    "the recipe with the coarse": "recipe-coarse",
    "the recipe with the mean": "recipe-mean",
    "the recipe with their product": "recipe-product",
    "the recipe with masks": "recipe-learned",
    "the recipe": "recipe",
}


def _measured() -> dict[tuple[str, int, str], str]:
    """(criterion, samples, setting) -> geometric mean of the perplexities by seed, and of how many if not of three."""
    by_seed: dict[tuple[str, int, str], dict[str, float]] = {}
    with (ROOT / "benchmarks" / "quality.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            alone = row["recovery"] in ("", "none") and row["layers"] == "4:28"
            if row["text"] == "wikitext2_raw_test.txt" and row["blocks"] == "2382" and alone:
                key = row["criterion"], int(row["samples"]), row["setting"]
                by_seed.setdefault(key, {})[row["seed"]] = float(row["perplexity"])
    return {
        key: f"{math.exp(sum(map(math.log, seeds.values())) / len(seeds)):.1f}" + of_seeds(len(seeds))
        for key, seeds in by_seed.items()
    }


def of_seeds(count: int) -> str:
    return "" if count == 3 else f" ({count})"


def test_figures_of_quality_are_those_measured():
    text = (ROOT / "docs" / "recipe.md").read_text()
    text = text[text.index("## What each part gains") :]
    header = next(line for line in text.splitlines() if line.startswith("|") and " A50 |" in line and " B60 |" in line)
    columns = [cell.strip() for cell in header.split("|")[1:-1]]
    table = text[text.index(header) :].split("\n\n")[0].splitlines()[2:]
    measured = _measured()
    assert len(table) >= 12
    for line in table:
        cells = dict(zip(columns, (cell.strip().strip("*") for cell in line.split("|")[1:-1]), strict=True))
        criterion = ROWS[max((row for row in ROWS if cells[""].startswith(row)), key=len)]
        samples = int(cells["samples scored"].replace(",", ""))
        for setting in {"A25", "A50", "B25", "B60"} & set(columns):
            if cells[setting]:
                assert cells[setting] == measured[criterion, samples, setting], line


def test_figures_of_kernels_are_in_tables_alone():
    """What was measured or tried of a kernel is in a table that is made from a file; sentences say why."""
    text = (ROOT / "docs" / "kernels.md").read_text()
    text = re.sub(r"<!-- table .*?<!-- end of table -->|`[^`]*`", "", text, flags=re.DOTALL)
    units = r"%|× as|[µmn]?s\b|TFLOP|[GT]B/s|tokens/s|cycles|times\b"
    assert re.findall(rf"\d[\d.,]*\s?(?:{units})", text) == []


def _lines(table_after: str) -> list[list[str]]:
    """Cells of the first table behind a heading of docs/performance.md."""
    text = (ROOT / "docs" / "performance.md").read_text()
    text = text[text.index(table_after) :]
    rows = itertools.takewhile(lambda line: line.startswith("|"), text[text.index("\n|") + 1 :].splitlines())
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows][2:]


def _is_rounded(cell: str, value: str, scale: float = 1.0) -> bool:
    """Whether a number as a table says it is another, to the digits that it has."""
    digits = len(cell.partition(".")[2])
    return abs(float(cell) - scale * float(value)) <= 0.5000001 * 10.0**-digits


def _csv(name: str, device: str) -> list[dict[str, str]]:
    with (ROOT / "benchmarks" / name).open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["device"].startswith(device)]


def test_speeds_are_those_measured():
    models = ("dense", "22x9232", "24x8256@4:30", "16x5120", "13x4403@3:31")
    cases = (("prefill", "1", "2048"), ("prefill", "8", "512"), ("decode", "1", "512"), ("decode", "16", "512"))
    rows = {
        (r["model"], r["phase"], r["batch"], r["context"]): r
        for r in _csv("speed.csv", "NVIDIA H100")
        if r["mode"] == "static"
    }
    lines = _lines("## Speed of pruned models")
    assert len(lines) == len(models)
    for model, (_, parameters, *cells) in zip(models, lines, strict=True):
        assert _is_rounded(parameters.removesuffix(" B"), rows[(model, *cases[0])]["parameters"], 1e-9)
        for case, cell in zip(cases, cells, strict=True):
            row, (ms, *relative) = rows[(model, *case)], cell.split(", ")
            assert _is_rounded(ms, row["ms"]), (model, case)
            if model != "dense":
                assert _is_rounded(relative[0], row["speedup"]), (model, case)
                assert _is_rounded(relative[1].removesuffix(" %"), row["share"], 100), (model, case)


def test_times_of_the_drop_in_scorers_are_those_measured():
    """The columns of each device are of one run of the benchmark."""
    lines = _lines("## Drop-in scorers")
    for device, columns in (
        ("NVIDIA H100", {1: ("theirs", "seconds"), 2: ("ours", "seconds"), 3: ("ours", "times_faster")}),
        ("NVIDIA H100", {4: ("theirs", "peak_over_weights"), 5: ("ours", "peak_over_weights")}),
        ("AMD", {6: ("ours", "times_faster")}),
    ):
        runs: dict[str, list[dict[str, str]]] = {}
        for row in _csv("integrations.csv", device):
            runs.setdefault(row["date"], []).append(row)
        assert any(_is_run(lines, columns, rows) for rows in runs.values()), (device, columns)


def _is_run(lines: list[list[str]], columns: dict[int, tuple[str, str]], rows: list[dict[str, str]]) -> bool:
    sides = {side: [row for row in rows if row["side"] == side] for side in ("ours", "theirs")}
    return len(lines) == len(sides["ours"]) == len(sides["theirs"]) and all(
        line[0].split(", ")[-1].lower() in sides["ours"][i]["criterion"].lower()
        and all(_is_rounded(line[column], sides[side][i][key]) for column, (side, key) in columns.items())
        for i, line in enumerate(lines)
    )
