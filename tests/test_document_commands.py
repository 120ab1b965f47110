"""Every command and snippet of README and docs/ runs, in the order of its page, on a tiny model under the names that
pages use: MODEL, smollm2, text.jsonl and so on lie in the folder that they run in.

A block that needs what may be missing says so above it (`<!-- needs WHAT -->`); `tests/support/documents.py` has the
list. What is run here is that the commands work; what they do is tested where it belongs.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from hywia_kernels.cli import main, parser
from tests.support.documents import DOCUMENTS, NEEDS, ROOT, Block, blocks, inline
from tests.support.models import random_model, sizes
from tests.support.tokenizers import byte_tokenizer, write_vocabulary

NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
README = ROOT / "README.md"
# What sets up a machine or a clone, and is tried by CI and by hand.
SETUP = ("pip ", "make ", "git ")


def drawn(model, tokenizer, *, samples, seq_len, seed, batch=None, bos=None):
    return torch.randint(97, 123, (samples, seq_len), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a page, with what pages name: a model, texts in several forms, and a vocabulary."""
    here = tmp_path
    monkeypatch.chdir(here)
    model = random_model(
        **sizes(259, 64, 256, 3, 8, 4), max_position_embeddings=4096, initializer_range=0.15, tie_word_embeddings=True
    )
    for name in ("MODEL", "smollm2"):
        model.save_pretrained(here / name)
        byte_tokenizer().save_pretrained(here / name)
    words = torch.randint(97, 123, (400, 160), generator=torch.Generator().manual_seed(3)).tolist()
    lines = ["".join(map(chr, line)) for line in words]
    (here / "text.txt").write_text("\n".join(lines))
    (here / "text.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    # A model that writes its own text takes a hundred steps for it; drawn ids are as good as a random model's.
    monkeypatch.setattr("hywia_kernels.method.calibration_data.self_written", drawn)
    if NEEDS["gguf"]():
        write_vocabulary(here / "MODEL.gguf")
    return here


def run(command: str) -> None:
    """One line of a block."""
    words = shlex.split(command)
    if words[0] == "python" and words[1].startswith("examples/"):
        assert (ROOT / words[1]).name in Path(ROOT / "tests" / "test_examples.py").read_text(), f"{command}: not tried"
        return
    assert words[0] == "hywia", f"{command}: a block with it says what it needs"
    if "-o" in words:
        shutil.rmtree(words[words.index("-o") + 1], ignore_errors=True)
    assert main(words[1:]) == 0, command


def run_block(block: Block) -> None:
    if block.language == "python":
        exec(compile(block.text, "<page>", "exec"), {})
    elif not block.language:
        for command in block.commands:
            if not command.startswith(SETUP):
                run(command)


@pytest.mark.slow
@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_commands_and_snippets_run(path, folder):
    for block in blocks(path.read_text(encoding="utf-8")):
        if not block.missing and not block.output_of:
            run_block(block)


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_what_blocks_need_is_on_the_list(path):
    text = path.read_text(encoding="utf-8")
    found = blocks(text)
    assert len(found) == len(re.findall(r"^```", text, re.MULTILINE)) // 2
    assert {need for block in found for need in block.needs} <= set(NEEDS)
    assert len(re.findall("<!-- needs ", text)) == sum(bool(block.needs) for block in found)


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_commands_within_sentences_are_in_the_grammar(path):
    for command in inline(path.read_text(encoding="utf-8")):
        words = shlex.split(command)
        words = words[words.index("hywia_kernels") + 1 :] if words[0] == "torchrun" else words[1:]
        assert parser().parse_args(words).command == words[0]


def shape(line: str) -> str:
    """A line with its numbers, and how wide it is, taken out."""
    return re.sub(r"\s+", " ", re.sub(r"[\d.,]+", "N", line)).strip()


@pytest.mark.slow
def test_the_first_output_is_what_the_command_prints(folder, capsys):
    """README's first command, on the tiny model: the same lines but for numbers and the number of plans tried."""
    (block,) = [b for b in blocks(README.read_text(encoding="utf-8")) if b.output_of]
    run(block.output_of)
    printed = [shape(line) for line in capsys.readouterr().out.splitlines()]
    shown = [shape(line) for line in block.text.splitlines()]
    assert len(shown) > 8
    assert [line for line in shown if line not in printed] == []
    assert sorted(set(printed), key=printed.index) == sorted(set(shown), key=shown.index)


def test_figures_of_readme_are_in_tables_alone():
    """What was measured is in a table, a figure or an output that is made from rows, never typed into a sentence."""
    text = README.read_text(encoding="utf-8")
    aside = r"```.*?```|<!-- table .*?<!-- end of table -->|<!--.*?-->|\]\([^)]*\)|`[^`]*`"
    text = re.sub(aside, "", text, flags=re.DOTALL)
    assert re.findall(r"\d[\d.,]*\s?(?:%|×|times|s\b|ms|µs|GB|MB|W\b|tokens a second)|±\s?\d", text) == []
    assert re.findall(r"\b\d+\.\d+\b", text) == ["2403.10799", "3.10", "3.13", "2.0"]  # paper, Python, licence
