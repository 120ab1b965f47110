"""Text the model writes: full samples of ordinary tokens, and greedy continuations, whatever its configs say."""

from __future__ import annotations

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.engine.static_driver import StaticDriver
from hywia_kernels.evaluation import continuation, tokens_per_second
from hywia_kernels.method import sampling, writing
from hywia_kernels.method.calibration_data import self_written
from hywia_kernels.method.sampling import Sampler, uniforms
from tests.support.families import fresh_named
from tests.support.tiny import TINY, fresh

SETTINGS = [
    dict(eos_token_id=[257, *range(65, 91)]),
    dict(eos_token_id=[65], pad_token_id=3, bos_token_id=4),
    dict(forced_eos_token_id=66),
    dict(forced_bos_token_id=66),
    dict(max_new_tokens=3),
    dict(max_length=5, min_length=4),
    dict(min_new_tokens=200),
    dict(do_sample=True, temperature=0.05),
    dict(do_sample=True, top_k=1),
    dict(do_sample=True, top_p=0.01),
    dict(do_sample=True, min_p=0.9),
    dict(do_sample=True, typical_p=0.1, epsilon_cutoff=0.3, eta_cutoff=0.3),
    dict(repetition_penalty=5.0),
    dict(encoder_repetition_penalty=5.0),
    dict(no_repeat_ngram_size=1),
    dict(bad_words_ids=[[i] for i in range(60, 120)]),
    dict(suppress_tokens=list(range(200))),
    dict(begin_suppress_tokens=list(range(250))),
    dict(sequence_bias=[[[70], 50.0]]),
    dict(exponential_decay_length_penalty=(2, 1.5), eos_token_id=257),
    dict(guidance_scale=3.0),
    dict(num_beams=3, length_penalty=2.0),
    dict(num_return_sequences=3, do_sample=True),
    dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    dict(penalty_alpha=0.6, top_k=4),
    dict(dola_layers="low"),
    dict(prompt_lookup_num_tokens=3),
    dict(stop_strings=["a"]),
    dict(max_time=1e-9),
    dict(use_cache=False),
    dict(cache_implementation="static"),
    dict(renormalize_logits=True, remove_invalid_values=True),
    dict(return_dict_in_generate=True, output_scores=True, output_logits=True, output_attentions=True),
    dict(watermarking_config={"bias": 9.0}),
    dict(low_memory=True),
    dict(made_up_setting=1),
]


def named(settings):
    return "+".join(settings)


def with_settings(model, settings):
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize("settings", SETTINGS, ids=named)
def test_samples_are_full_and_ordinary(tokenizer, settings):
    plain, model = fresh(TINY[2]), with_settings(fresh(TINY[2]), settings)
    config = model.generation_config
    got = hk.calibration(model, tokenizer, samples=5, seq_len=40, seed=3)
    assert got.shape == (5, 40)
    ends = settings.get("eos_token_id", [])
    ends = {257, *(ends if isinstance(ends, list) else [ends])}
    assert not set(got[:, 1:].flatten().tolist()) & {256, 258, *ends}
    if ends == {257}:
        assert torch.equal(got, hk.calibration(plain, tokenizer, samples=5, seq_len=40, seed=3))
    assert model.generation_config is config


@pytest.mark.parametrize("settings", SETTINGS, ids=named)
def test_greedy_is_greedy(tokenizer, settings):
    plain, model = fresh(TINY[2]), with_settings(fresh(TINY[2]), settings)
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    with torch.no_grad():
        for _ in range(12):
            following = plain(ids).logits[:, -1].argmax(-1, keepdim=True)
            if int(following) == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following], 1)
    assert continuation(model, tokenizer, "hello", new=12) == tokenizer.decode(ids[0, 5:], skip_special_tokens=True)
    assert tokens_per_second(model, new=6, repeats=1) > 0


