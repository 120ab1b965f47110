"""Our copy of the seven tasks against lm-eval's own code, on the same model and questions.

lm-eval is no requirement of the tests, which are skipped without it. Run with lm_eval 0.4.13 in a folder of its own:

    python -m pip install --no-deps --target FOLDER lm_eval==0.4.13 sacrebleu portalocker tabulate colorama lxml
    PYTHONPATH=FOLDER python -m pytest benchmarks/test_lm_eval.py
"""

from __future__ import annotations

import json
import random

import pytest

from tests.support.tiny import TINY, fresh
from tests.support.tokenizers import byte_tokenizer

from . import lm_eval_tasks, tasks

installed = pytest.mark.skipif(not lm_eval_tasks.available(), reason="needs lm_eval, see the module's docstring")


def beginning(begin: bool):
    """A byte tokenizer; with `begin` it puts its beginning-of-text token before a text, as LLaMA's does."""
    tokenizer = byte_tokenizer()
    if begin:
        from tokenizers.processors import TemplateProcessing

        core = tokenizer.backend_tokenizer
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    """Questions of all three kinds: normalised by characters, not normalised, and with a context for each choice."""
    rng = random.Random(5)

    def words(least, most):
        return " ".join(
            "".join(rng.choices("abcdefghié", k=rng.randint(2, 6))) for _ in range(rng.randint(least, most))
        )

    for name, count in (("piqa", 40), ("boolq", 30), ("winogrande", 30), ("arc_easy", 25)):
        rows = []
        for _ in range(count):
            choices = [f" {words(1, 4)}" for _ in range(2 if name != "arc_easy" else rng.randint(3, 5))]
            context: object = words(1, 5)
            if name == "winogrande":
                context, choices = [words(1, 5), words(1, 5)], [choices[0]] * 2
            rows.append({"context": context, "choices": choices, "gold": rng.randrange(len(choices))})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


@installed
@pytest.mark.parametrize("begin", [False, True])
def test_both_count_the_same_answers_as_right(folder, begin):
    model, tokenizer = fresh(TINY[3]), beginning(begin)
    assert tokenizer("a")["input_ids"][:-1] == [256] * begin
    for limit in (None, 12):
        ours = tasks.evaluate(model, tasks.read(folder, tokenizer, limit))
        theirs = lm_eval_tasks.evaluate(model, tokenizer, folder, limit=limit, batch=8)
        assert theirs.keys() == ours.keys() >= {"piqa", "winogrande", "winogrande_se", "mean_se"}
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, abs=0.1), name
    assert 0 < ours["mean"] < 100


@installed
def test_its_standard_errors_are_ours(folder):
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = fresh(TINY[3]), byte_tokenizer()
    task = ConfigurableTask(config=lm_eval_tasks.config(folder / "piqa.jsonl"))
    wrapped, manager = HFLM(pretrained=model, tokenizer=tokenizer), TaskManager(include_defaults=False)
    told = lm_eval.simple_evaluate(model=wrapped, tasks=[task], log_samples=False, task_manager=manager)
    ours = tasks.evaluate(model, tasks.read(folder, tokenizer)[1:2])
    assert 100 * told["results"]["piqa"]["acc_norm_stderr,none"] == pytest.approx(ours["piqa_se"], rel=1e-6)


def test_a_local_task_is_lm_evals_config_over_its_file(folder):
    made = lm_eval_tasks.config(folder / "arc_easy.jsonl")
    row = json.loads((folder / "arc_easy.jsonl").read_text().splitlines()[0])
    assert made["dataset_kwargs"] == {"data_files": {"test": str(folder / "arc_easy.jsonl")}}
    assert [m["metric"] for m in made["metric_list"]] == ["acc", "acc_norm"]
    assert [" " + c for c in made["doc_to_choice"](row)] == row["choices"]
    assert (made["doc_to_text"], made["doc_to_target"], made["target_delimiter"]) == ("context", "gold", " ")
    several = lm_eval_tasks.config(folder / "winogrande.jsonl")
    assert (several["doc_to_text"], several["doc_to_choice"]) == ("gold", "context")
    assert [m["metric"] for m in several["metric_list"]] == ["acc"]
    path = folder / "winogrande.jsonl"
    path.write_text(json.dumps({"context": ["a", "b"], "choices": [" c", " d"], "gold": 1}))
    with pytest.raises(SystemExit, match="line 1: lm-eval wants one continuation for all contexts"):
        lm_eval_tasks.config(path)


@pytest.mark.skipif(lm_eval_tasks.available(), reason="lm_eval is there")
def test_without_it_the_way_out_is_named(folder):
    with pytest.raises(SystemExit, match="pip install lm_eval"):
        lm_eval_tasks.evaluate(fresh(TINY[3]), byte_tokenizer(), folder)
