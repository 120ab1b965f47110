"""Families that the table of architectures lacks: derived, proven, cut, saved, and the same in a fresh process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError, arch
from hywia_kernels.arch import observed
from hywia_kernels.arch.classes import of_images
from hywia_kernels.checkpoint import description
from hywia_kernels.cli import main
from tests.support.derived import Outcome, prompt, pruned, small
from tests.support.processes import run_jobs

# One of each kind: logits changed behind the head; queries, keys and values fused by group; latent heads, shared and
# stacked experts; transposed and alternating experts with biases, and sinks; an encoder's halves that decode.
SHAPES = ("cohere", "falcon", "deepseek_v3", "gpt_oss", "bert")


def _reloaded(outcomes: dict[str, Outcome], folder: Path) -> dict[str, str]:
    """Family -> what is wrong with it in a fresh process; "" where nothing is."""
    done = {name: o for name, o in outcomes.items() if o.logits is not None}
    jobs = [{"folder": str(folder / n), "out": str(folder / f"{n}.pt"), "images": of_images(n)} for n in done]
    script = Path(__file__).with_name("reload_derived.py")
    results = run_jobs(script, {"tokens": prompt().tolist(), "jobs": jobs}, folder)
    wrong = {}
    for (name, outcome), job, result in zip(done.items(), jobs, results, strict=True):
        if "error" in result:
            wrong[name] = result["error"]
        elif not torch.allclose(torch.load(job["out"], weights_only=True), outcome.logits, rtol=1e-4, atol=1e-5):
            wrong[name] = "other logits"
        elif result["plain"] != outcome.tokens or result["cached"] != outcome.tokens:
            wrong[name] = f"other tokens: {result}, not {outcome.tokens}"
    return wrong


def test_each_shape_is_derived_and_reloads(tmp_path):
    outcomes = {name: pruned(name, tmp_path / name) for name in SHAPES}
    assert {n: (o.status, o.kinds) for n, o in outcomes.items()} == {
        n: ("derived", tuple(observed.DERIVED[n])) for n in SHAPES
    }
    assert _reloaded(outcomes, tmp_path) == {}
    record = json.loads((tmp_path / "deepseek_v3" / "hywia.json").read_text())
    assert record["proof"]["parts"]["attention"] == (
        "self_attn.q_b_proj, self_attn.kv_b_proj, self_attn.kv_b_proj -> self_attn.o_proj"
    )
    assert record["proof"]["checks"][-1] == "model: statistics equal the loss's gradients"


@pytest.mark.slow
def test_every_family_that_was_observed(tmp_path, capsys):
    """All families of the list; what is printed is the list with its states."""
    names = [*observed.DERIVED, *observed.MLP_ONLY, *observed.REFUSED]
    outcomes = {name: pruned(name, tmp_path / name) for name in names}
    wrong = _reloaded(outcomes, tmp_path)
    with capsys.disabled():
        print()
        for name, outcome in outcomes.items():
            kinds = ", ".join(outcome.kinds)
            state = wrong.get(name) or outcome.status
            state = f"refused: {observed.REFUSED.get(name)}" if state.startswith("refused") else state[:150]
            print(f"{name:<24} {state:<10} {kinds} {outcome.seconds:.1f} s")
    assert wrong == {}
    refused = {n: o.status for n, o in outcomes.items() if o.status.startswith("refused: ")}
    assert {n: r for n, r in observed.REFUSED.items() if observed.REASONS[r] not in refused.get(n, "")} == {}
    found = {n: o.kinds for n, o in outcomes.items() if n not in refused}
    assert found == {n: tuple(k) for n, k in {**observed.DERIVED, **observed.MLP_ONLY}.items()}
    assert len(found) >= 90


def test_the_command_line_derives_proves_and_records(tmp_path, capsys):
    folder, out = tmp_path / "model", tmp_path / "small"
    small("cohere").save_pretrained(folder)
    model, _ = hk.load(_with_tokenizer(folder))
    assert not arch.is_known(model)
    with pytest.raises(HywiaError, match=r"known model types .* hk\.prove\(model\)"):
        hk.groups(model)
    arguments = ["--group-ratio", "0.4", "--criterion", "magnitude", "--align", "8", "--no-eval"]
    assert main(["prune", str(folder), "-o", str(out), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "cohere is not in the table of architectures; its structure was derived:" in printed
    assert "attention: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj -> self_attn.o_proj" in printed
    assert "copy: saved, reloaded, with and without cache" in printed
    record = json.loads((out / "hywia.json").read_text())
    assert record["proof"]["kinds"] == ["mlp", "attention"]
    again, _ = hk.load(out)  # and can be cut again
    assert hk.prove(again).kinds == ("mlp", "attention")
    assert {g.units for g in hk.groups(again) if g.kind == "mlp"} == {24}


def test_a_dry_run_proves_on_the_copy_alone(tmp_path, capsys):
    folder = tmp_path / "model"
    small("cohere").save_pretrained(folder)
    arguments = ["--group-ratio", "0.4", "--align", "8", "--dry-run", "--no-eval"]
    assert main(["prune", str(_with_tokenizer(folder)), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "copy: cut equals masked" in printed
    assert "model: cut equals masked" not in printed


def test_kinds_that_were_not_derived_cannot_go():
    model = small("mpt")
    proof = hk.prove(model)
    assert proof.kinds == ("mlp", "attention")
    with pytest.raises(UsageError, match="the model has no experts to cut"):
        hk.plan(hk.score(model, criterion="random"), group_ratio=0.4, units=("experts",))


@pytest.mark.parametrize("model_type", ["t5", "bart", "whisper"])
def test_encoders_with_a_decoder_are_refused_with_a_way_out(model_type):
    with pytest.raises(HywiaError, match=r"an encoder with a decoder, .* by Torch-Pruning with the scorers of"):
        description.family({"model_type": model_type})


def _with_tokenizer(folder: Path) -> Path:
    from tests.support.tokenizers import byte_tokenizer

    byte_tokenizer().save_pretrained(folder)
    return folder
