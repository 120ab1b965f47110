"""ALiBi after heads have gone: every survivor keeps its own slope.

The model makes the biases of all the heads it was built with, for all layers at once; an attention module that lost
heads picks from them the biases of the heads that its layer kept.
"""

from __future__ import annotations

import torch

__all__ = ["SURVIVORS", "keep_heads"]

SURVIVORS = "alibi_survivors"  # attribute of the attention module: what `keep_heads` was called with


class _Pick:
    """Forward pre-hook of an attention module that picks the biases of `heads` from those of `of` heads."""

    def __init__(self, heads, of, argument, axis):
        self.heads, self.of, self.argument, self.axis = heads, of, argument, axis

    def __call__(self, module, args, kwargs):
        bias = kwargs.get(self.argument)
        if bias is None:
            raise RuntimeError(f"expected the biases of attention as the keyword {self.argument!r}, got none")
        axis = self.axis % bias.dim()
        if bias.shape[axis] % self.of:
            raise RuntimeError(f"expected biases of {self.of} heads on axis {axis}, got shape {tuple(bias.shape)}")
        heads = torch.tensor(self.heads, device=bias.device)
        picked = bias.unflatten(axis, (-1, self.of)).index_select(axis + 1, heads)
        return args, {**kwargs, self.argument: picked.flatten(axis, axis + 1)}


def keep_heads(module, heads, of, argument, axis):
    """Make an attention module pick the biases of some of the model's heads.

    Args:
        module: the attention module. heads: ascending indices of its heads among those the model was built with.
        of: how many heads the model was built with. argument: keyword by which the module's forward takes the biases.
        axis: the biases' axis of heads, which may be batch times heads.
    """
    for key, hook in list(module._forward_pre_hooks.items()):
        if type(hook).__name__ == _Pick.__name__:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    heads = [int(h) for h in heads]
    setattr(module, SURVIVORS, {"heads": heads, "of": of, "argument": argument, "axis": axis})
    module.register_forward_pre_hook(_Pick(heads, of, argument, axis), with_kwargs=True)
