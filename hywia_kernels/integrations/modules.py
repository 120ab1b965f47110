"""A layer's weight as a matrix whose channels lie along both axes, and their Taylor sums, read once a step.

The weight `[out, in/groups, k…]` of a convolution is the matrix `[out, in/groups · k…]`: an input channel is `k…`
consecutive columns. Transposed convolutions `[in, out/groups, k…]` have the two the other way round. An embedding
`[entries, features]` has its output channels in its columns, and no input channels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import UsageError

__all__ = ["Sums", "SumsCache", "bias_terms", "gradient", "layout", "magnitude_sums", "taylor_sums", "tensor_of"]


class Sums(NamedTuple):
    """Sums of the terms over each channel, float32 `[channels]`: of their absolute values, and of the signed values."""

    fine: Tensor
    signed: Tensor


class Layout(NamedTuple):
    """Of each side, the matrix's axis along which its channels lie and the consecutive lines of one channel.

    `inputs` is None where a layer has no input channels.
    """

    out: tuple[int, int]
    inputs: tuple[int, int] | None


BySide = dict[str, Sums]  # the keys are "out" and "in"


def tensor_of(owner: Any) -> Tensor | None:
    """The weight of a module, or a bare parameter itself; None for anything else (an operation of a graph)."""
    if isinstance(owner, Tensor):
        return owner
    weight = getattr(owner, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def layout(owner: Any, weight: Tensor) -> Layout:
    """Where the output and the input channels of a module's weight lie."""
    fold = weight[0, 0].numel() if weight.dim() > 2 and 0 not in weight.shape[:2] else 1
    if isinstance(owner, nn.Embedding):
        return Layout((1, 1), None)
    if getattr(owner, "transposed", False):
        return Layout((1, fold), (0, 1))
    return Layout((0, 1), (1, fold))


def _folded(sums: tuple[Tensor, Tensor], lines: int) -> Sums:
    fine, signed = sums
    if lines > 1:
        fine, signed = fine.view(-1, lines).sum(1), signed.view(-1, lines).sum(1)
    return Sums(fine, signed)


def _by_side(owner: Any, weight: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> BySide:
    both = (rows, columns)
    (out, out_lines), inputs = layout(owner, weight)
    sides = {"out": _folded(both[out], out_lines)}
    if inputs is not None:
        sides["in"] = _folded(both[inputs[0]], inputs[1])
    return sides


def _terms(term: Tensor) -> BySide:
    """Sums of a vector, each entry of which is a channel."""
    return {"out": Sums(term.abs(), term)}


def taylor_sums(owner: Any, weight: Tensor, grad: Tensor, backend: str | None) -> BySide:
    """Sums of `weight · grad` over every output and every input channel, each tensor read once."""
    weight, grad = weight.detach(), grad.detach()
    if weight.dim() == 1:
        return _terms(weight.float() * grad.float())
    rows, columns = ops.taylor_importance_both(weight.flatten(1), grad.flatten(1), backend=backend)
    return _by_side(owner, weight, rows, columns)


def magnitude_sums(owner: Any, weight: Tensor, p: float, backend: str | None) -> BySide:
    """Sums of `|weight|^p` over every output and every input channel."""
    weight = weight.detach()
    if weight.dim() == 1:
        return _terms(weight.float().abs().pow(p))
    matrix = weight.flatten(1)
    if p == 2:  # the op sums `|a·b|`: `|w·w|` here, and `|w·1|` for p = 1
        rows, columns = ops.taylor_importance_both(matrix, matrix, backend=backend)
    else:
        matrix = matrix if p == 1 else matrix.float().abs().pow(p)
        one = torch.ones((), dtype=torch.float32, device=weight.device).expand(matrix.shape)
        rows, columns = ops.taylor_importance_both(matrix, one, backend=backend)
    return _by_side(owner, weight, rows, columns)


def gradient(owner: Any, weight: Tensor) -> Tensor:
    """A weight's gradient.

    Raises:
        UsageError: there is none.
    """
    if weight.grad is None:
        raise UsageError(
            f"{type(owner).__name__} {list(weight.shape)}: expected a gradient in .grad, got None; "
            "run loss.backward() before scoring, or accumulate_fisher(model, batches)"
        )
    return weight.grad


def bias_terms(owner: Any, grad: bool) -> tuple[Tensor, Tensor | None] | None:
    """A module's bias and, with `grad`, its gradient, in float32; None where either is missing."""
    bias = getattr(owner, "bias", None)
    if not isinstance(bias, Tensor) or (grad and bias.grad is None):
        return None
    return bias.detach().float(), bias.grad.detach().float() if grad and bias.grad is not None else None


_LANES = 256  # words to a line: sums along lines and across them tell where a word lies
_LINES = 1 << 14  # at once: what they need beside the tensor is 32 MB, and stays in a GPU's cache


@torch.no_grad()
def _digest(tensor: Tensor) -> tuple[int, ...]:
    """A digest of a tensor's bits: exact sums, weighted by their places, at the speed of a few reads.

    A change of a single entry changes it, and so does an exchange of two, whatever made it. torch's counter of changes
    misses fused optimisers, `.data`, and everything that writes to memory without telling torch.
    """
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0).byte()
    if flat.data_ptr() % 8 or flat.storage_offset() % 8:
        flat = flat.clone()
    whole = flat.numel() // 8
    words = flat[: 8 * whole].view(torch.int64)
    lines = whole // _LANES
    rest = torch.cat([words[lines * _LANES :], flat[8 * whole :].long()])
    sums = []
    for part in words[: lines * _LANES].view(lines, _LANES).split(_LINES):
        # A word's highest bits would be lost among multiples of 2^64, so its upper half is summed by itself too.
        sums += [_weighted(of.sum(dim)) for of in (part, part >> 32) for dim in (0, 1)]
    sums += [_weighted(rest), _weighted(rest >> 32)]
    return tuple(torch.stack(sums).tolist())


