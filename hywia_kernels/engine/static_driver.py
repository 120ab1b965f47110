"""A model's forward with a static cache: decoder layers compiled once for all that look alike, one CUDA graph a step.

Launching 32 layers' kernels from Python takes longer than a decoding step of a 7B model, so what eager code shows is
Python. A served model runs captured, with q, k and v in one product and gate and up in another; so does this, in
matrices of its own: the model keeps its parameters, which stand unused beside them meanwhile. Where memory is short,
it runs on the model's own matrices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ops.precision import full_float32
from .memory import free_bytes
from .patches import frozen

__all__ = ["JOINED_SHARE", "StaticDriver", "capture", "drivable", "joined_bytes"]

JOINED_SHARE = 0.25  # of the free memory that copies of matrices may take where nothing is timed


@dataclass(frozen=True)
class _Packed:
    """What one layer computes with. `qkv` and `gate_up` are one matrix each, a joined copy of the model's, or the
    model's own ones, with a bias for each."""

    norm: nn.Module
    mlp_norm: nn.Module
    qkv: list[Tensor]
    qkv_bias: list[Tensor | None]
    output: nn.Module
    gate_up: list[Tensor]
    gate_up_bias: list[Tensor | None]
    activation: Any
    down: nn.Module
    rows: tuple[int, int]  # of the queries, of the keys
    head_dim: int
    scale: float
    head_norms: tuple[nn.Module, nn.Module] | None  # of queries and keys, over each head


def _weights(linears: list[nn.Linear], join: bool) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases of several layers of one input, or one weight and bias of all of their rows. The latter are
    copies: others who hold the model (an optimiser, code that writes it) must go on to find its own parameters, each
    with memory of its own."""
    weights = [m.weight.detach() for m in linears]
    if not join:
        return weights, [None if m.bias is None else m.bias.detach() for m in linears]
    biases = [m.bias.detach() for m in linears if m.bias is not None]
    return [torch.cat(weights)], [torch.cat(biases) if biases else None]


def _products(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
    """What several layers of one input give, beside each other."""
    products = [functional.linear(x, *both) for both in zip(weights, biases, strict=True)]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def _to_join(layer: Any) -> tuple[list[nn.Linear], list[nn.Linear]]:
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]


def joined_bytes(model: Any) -> int:
    """Bytes that a driver holds beside a model where it joins matrices: its own copies of them."""
    linears = [linear for layer in model.model.layers for part in _to_join(layer) for linear in part]
    return sum(t.nbytes for linear in linears for t in (linear.weight, linear.bias) if t is not None)


def _packed(layer: Any, join: bool) -> _Packed:
    attention, mlp = layer.self_attn, layer.mlp
    (qkv, qkv_bias), (gate_up, gate_up_bias) = (_weights(linears, join) for linears in _to_join(layer))
    return _Packed(
        layer.input_layernorm, layer.post_attention_layernorm, qkv, qkv_bias, attention.o_proj, gate_up, gate_up_bias,
        mlp.act_fn, mlp.down_proj, (attention.q_proj.weight.shape[0], attention.k_proj.weight.shape[0]),
        attention.head_dim, attention.scaling,
        (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
    )  # fmt: skip


def drivable(model: Any, length: int = 6, *, join: bool | None = True) -> str | None:
    """Why `StaticDriver` cannot run this model on `length` tokens, or None where it can, to the same logits. The model
    stays as it is in either case. `join`: as the driver takes it."""
    window = getattr(model.config, "sliding_window", None)
    if window is not None and window < length and getattr(model.config, "use_sliding_window", True):
        return f"its attention slides over {window} tokens"
    ids = torch.arange(6, device=model.get_input_embeddings().weight.device)[None]
    # What TF32 rounds moves SmolLM2's logits by more than the difference that tells two models apart.
    exact = full_float32("cuda") if ids.is_cuda else nullcontext()
    try:
        needed, free = joined_bytes(model), free_bytes(ids.device)
        if join and needed > free:
            return f"{needed / 1e9:.1f} GB of joined matrices do not fit beside it, {free / 1e9:.1f} GB are free"
        with torch.no_grad(), frozen(model), exact:
            logits = model(ids, use_cache=False).logits[:, -1]
            want, want_dtype = logits.float(), logits.dtype
            driver = StaticDriver(model, 1, 6, compile=False, join=join)
            predictions = [driver.prefill(ids), driver.step(ids[:, -1:], torch.tensor([5], device=ids.device))]
    except torch.OutOfMemoryError:
        return "its joined matrices do not fit into memory beside it"
    except (TypeError, RuntimeError, AttributeError, KeyError) as error:
        return f"its layers are not LLaMA's ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    differ = max(float((got.float() - want).norm() / want.norm()) for got in predictions)
    # In 16 bits rounding alone reaches 5 % (random weights, 32 layers); a missing step makes it near 100 %.
    allowed = 1e-3 if want_dtype == torch.float32 else 0.2
    return None if differ < allowed else f"its forward does more than LLaMA's (logits differ by {differ:.1e})"


class StaticDriver:
    """Prefill and decoding steps of `batch` sequences in a cache of `length` tokens.

    With `compile`, one graph serves all layers of one shape: they are called with their tensors, not as modules, which
    would be compiled once for each layer's index. Nothing in the model is changed; weights that change later are not
    seen where they are joined.

    Args:
        join: make one matrix of those that have one input, as copies, `joined_bytes` in all; None: where these are no
            more than `JOINED_SHARE` of the free memory.
    """

    def __init__(self, model: Any, batch: int, length: int, *, compile: bool, join: bool | None = True) -> None:
        self.base, self.head = model.model, model.lm_head
        self.length, self.device = length, model.lm_head.weight.device
        if join is None:
            join = joined_bytes(model) <= JOINED_SHARE * free_bytes(self.device)
        self.layers = [_packed(layer, join) for layer in self.base.layers]
        # The family's own rotation, from the module that defines its attention.
        self.rotate = vars(sys.modules[type(self.base.layers[0].self_attn).__module__])["apply_rotary_pos_emb"]
        dtype = model.lm_head.weight.dtype
        self.caches = [
            torch.zeros((2, batch, p.rows[1] // p.head_dim, length, p.head_dim), dtype=dtype, device=self.device)
            for p in self.layers
        ]
        self.run: Callable[..., Tensor] = _layer
        if compile:
            self.run = torch.compile(_layer, dynamic=False)

    def _forward(self, ids: Tensor, positions: Tensor, decode: bool) -> Tensor:
        hidden = self.base.embed_tokens(ids)
        rotary = self.base.rotary_emb(hidden, positions[None])
        for packed, cache in zip(self.layers, self.caches, strict=True):
            hidden = self.run(packed, self.rotate, hidden, rotary, cache[0], cache[1], positions, decode)
        return self.head(self.base.norm(hidden[:, -1]))

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Logits `[batch, vocabulary]` of the last token of `[batch, length]`; fills the cache."""
        return self._forward(ids, torch.arange(self.length, device=self.device), False)

    @torch.no_grad()
    def step(self, ids: Tensor, position: Tensor) -> Tensor:
        """Logits of one token `[batch, 1]` at `position` (int64 `[1]` on the device); attends to it and all before."""
        return self._forward(ids, position, True)