def test_driver_and_generate_write_the_same(gqa, tokenizer, monkeypatch):
    """With one cache or another, in batches of any size; and fewer samples are a prefix of more."""
    monkeypatch.setattr(sampling, "multiplies_bfloat16", lambda device: False)
    want = self_written(gqa, tokenizer, samples=7, seq_len=32, seed=5, batch=3)
    assert torch.equal(self_written(gqa, tokenizer, samples=5, seq_len=32, seed=5), want[:5])
    ran = []
    monkeypatch.setattr(writing, "driven", lambda *_: ran.append(1))
    assert torch.equal(self_written(gqa, tokenizer, samples=7, seq_len=32, seed=5, batch=4), want)
    assert ran == [1]
    assert not torch.equal(self_written(gqa, tokenizer, samples=7, seq_len=32, seed=6), want)


def test_in_bfloat16_it_writes_by_a_copy(gqa, tokenizer, monkeypatch):
    """Where that is multiplied faster and there is room; the first tokens are those of float32, but for a few."""
    drove, before = [], {name: p.clone() for name, p in gqa.named_parameters()}
    monkeypatch.setattr(
        sampling, "StaticDriver", lambda model, *a, **k: drove.append(model) or StaticDriver(model, *a, **k)
    )

    def written(narrow, free=1 << 40):
        monkeypatch.setattr(sampling, "multiplies_bfloat16", lambda device: narrow)
        monkeypatch.setattr(sampling, "free_bytes", lambda device: free)
        return self_written(gqa, tokenizer, samples=64, seq_len=24, seed=5, batch=64)

    wide, narrow, short = written(False), written(True), written(True, free=1)
    assert [{p.dtype for p in model.parameters()} for model in drove] == [
        {torch.float32},
        {torch.bfloat16},
        {torch.float32},
    ]
    assert torch.equal(short, wide)
    same = narrow == wide
    assert same[:, :4].double().mean() > 0.8
    assert not same.all()
    assert all(torch.equal(before[name], p) for name, p in gqa.named_parameters())


def test_tokens_are_drawn_by_their_probabilities():
    """A hundred thousand evenly spaced numbers hit every token as often as its probability says, to within one."""
    logits = torch.tensor([2.0, -1.0, 5.0, 0.5, 3.0, -30.0])
    numbers = (torch.arange(100_000) + 0.5) / 100_000
    drawn = Sampler([0, 1, 3, 4, 5], 6, torch.device("cpu")).draw(logits.expand(len(numbers), 6), numbers)
    kept = logits.double().clone()
    kept[2] = -torch.inf
    want = 100_000 * torch.softmax(kept, 0)
    torch.testing.assert_close(torch.bincount(drawn, minlength=6).double(), want, rtol=0, atol=1.5)


@pytest.mark.parametrize("number", [0.0, 0.5, 1.0 - 2.0**-24])
def test_no_number_draws_a_barred_token(number):
    sampler = Sampler([3, 4], 8, torch.device("cpu"))
    assert sampler.draw(torch.zeros(1, 8), torch.tensor([number])).item() in (3, 4)


