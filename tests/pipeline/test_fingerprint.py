"""The fingerprint: what must change it, what must not, and when it reads."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from torch import nn

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.arch import facts
from hywia_kernels.arch.facts import _step, fingerprint, fingerprint_and_count
from hywia_kernels.method import statistics as statistics_module
from tests.support.models import random_model, sizes
from tests.support.tiny import TINY, fresh, make_plan

# (rows, columns) or (matrices, rows, columns); the sizes of real models, powers of two and others.
SHAPES = [
    (4096, 4096),
    (4096, 11008),
    (11008, 4096),
    (8192, 8192),
    (28672, 8192),
    (128256, 4096),
    (1024, 4096),
    (576, 1536),
    (3, 5),
    (1, 7),
    (7, 1),
    (2, 100_000),
    (997, 991),
    (8, 14336, 4096),
    (60, 2816, 2048),
    (4, 3, 5),
]

SMALL = {
    **sizes(vocabulary=64, hidden=32, intermediate=48, layers=1, heads=4, kv_heads=4),
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_and_column_of_every_matrix_is_read(shape):
    numel = math.prod(shape)
    at = torch.arange(0, numel, _step(torch.Size(shape)))
    rows, columns = shape[-2:]
    matrix, inside = at // (rows * columns), at % (rows * columns)
    for e in range(numel // (rows * columns)):
        here = inside[matrix == e]
        assert len((here % columns).unique()) == columns
        assert len((here // columns).unique()) == rows


def test_few_values_of_a_large_matrix_are_read():
    assert math.prod((4096, 4096)) // _step(torch.Size((4096, 4096))) <= 4100
    assert math.prod((4096, 11008)) // _step(torch.Size((4096, 11008))) <= 11100


@pytest.mark.parametrize("shape", [(256, 256), (64, 1024), (1024, 64), (37, 91)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_one_column_or_row_changes_it(shape, transposed):
    layer = nn.Linear(shape[1], shape[0], bias=False)
    if transposed:
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
        assert not layer.weight.is_contiguous()
    before = fingerprint(layer)
    draw = random.Random(0)
    for axis, size in enumerate(shape):
        for at in draw.sample(range(size), 16):
            part = layer.weight.data.select(axis, at)
            kept = part.clone()
            part.mul_(1.5)
            assert fingerprint(layer) != before, (axis, at)
            part.copy_(kept)
    assert fingerprint(layer) == before


def test_the_columns_that_an_even_step_never_met():
    layer = nn.Linear(2048, 2048, bias=False)
    before = fingerprint(layer)
    with torch.no_grad():
        layer.weight[:, 1:] = 0
    assert fingerprint(layer) != before


def test_one_expert_of_a_stack_changes_it():
    stack = nn.Module()
    stack.w = nn.Parameter(torch.randn(6, 32, 16))
    before = fingerprint(stack)
    for e in range(6):
        for column in range(16):
            other = copy.deepcopy(stack)
            with torch.no_grad():
                other.w[e, :, column] += 1
            assert fingerprint(other) != before


def changed(model, field, value):
    other = copy.deepcopy(model)
    if isinstance(field, tuple):
        getattr(other.config, field[0])[field[1]] = value
    else:
        setattr(other.config, field, value)
    return fingerprint(other)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (("rope_parameters", "rope_theta"), 5e5),
        (("rope_parameters", "rope_type"), "linear"),
        ("rms_norm_eps", 1e-3),
        ("hidden_act", "gelu"),
        ("head_dim", 4),
        ("max_position_embeddings", 64),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("query_pre_attn_scalar", 17),
        ("logits_scaling", 2.0),
        ("attention_multiplier", 0.5),
        ("sliding_window", 4),
        ("layer_types", ["sliding_attention"] * 3),
        ("some_field_of_next_year", 3),
    ],
)
def test_config_fields_of_the_mathematics_change_it(gqa, field, value):
    assert changed(gqa, field, value) != fingerprint(gqa)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_cache", False),
        ("output_hidden_states", True),
        ("_name_or_path", "elsewhere"),
        ("transformers_version", "4.0"),
        ("architectures", ["Other"]),
        ("dtype", "bfloat16"),
        ("attention_dropout", 0.1),
        ("initializer_range", 0.5),
        ("pad_token_id", 3),
        ("auto_map", {"AutoConfig": "x.Y"}),
        ("new_switch", False),
        ("new_size", None),
    ],
)
def test_config_fields_of_nothing_keep_it(gqa, field, value):
    before = fingerprint(gqa)
    assert changed(gqa, field, value) == before


def test_how_attention_is_computed_keeps_it(gqa):
    before = fingerprint(gqa)
    gqa.set_attn_implementation("eager")
    assert fingerprint(gqa) == before


def test_families_of_one_shape_differ_and_a_stand_in_does_not():
    same = dict(SMALL, head_dim=8, rms_norm_eps=1e-6, tie_word_embeddings=False, pad_token_id=0, hidden_act="silu")
    llama = random_model(**same)
    prints = []
    for kind, more in (("mistral", {"sliding_window": None}), ("gemma", {})):
        other = random_model(kind, **same, **more)
        other.load_state_dict(llama.state_dict())
        prints.append(fingerprint(other))
    assert prints[0] == fingerprint(llama)
    assert prints[1] != fingerprint(llama)


def test_buffers_change_it(gqa):
    before = fingerprint(gqa)
    buffers = dict(gqa.named_buffers())
    assert "model.rotary_emb.inv_freq" in buffers
    for name in buffers:
        other = copy.deepcopy(gqa)
        dict(other.named_buffers())[name].mul_(1.01)
        assert fingerprint(other) != before, name
    gqa.register_buffer("shift", torch.tensor([[70_000, 1], [2, 3]]))
    once = fingerprint(gqa)
    gqa.shift[0, 0] += 1
    assert len({before, once, fingerprint(gqa)}) == 3


def test_derived_buffers_may_differ_in_their_last_bits(gqa):
    before = fingerprint(gqa)
    frequencies = gqa.model.rotary_emb.inv_freq
    frequencies.copy_(torch.nextafter(frequencies, frequencies + 1))
    assert fingerprint(gqa) == before


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_text_keep_it(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 16}
    longest = 16 if kind == "dynamic" else 64
    model = random_model(**{**SMALL, "max_position_embeddings": longest}, rope_parameters=rope)
    before = fingerprint(model)
    with torch.no_grad():
        model(torch.zeros(1, 40, dtype=torch.long))
    assert fingerprint(model) == before


def test_use_keeps_it(model, tokens, tmp_path):
    before = fingerprint(model)
    assert fingerprint(model) == before
    model.train()
    model.requires_grad_(False)
    assert fingerprint(model) == before
    model.eval().requires_grad_(True)
    with torch.no_grad():
        model(tokens)
    assert fingerprint(model.double()) == before
    assert fingerprint(model.float()) == before
    model.save_pretrained(tmp_path / "m")
    assert fingerprint(type(model).from_pretrained(tmp_path / "m")) == before


@pytest.mark.parametrize("name", ["both", "adaptive"])
def test_a_pruned_model_has_it_after_the_disk_too(gqa, tokenizer, tmp_path, name):
    hk.prune(gqa, make_plan(gqa, name))
    hk.save(gqa, tokenizer, tmp_path / "out")
    assert fingerprint(hk.load(str(tmp_path / "out"))[0]) == fingerprint(gqa)


def test_bfloat16_and_what_it_becomes_in_float32_have_the_same():
    model = fresh(TINY[2])
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    half = fingerprint(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    assert fingerprint(model) == half


def test_identity_counts_as_the_model_does(model):
    assert fingerprint_and_count(model) == (fingerprint(model), sum(p.numel() for p in model.parameters()))
    assert fingerprint_and_count(model, dict(model.named_modules())) == fingerprint_and_count(model)


def test_weights_that_are_not_here_are_named():
    with torch.device("meta"):
        layer = nn.Linear(3, 3)
    with pytest.raises(HywiaError, match="weight: expected a plain tensor .*got one on the meta"):
        fingerprint(layer)


class FakeCuda:
    """Records the order in which events, streams and reads happen."""

    def __init__(self, monkeypatch):
        self.calls = []
        log = self.calls

        class Event:
            def record(self, stream):
                log.append(("record", stream))

        class Stream:
            def __init__(self, device):
                self.device = device

            def wait_event(self, event):
                log.append(("wait", type(event).__name__, str(self.device)))

        class Using:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                log.append(("enter", str(self.stream.device)))

            def __exit__(self, *_):
                log.append(("exit", str(self.stream.device)))

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", Using)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
        monkeypatch.setattr(facts, "fingerprint_and_count", lambda *a: log.append(("read",)) or ("x", 1))


def test_it_waits_for_what_was_queued_on_each_device(monkeypatch):
    fake = FakeCuda(monkeypatch)
    events = facts.queued([torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")])
    assert facts.fingerprint_and_count_after(events, nn.Linear(1, 1)) == ("x", 1)
    assert fake.calls == [
        ("record", "current of cuda:0"),
        ("record", "current of cuda:1"),
        ("wait", "Event", "cuda:0"),
        ("enter", "cuda:0"),
        ("wait", "Event", "cuda:1"),
        ("enter", "cuda:1"),
        ("read",),
        ("exit", "cuda:1"),
        ("exit", "cuda:0"),
    ]


def test_calibrate_marks_what_is_queued_before_it_launches_anything(gqa, tokens, monkeypatch):
    order = []

    def logged(name):
        original = getattr(statistics_module, name)
        monkeypatch.setattr(statistics_module, name, lambda *a, **k: (order.append(name), original(*a, **k))[1])

    for name in ("queued", "_run", "fingerprint_and_count_after"):
        logged(name)
    measured = hk.calibrate(gqa, tokens)
    assert order == ["queued", "_run", "fingerprint_and_count_after"]
    assert measured.fingerprint == fingerprint(gqa)
