"""What `--overwrite` and `--in-place` may replace, and what they never do."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from pathlib import Path

import pytest
import torch
from faults import contents

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.checkpoint import atomic_directory
from hywia_kernels.checkpoint.replaceable import Input
from hywia_kernels.cli import main
from tests.support.tiny import TINY, fresh, make_plan

CONFIG = '{"model_type": "llama"}'


def _refused(path, message, **more):
    before = contents(path) if path.is_dir() else None
    with pytest.raises(UsageError, match=message):
        hk.save(fresh(TINY[2]), None, path, overwrite=True, **more)
    if before is not None:
        assert contents(path) == before


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"config.json": '{"port": 8080}', "src/thesis.tex": "years"}, "holds neither a model nor scores"),
        ({"config.json": CONFIG, "src/thesis.tex": "years"}, "holds src/, which no directory of a model"),
        ({"config.json": CONFIG, ".git/HEAD": "ref"}, r"holds \.git/, which"),
        ({"config.json": CONFIG, "checkpoint-10/model.safetensors": "x"}, "holds checkpoint-10/, which"),
        ({"config.json": CONFIG, "notes.txt": "mine"}, "holds notes.txt, which"),
        ({"config.json": CONFIG, "optimizer.pt": "x"}, "holds optimizer.pt, which"),
        ({"config.json": CONFIG, "adapter_model.safetensors": "x"}, "holds adapter_model.safetensors, which"),
        ({"config.json": CONFIG, "run.py": "x"}, "holds run.py, which"),
        ({"config.json": CONFIG, "LICENSE.tex": "x"}, "holds LICENSE.tex, which"),
        ({"config.json": CONFIG, ".cache/mine": "x"}, r"holds \.cache/mine, which"),
        ({"config.json": CONFIG, **{f"{i}.md": "x" for i in range(9)}}, "holds 0.md, .*4.md and 4 more, which"),
        ({"config.json": '{"model_type": 7}'}, "holds neither a model nor scores"),
        ({"config.json": '["model_type"]'}, "holds neither a model nor scores"),
        ({"config.json": "{" * 100_000}, "holds neither a model nor scores"),
        ({"hywia.json": "{}"}, "holds neither a model nor scores"),
        ({"scores.json": "{}"}, "holds neither a model nor scores"),
        (
            {"scores.json": '{"format": 2, "groups": [], "fingerprint": ""}', "config.json": CONFIG, "x": ""},
            "holds scores.json, x, which",
        ),
        ({"scores.json": '{"format": 2, "groups": [], "fingerprint": ""}', "mine.csv": ""}, "holds mine.csv"),
    ],
    ids=lambda v: "" if isinstance(v, dict) else v,
)
def test_what_is_not_accounted_for_is_refused_by_name(tmp_path, files, named):
    for name, text in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    _refused(tmp_path / "out", named)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_savers_write_is_replaced(tmp_path, tokenizer):
    model = fresh(TINY[2])
    out = tmp_path / "out"
    model.save_pretrained(out, max_shard_size="20KB")
    tokenizer.save_pretrained(out)
    for name in ("README.md", "LICENSE.txt", ".gitattributes", "chat_template.jinja", "merges.txt", "vocab.json"):
        (out / name).write_text("")
    (out / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "tools.jinja").write_text("")
    (out / "blob").write_text("")
    (out / "tokenizer.model").symlink_to(tmp_path / "gone")  # as in the hub's cache
    (out / "blob").unlink()
    hk.save(model, tokenizer, out, overwrite=True)
    assert not (out / "model.safetensors.index.json").exists()
    hk.prune(model, make_plan(model, "adaptive"))  # whose directory carries Python files
    hk.save(model, tokenizer, out, overwrite=True)
    assert (out / "modeling_hywia_adaptive.py").exists()
    hk.save(fresh(TINY[1]), None, out, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "hywia.json",
        "model.safetensors",
    ]
    hk.save_scores(out, hk.score(fresh(TINY[1]), criterion="random"), overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["scores.json", "scores.safetensors"]
    hk.save(fresh(TINY[1]), None, out, overwrite=True)


def test_places_that_are_more_than_a_directory(tmp_path, monkeypatch):
    hk.save(fresh(TINY[2]), None, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    _refused(tmp_path / "link", "is not a directory but a link")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    _refused(tmp_path / "dangling", "is not a directory but a link")
    (tmp_path / "file").write_text("x")
    _refused(tmp_path / "file", "is not a directory but a file")
    os.mkfifo(tmp_path / "pipe")
    _refused(tmp_path / "pipe", "is not a directory")
    with pytest.raises(UsageError, match="is the root of the filesystem"):
        hk.save(fresh(TINY[2]), None, "/", overwrite=True)
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("real"))
    _refused(tmp_path / "real", "is a mounted filesystem")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "real")
    _refused(tmp_path / "real", "is or holds the working directory")
    _refused(Path("."), "is or holds the working directory")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "real"))
    _refused(tmp_path / "real", "is or holds your home directory")


def test_the_model_itself_is_replaced_only_when_asked_for(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(saved)
    before = contents(saved)
    cut = ["--ratio", "0.2", "--criterion", "random", "--align", "4", "--no-eval"]
    for source in ("model", "link", "./link/../model"):
        assert main(["prune", source, "-o", "model", *cut, "--overwrite"]) == 2
        assert "is the model itself; --overwrite would replace the only copy" in capsys.readouterr().err
    assert main(["score", "model", "-o", "model", "--criterion", "random", "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert "holds the model that is read" in error
    assert "--in-place" not in error
    model, tokenizer = hk.load("link")
    with pytest.raises(UsageError, match=r"is the model itself.*in_place=True"):
        hk.save(model, tokenizer, saved, overwrite=True)
    assert contents(saved) == before
    assert main(["prune", "model", "-o", "model", *cut, "--in-place"]) == 0
    smaller = hk.load("model")[0]
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    hk.save(smaller, tokenizer, saved, in_place=True)
    with pytest.raises(UsageError, match="exists; choose another directory"):
        hk.save(smaller, tokenizer, saved)


def _refused_inputs(path, given, message):
    with pytest.raises(UsageError, match=message):
        atomic_directory.check_target(path, overwrite=True, inputs=given)


def test_what_holds_something_that_is_read_is_refused(saved, tmp_path):
    other = tmp_path / "other"
    hk.save(fresh(TINY[1]), None, other)
    # Its weights are in the other directory.
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors").symlink_to(other / "model.safetensors")
    _refused_inputs(other, [Input("model", saved)], r"holds the model \(.*model\), which would be deleted")
    _refused_inputs(other, [Input("calib", other / "absent"), Input("scores", other)], "holds the scores")
    _refused_inputs(other, [Input("calib", other / "README.md")], r"holds the calib \(.*README\.md\), which would be")
    (other / "model.gguf").write_text("x")
    _refused_inputs(other, [Input("model", other / "model.gguf")], "is the model itself")
    atomic_directory.check_target(other, overwrite=False, in_place=True, inputs=[Input("model", other / "model.gguf")])
    (other / "another.gguf").write_text("x")
    with pytest.raises(UsageError, match=r"holds another\.gguf, which"):
        atomic_directory.check_target(
            other, overwrite=True, in_place=True, inputs=[Input("model", other / "model.gguf")]
        )


def test_a_report_takes_no_files_place(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox " * 60)
    hk.save(fresh(TINY[1]), None, "out")
    before = contents(tmp_path)
    cut = ["prune", "model", "--ratio", "0.2", "--criterion", "random", "--no-eval", "-o"]
    for arguments, code, message in (
        ([*cut, "out", "--overwrite", "--json", "out/r.json"], 2, "json: out/r.json is or lies in the output"),
        ([*cut, "new", "--json", "model/config.json"], 2, "json: model/config.json is a file of the model"),
        ([*cut, "new", "--json", "out"], 2, "json: expected a file, got the directory out"),
        ([*cut, "new", "--json", "new"], 2, "json: new is or lies in the output"),
        (["eval", "model", "--text", "text.txt", "--json", "text.txt"], 2, "json: text.txt is a file of the text"),
        (["report", "out", "-o", "out/model.safetensors"], 2, "html: out/model.safetensors is a file of the model"),
        (["bench", "model", "--plot", "model/tokenizer.json"], 2, "plot: model/tokenizer.json is a file of the model"),
        (["info", "--json", "no/where.json"], 2, "json: no such directory"),
        (["info", "--json", "/dev/full"], 1, "json: cannot write /dev/full: No space left on device"),
    ):
        assert main(arguments) == code
        assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


def _hold(path, taken, done):
    with atomic_directory.claim(path):
        taken.set()
        done.wait(60)


def test_a_second_run_into_one_directory_says_so_before_it_works(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    context = multiprocessing.get_context("fork")
    taken, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "out", taken, done))
    other.start()
    assert taken.wait(60)
    monkeypatch.setattr("hywia_kernels.cli.session.load", lambda *a, **k: pytest.fail("the model was loaded"))
    for name in ("out", "elsewhere/out"):
        assert main(["prune", "model", "-o", name, "--ratio", "0.2"]) == 1
        assert f"output: another run (process {other.pid} on " in capsys.readouterr().err
    assert main(["score", "model", "-o", "out"]) == 1
    assert main(["export", "model", "-o", "out", "--format", "decilm"]) == 1
    done.set()
    other.join()
    with atomic_directory.claim(tmp_path / "out"):
        refusals = []

        def second():
            try:
                hk.save(fresh(TINY[2]), None, tmp_path / "out")
            except HywiaError as error:
                refusals.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert len(refusals) == 1
        assert "another thread is writing" in refusals[0]
        hk.save(fresh(TINY[2]), None, tmp_path / "out")  # the one that holds it
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "model", "out"]


def test_something_that_appears_during_the_work_is_not_replaced(tmp_path):
    def work(overwrite):
        with atomic_directory.directory(tmp_path / "out", overwrite=overwrite) as folder:
            (folder / "config.json").write_text(CONFIG)
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "notes.txt").write_text("mine")

    with pytest.raises(UsageError, match="exists"):
        work(False)
    with pytest.raises(UsageError, match="holds neither a model nor scores"):
        work(True)
    assert contents(tmp_path) == {"out/notes.txt": b"mine"}


def test_long_names_and_parents_that_are_not_there(tmp_path):
    name = "x" * 250
    hk.save(fresh(TINY[2]), None, tmp_path / "a" / "b" / name)
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == [name]
    with pytest.raises(HywiaError, match="nothing"), atomic_directory.claim(tmp_path / "c" / "d" / "out"):
        raise HywiaError("nothing")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_umask_is_read_and_never_set(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the process's umask was set"))
        hk.save(fresh(TINY[2]), None, tmp_path / "out")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert os.stat(tmp_path / "out").st_mode & 0o777 == 0o750
    assert {os.stat(p).st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o640}


def test_a_filesystem_without_locks(tmp_path, monkeypatch):
    import fcntl

    def none(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    hk.save(fresh(TINY[2]), None, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / ".new.hywia-partial").mkdir()
    with pytest.raises(HywiaError, match="cannot tell whether the run that made it still writes"):
        hk.save(fresh(TINY[2]), None, tmp_path / "new")


def test_a_record_that_json_cannot_hold(tmp_path):
    with pytest.raises(UsageError, match="record: expected what JSON can hold"):
        hk.save(fresh(TINY[2]), None, tmp_path / "out", record={"x": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_records_of_saved_models_say_where(tmp_path):
    hk.save(fresh(TINY[2]), None, tmp_path / "out", record={"arguments": {"in_place": False}})
    assert json.loads((tmp_path / "out" / "hywia.json").read_text())["arguments"] == {"in_place": False}
