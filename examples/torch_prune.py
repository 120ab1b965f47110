"""Our scores behind PyTorch's own structured pruning, `torch.nn.utils.prune.ln_structured`.

    python examples/torch_prune.py                       # a small convolutional network, three scorers
    python examples/torch_prune.py --amount 0.5

Any tool can be driven so: it takes what a `hywia_kernels.Scorer` returns, one number per row or column of each matrix.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import nn
from torch.nn.utils import prune

import hywia_kernels as hk


def zero_channels(model: nn.Module, scorer: hk.Scorer, amount: float) -> dict[str, int]:
    """Set the lowest share of every scored module's output channels to zero; how many, by module."""
    gone = {}
    for (name, axis), scores in scorer(model).items():
        module = model.get_submodule(name)
        if axis != (1 if getattr(module, "transposed", False) else 0) or isinstance(module, nn.Embedding):
            continue  # inputs are the outputs of the module before
        shape = [1] * module.weight.dim()
        shape[axis] = -1
        # ln_structured ranks by the norm of what it is given: the same score for all weights of a channel.
        importance = scores.view(shape).expand_as(module.weight)
        prune.ln_structured(module, "weight", amount=amount, n=1, dim=axis, importance_scores=importance)
        prune.remove(module, "weight")
        gone[name] = int((module.weight.movedim(axis, 0).flatten(1) == 0).all(1).sum())
    return gone


def data(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which quarter of an image is the brightest."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 1, 8, 8, generator=generator)
    labels = torch.randint(4, (samples,), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = 4 * (label // 2), 4 * (label % 2)
        image[:, top : top + 4, left : left + 4] += 0.7
    return images, labels


def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)),
    )
    images, labels = data(1024, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--amount", type=float, default=0.4, help="share of the channels of each convolution")
    arguments = parser.parse_args(argv)
    images, labels = data(1024, 2)
    accuracy = lambda model: float((model(images).argmax(1) == labels).float().mean())  # noqa: E731
    dense = trained()
    print(f"{'dense':<24} accuracy {accuracy(dense):.3f}")
    for scorer in (hk.MagnitudeScorer(), hk.TaylorScorer("fine"), hk.TaylorScorer("coarse")):
        model = copy.deepcopy(dense)
        classify, model[6] = model[6], nn.Identity()  # the last layer's outputs are classes: they stay
        model.zero_grad()
        nn.functional.cross_entropy(classify(model(images)), labels).backward()
        gone = zero_channels(model, scorer, arguments.amount)
        model[6] = classify
        name = f"{type(scorer).__name__} {getattr(scorer, 'grain', '')}".strip()
        print(f"{name:<24} accuracy {accuracy(model):.3f}   zeroed {gone}")


if __name__ == "__main__":
    main()
