"""Models of images and text, by their language part: loaded, derived, cut and saved by their own class."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch

import hywia_kernels as hk
from hywia_kernels import arch
from hywia_kernels.arch import observed
from hywia_kernels.cli import main
from tests.support.comparison import relative
from tests.support.derived import prompt, small
from tests.support.processes import run_jobs
from tests.support.tokenizers import byte_tokenizer

PROCESSOR = "preprocessor_config.json"


def _written(model_type: str, folder: Path) -> Path:
    """A checkpoint as published ones are: model, tokenizer, and a processor of images."""
    small(model_type).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / PROCESSOR).write_text(json.dumps({"image_processor_type": "CLIPImageProcessor", "size": 28}))
    return folder


def _beside(model) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if "language_model.layers" not in n}


def test_the_language_part_goes_and_the_rest_stays(tmp_path, capsys):
    """By the command; the outcome loads by the same auto class in a process of its own, adaptive layers too."""
    jobs, wanted = [], []
    for model_type in observed.IMAGES:
        folder, out = _written(model_type, tmp_path / model_type), tmp_path / f"{model_type}-small"
        dense, _ = hk.load(folder)
        arguments = ["--group-ratio", "0.4", "--criterion", "magnitude", "--align", "8", "--no-eval"]
        assert main(["prune", str(folder), "-o", str(out), *arguments]) == 0
        printed = capsys.readouterr().out
        assert f"{model_type} is not in the table of architectures; its structure was derived:" in printed
        assert "left alone, being no part of the language decoder: model.vi" in printed
        model, _ = hk.load(out)
        after, before = _beside(model), _beside(dense)
        assert len(before) > 20
        assert all(torch.equal(p, after[n]) for n, p in before.items())
        assert {g.units for g in hk.groups(_proven(model)) if g.kind == "mlp"} == {24}
        assert (out / PROCESSOR).read_bytes() == (folder / PROCESSOR).read_bytes()
        assert "AutoModelForImageTextToText.from_pretrained" in (out / "README.md").read_text()
        jobs.append({"folder": str(out), "out": f"{out}.pt", "images": True})
        with torch.no_grad():
            logits = model(input_ids=prompt(), use_cache=False).logits
        ids = model.generate(
            prompt(), attention_mask=torch.ones_like(prompt()), do_sample=False, max_new_tokens=6, eos_token_id=None
        )
        wanted.append((logits, ids.tolist()))
    script = Path(__file__).with_name("reload_derived.py")
    results = run_jobs(script, {"tokens": prompt().tolist(), "jobs": jobs}, tmp_path)
    for job, result, (logits, ids) in zip(jobs, results, wanted, strict=True):
        assert "error" not in result, (job, result)
        assert torch.allclose(torch.load(job["out"], weights_only=True), logits, rtol=1e-4, atol=1e-5), job
        assert (result["plain"], result["cached"]) == (ids, ids), job


def _proven(model):
    assert hk.prove(model).kinds == ("mlp", "attention")
    return model


def test_images_meet_the_cut_decoder_as_the_masked_one():
    """LLaVA with an image of four patches in its text."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = dict(image_size=28, patch_size=14, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    text = dict(vocab_size=131, hidden_size=36, intermediate_size=44, num_hidden_layers=2)
    config = LlavaConfig(
        vision_config=vision | dict(model_type="clip_vision_model", num_attention_heads=2, projection_dim=16),
        text_config=text | dict(model_type="llama", num_attention_heads=6, num_key_value_heads=3, head_dim=8),
        image_token_index=7,
    )
    torch.manual_seed(0)
    model = _proven(LlavaForConditionalGeneration(config).eval())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15)
    tokens = torch.tensor([[11, 7, 7, 7, 7, 23, 40, 52]])
    inputs = dict(input_ids=tokens, pixel_values=torch.randn(1, 3, 28, 28), use_cache=False)
    plan = hk.plan(hk.score(model, criterion="random"), group_ratio=0.4, align=1)
    masked = copy.deepcopy(model)
    hk.mask(masked, plan)
    with torch.no_grad():
        dense, want = model(**inputs).logits, masked(**inputs).logits
        hk.prune(model, plan)
        got = model(**inputs).logits
        other = model(**inputs | {"pixel_values": torch.randn(1, 3, 28, 28)}).logits
    assert relative(got, want) <= 1e-5
    assert relative(want, dense) > 1e-2
    assert relative(other[:, -1], got[:, -1]) > 1e-3, "the image must matter"
    assert arch.left_alone(model) == ["model.vision_tower", "model.multi_modal_projector"]


def test_layers_that_only_images_reach_stay_as_they_are(tmp_path):
    """Mllama's cross-attention layers do nothing for text alone, so that no text says what they are worth."""
    model = small("mllama")
    hk.prove(model)
    assert [(g.kind, g.layer, g.units) for g in hk.groups(model)] == [("attention", 1, 4)]
    crossing = {n: p.clone() for n, p in model.named_parameters() if "language_model.layers.0." in n}
    hk.prune(model, hk.plan(hk.score(model, criterion="magnitude"), group_ratio={"attention": 0.5}, align=1))
    hk.save(model, byte_tokenizer(), tmp_path / "out")
    loaded, _ = hk.load(tmp_path / "out")
    after = dict(loaded.named_parameters())
    assert len(crossing) > 8
    for name, before in crossing.items():
        assert torch.equal(next(p for n, p in after.items() if n.endswith(name.partition("model.")[2])), before), name
    assert torch.equal(loaded(input_ids=prompt()).logits, model(input_ids=prompt()).logits)
