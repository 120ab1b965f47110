"""Handlers are bound methods of one object a layer type, compared by equality; a group is pairs `(dep, idxs)`."""

from __future__ import annotations

from types import SimpleNamespace


class _Functions:
    def prune_out_channels(self, layer, idxs):
        raise NotImplementedError

    def prune_in_channels(self, layer, idxs):
        raise NotImplementedError


_linear, _embedding = _Functions(), _Functions()
prune_linear_out_channels, prune_linear_in_channels = _linear.prune_out_channels, _linear.prune_in_channels
prune_embedding_out_channels = _embedding.prune_out_channels


class Importance:
    def __call__(self, group):
        raise NotImplementedError


importance = SimpleNamespace(Importance=Importance)