def test_numbers_belong_to_sample_and_position():
    assert torch.equal(uniforms(9, 40, 3)[:4], uniforms(4, 40, 3))
    before = torch.get_rng_state()
    uniforms(2, 2, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_ids_that_the_tokenizer_lacks_are_never_written(tokenizer):
    from dataclasses import replace

    model = replace(TINY[2], vocabulary=600).build()
    got = hk.calibration(model, tokenizer, samples=8, seq_len=32)
    assert int(got.max()) < len(tokenizer)
    small = fresh(TINY[1])
    small.resize_token_embeddings(100)
    assert int(hk.calibration(small, tokenizer, samples=4, seq_len=16, bos=False).max()) < 100
    with pytest.raises(HywiaError, match="vocabulary"):
        hk.calibration(small, tokenizer, samples=4, seq_len=16)  # its beginning-of-text token is 256


def test_without_a_beginning(gqa, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "_special_tokens_map", {**tokenizer._special_tokens_map, "bos_token": None})
    assert tokenizer.bos_token_id is None
    got = hk.calibration(gqa, tokenizer, samples=6, seq_len=12)
    assert got.shape == (6, 12)
    assert int(got.max()) < 256
    with pytest.raises(UsageError, match="bos: expected a tokenizer with a beginning-of-text token"):
        hk.calibration(gqa, tokenizer, samples=6, seq_len=12, bos=True)


def test_a_tokenizer_of_ends_alone(gqa, tokenizer):
    gqa.generation_config.eos_token_id = list(range(259))
    with pytest.raises(HywiaError, match="ordinary tokens"):
        hk.calibration(gqa, tokenizer, samples=2, seq_len=12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(gqa, tokenizer, bad):
    config = gqa.generation_config
    with torch.no_grad():
        gqa.model.norm.weight.fill_(bad)
    gqa.model.layers[1].train()
    with pytest.raises(HywiaError, match="its logits are NaN or infinite"):
        hk.calibration(gqa, tokenizer, samples=2, seq_len=12)
    assert gqa.generation_config is config
    assert [m.training for m in (gqa, gqa.model.layers[0], gqa.model.layers[1])] == [False, False, True]


def test_dropout_has_no_part(tokenizer):
    model = fresh_named("gpt2")
    model.config.use_cache = False
    want = self_written(model, tokenizer, samples=3, seq_len=20, seed=0, bos=False)
    model.train()
    modes = [m.training for m in model.modules()]
    assert torch.equal(self_written(model, tokenizer, samples=3, seq_len=20, seed=0, bos=False), want)
    assert [m.training for m in model.modules()] == modes


def test_prompts(gqa, tokenizer):
    with pytest.raises(UsageError, match="prompt: expected at least one token"):
        continuation(gqa, tokenizer, "")
    model = fresh(TINY[2])
    with torch.no_grad():
        model.lm_head.weight[257] = 1e3  # ends at once, or never
        model.lm_head.weight[257] *= torch.sign(model.model.norm.weight)
    assert isinstance(continuation(model, tokenizer, "hello", new=5), str)


@pytest.mark.parametrize("mode", ["all", "some"])
def test_perplexity_is_measured_in_eval_mode_and_modes_come_back(mode):
    model = fresh_named("gpt2")
    tokens = torch.randint(2, 100, (4, 20), generator=torch.Generator().manual_seed(0))
    want = hk.perplexity(model, tokens)
    (model if mode == "all" else model.transformer.h[1]).train()
    modes = [m.training for m in model.modules()]
    assert hk.perplexity(model, tokens) == want
    assert [m.training for m in model.modules()] == modes
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(HywiaError, match="its loss is NaN"):
        hk.perplexity(model, tokens)
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize(
    ("tokens", "keywords", "message"),
    [
        (torch.zeros(0, 8, dtype=torch.int64), {}, "at least one sample"),
        (torch.zeros(2, 1, dtype=torch.int64), {}, "block: expected at least 2 tokens, got 1"),
        (torch.zeros(8, dtype=torch.int64), {}, "tokens: expected int64 token ids"),
        (torch.zeros(2, 8), {}, "tokens: expected int64 token ids"),
        (torch.full((2, 8), 259), {}, r"vocabulary \[0, 259\), got ids from 259 to 259"),
        (torch.full((2, 8), -1), {}, r"vocabulary \[0, 259\), got ids from -1 to -1"),
        (torch.zeros(2, 8, dtype=torch.int64), {"batch": 0}, "batch: expected at least 1"),
    ],
)
def test_tokens_that_cannot_be_evaluated(gqa, tokens, keywords, message):
    with pytest.raises(HywiaError, match=message):
        hk.perplexity(gqa, tokens, **keywords)


def test_a_tokenizer_that_returns_nothing(gqa):
    class Nothing:
        bos_token_id = eos_token_id = pad_token_id = None

        def __call__(self, text, **keywords):
            return {"input_ids": []}

    with pytest.raises(HywiaError, match="text: expected at least one block of 128 tokens, got 0 tokens"):
        hk.evaluate(gqa, Nothing(), "some text " * 99)
    with pytest.raises(UsageError, match="prompt: expected at least one token, got none"):
        continuation(gqa, Nothing(), "hello")
