"""Scorers see every change of weights and gradients, also those that torch does not count."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch_pruning
from torch import nn
from torch_pruning_flow import backward, function, hand_group, pruner_of

from hywia_kernels import UsageError
from hywia_kernels.integrations import torch_pruning as ours
from hywia_kernels.integrations.measured import measured
from hywia_kernels.integrations.modules import SumsCache
from tests.support.nets import Group, llama


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    ours.clear_fisher()


def stepped(name: str, **options):
    def change(linear: nn.Linear) -> None:
        grad = torch.ones_like(linear.weight) if linear.weight.grad is None else linear.weight.grad
        linear.weight.grad = grad
        getattr(torch.optim, name)([linear.weight], lr=0.1, **options).step()

    return change


def by_data(linear: nn.Linear) -> None:
    linear.weight.data.mul_(2.0)


def one_entry(linear: nn.Linear) -> None:
    linear.weight.data[2, 3] = torch.nextafter(linear.weight.data[2, 3], torch.tensor(9.0))


def exchanged_rows(linear: nn.Linear) -> None:
    linear.weight.data.copy_(linear.weight.data.flip(0).clone())


def exchanged_entries(linear: nn.Linear) -> None:
    linear.weight.data[0, :2] = linear.weight.data[0, :2].flip(0).clone()


def two_signs(linear: nn.Linear) -> None:
    linear.weight.data[0, 1] *= -1
    linear.weight.data[3, 5] *= -1


def through_numpy(linear: nn.Linear) -> None:
    linear.weight.detach().numpy()[1] += 1.0


def loaded(linear: nn.Linear) -> None:
    linear.load_state_dict({"weight": torch.ones(6, 8), "bias": torch.ones(6)})


def assigned(linear: nn.Linear) -> None:
    linear.load_state_dict({"weight": torch.ones(6, 8), "bias": torch.ones(6)}, assign=True)


def put_in(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight.set_(torch.ones(6, 8))


def in_place(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight.add_(1.0)


def halved_precision(linear: nn.Linear) -> None:
    linear.to(torch.bfloat16)


CHANGES = {
    "SGD": stepped("SGD"),
    "SGD foreach": stepped("SGD", foreach=True),
    "SGD fused": stepped("SGD", fused=True),
    "Adam fused": stepped("Adam", fused=True),
    "AdamW": stepped("AdamW"),
    "AdamW fused": stepped("AdamW", fused=True),
    "Adagrad fused": stepped("Adagrad", fused=True),
    **{
        f.__name__: f
        for f in (
            by_data,
            one_entry,
            exchanged_rows,
            exchanged_entries,
            two_signs,
            through_numpy,
            loaded,
            assigned,
            put_in,
            in_place,
            halved_precision,
        )
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_scorer_is_like_a_fresh_one_after_any_change(change):
    linear = nn.Linear(8, 6)
    linear.weight.grad = torch.randn(6, 8)
    makes = [ours.MagnitudeImportance, ours.TaylorImportance, lambda **k: ours.HyWIAImportance("fine", "first", **k)]
    inputs = Group().add(linear, function.prune_linear_in_channels, range(8))
    for group in (hand_group(linear), inputs):
        for make in makes:
            scorer = make(normalizer=None)
            scorer(hand_group(linear))  # which reads both axes
            CHANGES[change](linear)
            if linear.weight.grad is None or linear.weight.grad.dtype != linear.weight.dtype:
                linear.weight.grad = torch.ones_like(linear.weight)
            assert torch.equal(scorer(group), make(normalizer=None)(group))


def test_a_changed_gradient_is_seen():
    linear = nn.Linear(8, 6)
    linear.weight.grad = torch.randn(6, 8)
    scorer = ours.TaylorImportance(normalizer=None)
    before = scorer(hand_group(linear))
    linear.weight.grad.data.mul_(2.0)
    assert torch.equal(scorer(hand_group(linear)), 2.0 * before)


@pytest.mark.parametrize("change", CHANGES)
def test_a_stamp_tells_bits(change):
    linear = nn.Linear(8, 6)
    stamp = SumsCache.stamp(linear.weight)
    assert stamp.fits(linear.weight)
    assert stamp.fits(copy.deepcopy(linear.weight)), "what holds the same is the same"
    CHANGES[change](linear)
    assert not stamp.fits(linear.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("shape", [(1,), (3, 3), (5, 7), (64, 67), (40, 301)])
def test_a_stamp_tells_every_bit_and_every_exchange(dtype, shape):
    generator = torch.Generator().manual_seed(7)
    tensor = (10.0 * torch.randn(shape, generator=generator)).to(dtype)
    stamp = SumsCache.stamp(tensor)
    for _ in range(20):
        other = tensor.clone()
        raw = other.view(-1).view(torch.uint8)
        raw[torch.randint(raw.numel(), (1,), generator=generator)] ^= 1 << int(
            torch.randint(8, (1,), generator=generator)
        )
        assert not stamp.fits(other)
        other = tensor.clone().view(-1)
        at = torch.randint(other.numel(), (2,), generator=generator)
        other[at] = other[at.flip(0)]
        assert stamp.fits(other.view(shape)) == torch.equal(other.view(shape), tensor)
    assert stamp.fits(tensor.clone())
    assert not stamp.fits(-tensor)
    with torch.inference_mode():
        assert stamp.fits(tensor.clone())
    apart = torch.zeros(tensor.numel() + 1, dtype=dtype)[1:].view(shape).copy_(tensor)  # not aligned to words
    assert stamp.fits(apart)


@pytest.mark.parametrize("change", CHANGES)
def test_measured_channels_are_of_the_weights_that_were_measured(change):
    model, ids = llama(), torch.randint(96, (2, 12))
    ours.accumulate_fisher(model, ids)
    linear = model.model.layers[0].mlp.up_proj
    wanted = measured(linear, "out").fine["second"].clone()
    small = nn.Linear(8, 6)
    before = small.weight.detach().clone()
    CHANGES[change](small)
    linear.weight.data = linear.weight.data.clone()
    assert torch.equal(measured(linear, "out").fine["second"], wanted), "elsewhere in memory, the same values"
    if small.weight.dtype != linear.weight.dtype:
        linear.to(small.weight.dtype)
    else:
        linear.weight.data[:6, :8][small.weight != before] = small.weight.data[small.weight != before]
    with pytest.raises(UsageError, match=r"expected the weight that was measured.*accumulate_fisher"):
        measured(linear, "out")
    for scorer in (ours.TaylorImportance(), ours.HessianImportance(), ours.HyWIAImportance()):
        with pytest.raises(UsageError, match="expected the weight that was measured"):
            scorer(hand_group(linear))


@pytest.mark.parametrize("what", ["weight", "bias", "vector"])
def test_accumulated_squares_are_of_the_values_that_had_the_gradients(what):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(4, 3), nn.Parameter(torch.randn(3))

    model = Scaled()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    scorer = ours.HessianImportance(
        normalizer=None, bias=True, target_types=[*ours.HessianImportance().target_types, nn.Parameter]
    )
    scorer.accumulate_grad(model)
    group = hand_group(model.linear)
    if what == "vector":
        group = hand_group(model.linear).add(model.scale, function.prune_parameter_out_channels, range(3))
    want = scorer(group)
    changed = {"weight": model.linear.weight, "bias": model.linear.bias, "vector": model.scale}[what]
    kept = changed.detach().clone()
    torch.optim.SGD([changed], lr=0.1, fused=True).step()
    for again in (lambda: scorer(group), lambda: scorer.accumulate_grad(model)):
        with pytest.raises(UsageError, match=r"call zero_grad\(\), then accumulate_grad\(model\) again"):
            again()
    changed.data.copy_(kept)
    assert torch.equal(scorer(group), want)


def test_inference_tensors_are_scored():
    with torch.inference_mode():
        linear = nn.Linear(8, 6)
    scorer = ours.MagnitudeImportance(normalizer=None)
    with scorer.unchanged():
        for _ in range(2):
            torch.testing.assert_close(scorer(hand_group(linear)), linear.weight.square().sum(1))
    assert scorer.cache.reads == 1


def test_nothing_outlives_a_stretch_without_changes():
    linear = nn.Linear(8, 6)
    scorer = ours.MagnitudeImportance(normalizer=None)
    with scorer.unchanged():
        before = scorer(hand_group(linear))
    linear.weight.data.mul_(2.0)
    assert torch.equal(scorer(hand_group(linear)), 4.0 * before)
    with scorer.unchanged():
        assert torch.equal(scorer(hand_group(linear)), 4.0 * before)
        linear.weight.data = 3.0 * linear.weight.data  # elsewhere, so it is seen though the caller said otherwise
        torch.testing.assert_close(scorer(hand_group(linear)), 36.0 * before)


class Doubling(torch_pruning.pruner.function.LinearPruner):
    """A pruning function of the caller's that changes weights behind torch's back."""

    def prune_out_channels(self, layer, idxs):
        layer.weight.data.mul_(2.0)
        return layer

    prune_in_channels = prune_out_channels


def seen_by(scorer, model, change, monkeypatch):
    """Scores of every group of a pruner's steps beside a fresh scorer's at that moment, `change` between the steps."""
    pairs = []
    real = type(scorer)._scores

    def both(self, group):
        got = real(self, group)
        assert self.scope is not None
        pairs.append((got.clone(), real(type(scorer)(), group)))
        return got

    pruner = pruner_of(model, scorer, iterative_steps=2)
    for step in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(type(scorer), "_scores", both)
            pruner.step()
        for layer in model.model.layers:
            layer.self_attn.num_heads = (6, 3)[step]
        change(model)
    return pairs


def test_steps_see_what_happened_between_them(monkeypatch):
    model, inputs = llama(8), torch.randint(96, (2, 12))
    scorer = ours.MagnitudeImportance()

    def fused(model):
        backward(model, inputs)
        torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()

    pairs = seen_by(scorer, model, fused, monkeypatch)
    assert len(pairs) >= 8
    assert all(torch.equal(got, want) for got, want in pairs)


def test_a_step_reads_once_and_leaves_nothing_to_the_next():
    model = llama(8)
    scorer = ours.MagnitudeImportance()
    pruner = pruner_of(model, scorer, iterative_steps=2)
    pruner.step()
    assert scorer.cache.reads == 15
    token = scorer.scope
    assert token is not None
    again = pickle.loads(pickle.dumps(scorer))
    assert (again.scope, again._step) == (None, None)
    scorer(hand_group(nn.Linear(2, 3)))
    assert (scorer.scope, len(scorer.cache._kept)) == (None, 0)


def test_an_interactive_step_keeps_nothing():
    """Whoever takes its groups may change weights between them."""
    model = llama(8)
    scorer = ours.MagnitudeImportance()
    scopes = []
    for _ in pruner_of(model, scorer, iterative_steps=2).step(interactive=True):
        scopes.append(scorer.scope)
    assert len(scopes) >= 4
    assert set(scopes) == {None}


def test_a_step_with_pruning_functions_of_the_callers_keeps_nothing():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(8, 16), nn.ReLU(), nn.Linear(16, 4))
    scorer = ours.MagnitudeImportance()
    options = dict(importance=scorer, pruning_ratio=0.5, global_pruning=False, ignored_layers=[model[2]])
    pruner_class = getattr(torch_pruning.pruner, "BasePruner", None) or torch_pruning.pruner.MetaPruner
    pruner_class(model, torch.randn(2, 8), customized_pruners={Own: Doubling()}, **options).step()
    assert scorer.scope is None
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    pruner_class(model, torch.randn(2, 8), **(options | {"ignored_layers": [model[2]]})).step()
    assert scorer.scope is not None
    assert model[0].out_features == 8


def test_a_pruner_of_the_callers_own_between_step_and_scorer_keeps_nothing():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    base = getattr(torch_pruning.pruner, "BasePruner", None) or torch_pruning.pruner.MetaPruner

    class Own(base):
        def estimate_importance(self, group, *args, **keywords):
            model[0].weight.data.mul_(2.0)
            return super().estimate_importance(group, *args, **keywords)

    scorer = ours.MagnitudeImportance(normalizer=None)
    Own(model, torch.randn(2, 8), importance=scorer, pruning_ratio=0.5, ignored_layers=[model[2]]).step()
    assert scorer.scope is None