def _weighted(values: Tensor) -> Tensor:
    """`Σ odd_i · value_i`, modulo 2^64."""
    places = torch.arange(1, values.numel() + 1, device=values.device)
    return (values * (places * -0x61C8864680B583EB | 1)).sum()  # the golden ratio's odd multiples, far from each other


class _Stamp:
    """Tells whether tensors hold what they held when the stamp was made, by their bits, shape and dtype."""

    def __init__(self, *tensors: Tensor) -> None:
        self._digests = [self._of(t) for t in tensors]

    @staticmethod
    def _of(tensor: Tensor) -> tuple:
        return (tensor.shape, tensor.dtype, *(() if tensor.is_meta else _digest(tensor)))

    def fits(self, *tensors: Tensor) -> bool:
        return len(tensors) == len(self._digests) and all(
            before[:2] == (t.shape, t.dtype) and before == self._of(t)
            for t, before in zip(tensors, self._digests, strict=True)
        )


class _Same:
    """Tells whether tensors are the same objects without a change that torch counts.

    That is enough where no foreign code runs in between.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._versions = [(weakref.ref(t), self._of(t)) for t in tensors]

    @staticmethod
    def _of(tensor: Tensor) -> tuple:
        return None if tensor.is_inference() else tensor._version, tensor.data_ptr(), tensor.shape

    def fits(self, *tensors: Tensor) -> bool:
        return len(tensors) == len(self._versions) and all(
            ref() is t and before == self._of(t) for t, (ref, before) in zip(tensors, self._versions, strict=True)
        )


class SumsCache:
    """Keeps sums by module, since pruning replaces a module's parameters.

    `get` keeps what it computes within one `scope` only: an object that stands for a stretch of time in which weights
    and gradients stay as they are, but for changes that torch counts. `put` keeps a value until `clear`, and `find`
    compares the bits of the tensors, once a scope, with those that the value was made from.
    """

    def __init__(self) -> None:
        self._scope: Any = None
        self._kept: weakref.WeakKeyDictionary[Any, tuple[_Same, Any]] = weakref.WeakKeyDictionary()
        self._put: weakref.WeakKeyDictionary[Any, tuple[_Stamp, Any]] = weakref.WeakKeyDictionary()
        self.reads = 0  # how often a weight was read

    def _enter(self, scope: Any) -> None:
        if scope is not self._scope:
            self._kept.clear()
            self._scope = scope

    def get(self, owner: Any, tensors: tuple[Tensor, ...], compute: Callable[[], Any], scope: Any = None) -> Any:
        """What `compute` returns for a module and these tensors, kept within the scope; None: it is not kept."""
        self._enter(scope)
        kept = self._kept.get(owner)
        if kept is not None and kept[0].fits(*tensors):
            return kept[1]
        value = compute()
        self.reads += 1
        if scope is not None:
            self._kept[owner] = (_Same(*tensors), value)
        return value

    @staticmethod
    def stamp(*tensors: Tensor) -> _Stamp:
        """What `put` keeps of tensors, to be compared with by `fits`."""
        return _Stamp(*tensors)

    def put(self, owner: Any, tensors: tuple[Tensor, ...], value: Any) -> None:
        """Keep a value that was made from these tensors of a module."""
        self._kept.pop(owner, None)
        self._put[owner] = (self.stamp(*tensors), value)

    def find(self, owner: Any, tensors: tuple[Tensor, ...], again: str, scope: Any = None) -> Any | None:
        """The value that was put for a module, or None.

        Raises:
            UsageError: the tensors have changed since; the message says to call `again`.
        """
        self._enter(scope)
        put = self._put.get(owner)
        if put is None:
            return None
        kept = self._kept.get(owner)
        if kept is not None and kept[0].fits(*tensors):
            return put[1]
        if not put[0].fits(*tensors):
            raise UsageError(
                f"{type(owner).__name__} {list(tensors[0].shape)}: expected the weight that was measured, got one that "
                f"has been replaced or changed since; call {again} again"
            )
        if scope is not None:
            self._kept[owner] = (_Same(*tensors), None)
        return put[1]

    def forget(self) -> None:
        """Forget what `get` kept."""
        self._scope = None
        self._kept.clear()

    def clear(self) -> None:
        """Forget what `get` and `put` kept."""
        self.forget()
        self._put.clear()

    def __bool__(self) -> bool:
        return bool(self._put)

    def __getstate__(self) -> dict:  # scores are cheap to make again, and weak references cannot be pickled
        return {}

    def __setstate__(self, state: dict) -> None:
        self.__init__()  # type: ignore[misc]
