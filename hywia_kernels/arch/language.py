"""What a table entry can say about a family of models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Alibi", "Architecture", "Attention", "Experts", "Gated", "Mlp"]


@dataclass(frozen=True)
class Gated:
    """`module` computes `columns[0](activation(rows[0](x)) * rows[1](x))` and nothing else."""

    module: str
    activation: str


@dataclass(frozen=True)
class Mlp:
    """Channels: row `j` of each of `rows` and column `j` of each of `columns`, with the rows' biases.

    A module named k times in `rows` holds k matrices one after the other, in that order (Phi-3's gate and up).
    `width_field` is the config's field of the width, "" where the config has none; `width_alias` is another, which
    transformers does not read and servers do. `gated` lets calibration compute the product again instead of keeping it.
    `kept` is an attribute of the module of the last matrix that is true where no channel can go, since what the layer
    computes goes by all of them.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    width_field: str
    gated: Gated | None = None
    kept: str = ""
    width_alias: str = ""


@dataclass(frozen=True)
class Experts:
    """Experts of one layer, stacked: parameters `[experts, out, in]` of `module`.

    Units are the channels of every expert (kind "mlp": each expert ranks its own, and all experts of a layer keep
    equally many, as one stacked parameter must), and whole experts with their rows of the router (kind "experts").

    Attributes:
        module: holds the stacked parameters. A layer without it has a plain MLP (the entry's `mlp`).
        router: module whose `weight` is `[experts, hidden]` and whose forward returns `(logits, weights, indices)`; ""
            where only channels of experts can go.
        rows, columns: parameters of `module`; one named k times holds k matrices one after the other.
        transposed: parameters are `[experts, in, out]`.
        alternating: how many outputs of a matrix in `rows` belong to one channel, lying together (2: a gate's and the
            one that it multiplies).
        biased: each parameter has a bias `[experts, out]` under its name with `_bias`.
        width_field, count_field, chosen_field: config fields of a channel count, of the experts' count, and of how
            many experts a token goes to, which is the least that can stay.
    """

    module: str
    router: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    width_field: str
    count_field: str
    chosen_field: str
    transposed: bool = False
    alternating: int = 1
    biased: bool = False


@dataclass(frozen=True)
class Alibi:
    """Attention scores get a bias that falls with distance, by a slope that belongs to the head.

    After heads are cut, the attention module picks the part of the heads that stayed from the bias of all heads.

    Attributes:
        argument: keyword by which the attention module's forward takes the bias of all of the model's heads.
        axis: the bias's axis of heads; axis 0 may be batch times heads.
    """

    argument: str
    axis: int


@dataclass(frozen=True)
class Attention:
    """KV groups: one key and one value head with all their query heads, which are consecutive; a head when each KV
    head serves one query head.

    `query`, `key` and `value` name one module where it holds all three: one after the other, or, when `interleaved`,
    group by group (the q rows of group 0's heads, its k and v rows, then group 1's). `key` and `value` name one module
    beside another `query` where it holds, head by head, what a head's key and value are made of (MLA's `kv_b_proj`).

    Attributes:
        heads_field, kv_heads_field: config fields of the two head counts; the latter "" where every head has its own
            k and v.
        free_head_dim: the config can state a head count and keep the heads' size; where it cannot, heads may still go,
            and the config goes on saying what it said.
        vectors: parameters of the layer with one entry (or `head_dim`) per query head, which leave with their heads.
        wide_norms: norm -> linear layer whose whole output it divides by its rms, all heads together.
        alibi: how a bias of ALiBi reaches the module; None where the family has none.
        rotary: the function, in the Python module that defines the attention, that returns queries and keys
            `[batch, heads, tokens, head_dim]` rotated by `(cos, sin)`, the halves of a head paired.
        size_field: config field of the features that a head gives to the output's matrix; "" for the usual `head_dim`.
        wide_query: how many times the size of a head the query's matrix holds for each query head (2 where each
            head's gate lies behind its query).
        size_attribute: the attention module's attribute that has the size of its heads, where layers differ in it and
            no config field says it.
        kept: the attention module's attribute that is true where heads cannot go, since keys and values are handed on.
        more: further matrices with as many rows for every KV group (gates of heads).
        plain: full names of attention classes that do no more than `o(attend(rotate(q), rotate(k), v))`, by `scaling`
            and causally: calibration writes that out.
    """

    query: str
    key: str
    value: str
    output: str
    heads_field: str
    kv_heads_field: str = ""
    interleaved: bool = False
    free_head_dim: bool = True
    vectors: tuple[str, ...] = ()
    wide_norms: Mapping[str, str] = field(default_factory=dict)
    alibi: Alibi | None = None
    rotary: str = ""
    plain: tuple[str, ...] = ()
    size_field: str = ""
    wide_query: int = 1
    more: tuple[str, ...] = ()
    size_attribute: str = ""
    kept: str = ""

    @property
    def module(self) -> str:
        """The attention's own module."""
        return self.query.rpartition(".")[0]


@dataclass(frozen=True)
class Architecture:
    """The table's entry of one family.

    Attributes:
        model_types: values of `config.model_type` it serves.
        title: the models, as docs/models.md names them.
        layers: path of the decoder's list of layers.
        mlp, attention, experts: the units' structure inside one layer.
        branches: further MLPs of a layer, beside its experts or its `mlp` (shared experts), where a layer has them.
        partial: layers may lack the attention or the MLP that is named (and have convolutions, a state space, or
            attention of another kind), which is left alone.
        derived: made from a model's structure, not written by hand.
        together: layers hand on more than the hidden states (keys and values, say), or these in a form of their own, so
            that no layer runs by itself: they are scored in one pass over the whole graph, and neither reconstructed,
            nor searched over, nor streamed.
        attributes: `(module, attribute, quantity)`: numbers that a layer's modules keep for themselves; the quantity is
            "heads", "kv_heads", "width" (of all query heads), "channels", "experts" or, where a dense MLP lies beside
            them, "expert_channels" of that layer. They are set where the layer's module has them.
        whole_attributes: the same for modules outside the layers ("" is the model itself); they are set where all
            layers agree.
        config_readers: modules of a layer that read widths from `self.config` in their forward.
        requires: config fields that must have these values for the entry to hold.
        norms, final_norm: modules of a layer, and of the whole model, that compute `weight · x / rms(x)`, rounding
            `x / rms(x)` to `x`'s dtype, with `variance_epsilon` or `eps` under the root: calibration does not keep
            their outputs.
        logits: config fields by which the logits change after the head; `engine/loss.py` must know each of them. None:
            the model's own forward makes logits of hidden states.
        residual: matrix of `mlp.columns` whose output is only added to what leaves the layer, so that calibration need
            not multiply by it when it runs a layer again for backward (None: there is none).
        blocks: full names of layer classes that compute `h = x + attention(norms[0](x))`, `y = h + mlp(norms[1](h))`
            and pass every argument but `x` to the attention, whose matrices are `attention`'s and whose `forward`
            ends with the output's: calibration runs such a layer as one node.
        stand_in: model type whose stock config holds the same mathematics where this family's own config refuses a
            width (None: there is none).
        stand_in_needs: config fields that must have these values for the stand-in to be exact.
        stand_in_sets: config fields the stand-in needs besides those both share.
        placeless: config fields that must have these values for whole layers to go: with another, a layer's place
            among the others enters what it computes.
        transparent: config fields that must have these values for a layer whose parameters are all zero to hand on
            what it gets.
    """

    model_types: tuple[str, ...]
    title: str
    layers: str
    mlp: Mlp
    attention: Attention
    experts: Experts | None = None
    branches: tuple[Mlp, ...] = ()
    partial: bool = False
    derived: bool = False
    together: bool = False
    attributes: tuple[tuple[str, str, str], ...] = ()
    whole_attributes: tuple[tuple[str, str, str], ...] = ()
    config_readers: tuple[str, ...] = ()
    requires: Mapping[str, Any] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    final_norm: str | None = None
    logits: tuple[str, ...] | None = ()
    residual: str | None = None
    blocks: tuple[str, ...] = ()
    stand_in: str | None = None
    stand_in_needs: Mapping[str, Any] = field(default_factory=dict)
    stand_in_sets: Mapping[str, Any] = field(default_factory=dict)
    placeless: Mapping[str, Any] = field(default_factory=dict)
    transparent: Mapping[str, Any] = field(default_factory=dict)