def _layer(
    p: _Packed, rotate: Any, hidden: Tensor, rotary: Any, keys: Tensor, values: Tensor, positions: Tensor, decode: bool
) -> Tensor:
    batch, tokens, _ = hidden.shape
    qkv = _products(p.norm(hidden), p.qkv, p.qkv_bias)
    parts = qkv.split((p.rows[0], p.rows[1], p.rows[1]), dim=-1)
    query, key, value = (part.view(batch, tokens, -1, p.head_dim) for part in parts)
    if p.head_norms is not None:
        query, key = p.head_norms[0](query), p.head_norms[1](key)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    query, key = rotate(query, key, *rotary)
    keys.index_copy_(2, positions, key)
    values.index_copy_(2, positions, value)
    if decode:
        mixed = _attend(query, keys, values, positions, p.scale)
    else:  # the prompt is as long as the cache
        grouped = query.shape[1] != key.shape[1]
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=p.scale, enable_gqa=grouped
        )
    hidden = hidden + p.output(mixed.transpose(1, 2).reshape(batch, tokens, -1))
    gate, up = _products(p.mlp_norm(hidden), p.gate_up, p.gate_up_bias).chunk(2, dim=-1)
    return hidden + p.down(p.activation(gate) * up)


def _attend(query: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float) -> Tensor:
    size = query.shape[-1]
    if query.is_cuda and size & (size - 1) == 0:
        from .decode_attention import decode_attention

        return decode_attention(query.contiguous(), keys, values, position, scale)
    mask = (torch.arange(keys.shape[2], device=query.device) <= position)[None, None, None]
    return functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
    )


def capture(call: Callable[[], Tensor], warm: int = 3, during: Callable[[], Any] = nullcontext) -> Callable[[], Tensor]:
    """`call` as one CUDA graph, after `warm` runs beside the default stream (which also compile). `during`: makes a
    context that it is captured in."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with during(), torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
