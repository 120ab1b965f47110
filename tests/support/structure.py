"""Whether two models are alike in all but their values."""

from __future__ import annotations

from hywia_kernels import arch


def check_alike(bare, model):
    """All that planning asks of a model."""
    assert arch.groups(bare) == arch.groups(model)
    described = {n: (p.shape, p.dtype) for n, p in bare.named_parameters()}
    assert described == {n: (p.shape, p.dtype) for n, p in model.named_parameters()}
    assert all(t.is_meta for t in (*bare.parameters(), *bare.buffers()))
    assert bare.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert bare.name_or_path == model.name_or_path
    assert not bare.training
