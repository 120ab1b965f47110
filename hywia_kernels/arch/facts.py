"""Facts about a model's weights: how many, how large, which, and whether they are numbers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import HywiaError
from .table import TABLE

__all__ = [
    "FingerprintReading",
    "check_finite",
    "checksum",
    "count_parameters",
    "fingerprint",
    "fingerprint_and_count",
    "fingerprint_and_count_after",
    "mathematics",
    "queued",
    "weight_bytes",
]

_Part = tuple[torch.device, torch.dtype, bool]  # the bool: computed when the model is made, not stored with it
_MIXERS = (-7046029254386353131, -4658895280553007687)  # odd, from splitmix64, as signed numbers
_MIN_SAMPLES = 1024  # values read of every tensor that has as many
_ROUNDING = 12  # last bits of values computed anew at every load, in which machines differ
_STAND_INS = {name: entry.stand_in for entry in TABLE for name in entry.model_types if entry.stand_in is not None}

# Fields of a config that no logit depends on, or that shapes and names of the parameters tell already (a config need
# not hold them where layers differ in width). Those of an unknown name count.
_NO_MATHEMATICS = {
    *("architectures", "auto_map", "attn_implementation", "base_model_type", "chunk_size_feed_forward", "dtype"),
    *("ffn_dim", "ffn_hidden_size", "finetuning_task", "gradient_checkpointing", "hidden_size", "id2label"),
    *("intermediate_size", "label2id", "layer_widths", "module_changes", "moe_intermediate_size", "n_embd", "n_head"),
    *("n_inner", "n_layer", "name_or_path", "num_attention_heads", "num_experts", "num_hidden_layers"),
    *("num_key_value_heads", "num_labels", "num_local_experts", "prefix", "pretraining_tp", "problem_type"),
    *("pruned_heads", "quantization_config", "return_dict", "router_aux_loss_coef", "router_jitter_noise"),
    *("router_z_loss_coef", "task_specific_params", "tie_word_embeddings", "tokenizer_class", "torch_dtype"),
    *("transformers_version", "use_cache", "vocab_size"),
}
_NO_MATHEMATICS_START = ("_", "initializer", "output_", "summary_")
_NO_MATHEMATICS_END = ("dropout", "pdrop", "_drop", "layerdrop", "token_id", "token_ids", "token_index")


def count_parameters(model: nn.Module) -> int:
    """Parameters of the whole model, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Bytes the parameters take in their present dtype, tied ones once: a safetensors checkpoint less its header."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def fingerprint(model: nn.Module) -> str:
    """sha256 over the config's mathematics, and names, shapes and a sample of the values of parameters and buffers.

    The sample has a value of every row and every column of every matrix. Values are taken as float32, so that an exact
    change of dtype keeps the fingerprint; so do a move to another device, eval and training mode, `requires_grad`, and
    a save and load. The host waits for each device once. The fingerprint tells models apart; it is no protection
    against forgery.

    Raises:
        HywiaError: a tensor whose values are not here (meta, offloaded, distributed or quantised by a subclass).
    """
    return fingerprint_and_count(model)[0]


@torch.no_grad()
def checksum(name: str, values: Tensor) -> int:
    """What a fingerprint takes of one parameter of a model, by its name and values."""
    return int(_checksums([_sample(name, values)], derived=False))


@torch.no_grad()
def fingerprint_and_count(
    model: nn.Module, modules: Mapping[str, nn.Module] | None = None, known: Mapping[str, int] | None = None
) -> tuple[str, int]:
    """`(fingerprint, count_parameters)` from one walk over the model; from none where its modules are given by name.

    Args:
        known: name -> `checksum` of parameters whose values need not be here, or not be the model's.
    """
    modules = dict(model.named_modules()) if modules is None else modules
    reading = FingerprintReading()
    reading.add(modules, known)
    return reading.digest(model, modules), reading.parameters


class FingerprintReading:
    """A fingerprint of a model whose weights need not be here all at a time: `add` what is, then ask for `digest`.

    Attributes:
        parameters: how many were read, tied ones once.
    """

    def __init__(self) -> None:
        self.parameters = 0
        self._described: dict[
            str, list[tuple[str, int, _Part | None, int]]
        ] = {}  # by module: what, and where its sum is
        self._sums: list[dict[_Part, Tensor]] = []  # of each `add`, on the devices

    @torch.no_grad()
    def add(self, modules: Mapping[str, nn.Module], known: Mapping[str, int] | None = None) -> None:
        """Reads modules, by their names in the model, without waiting for a device. Tied tensors must come together.

        Args:
            known: name -> `checksum` of parameters whose values are not read.

        Raises:
            HywiaError: a tensor whose values are not here.
        """
        parts: dict[_Part, list[Tensor]] = {}
        visited: set[int] = set()
        # As `named_parameters`, which takes as long to walk as the rest of this.
        for prefix, module in modules.items():
            dot = f"{prefix}." if prefix else ""
            described = self._described.setdefault(prefix, [])

            def read(name: str, tensor: Tensor, derived: bool, described: list = described) -> None:
                if known is not None and name in known:
                    described.append((f"{name}{tuple(tensor.shape)}", len(self._sums), None, known[name]))
                    return
                sample = _sample(name, tensor)
                part = (sample.device, sample.dtype, derived)
                described.append(
                    (f"{name}{tuple(tensor.shape)}", len(self._sums), part, len(parts.setdefault(part, [])))
                )
                parts[part].append(sample)

            for own, parameter in module._parameters.items():
                if parameter is None or id(parameter) in visited:
                    continue
                visited.add(id(parameter))
                read(dot + own, parameter, False)
                self.parameters += parameter.numel()
            for own, buffer in module._buffers.items():
                derived = own in module._non_persistent_buffers_set
                if buffer is None or id(buffer) in visited or (derived and _forward_writes(module, own)):
                    continue
                visited.add(id(buffer))
                read(f"buffer {dot}{own}", buffer, derived)
        self._sums.append({part: _checksums(samples, derived=part[2]) for part, samples in parts.items()})

    def lines(self) -> dict[str, list[str]]:
        """By module: what the fingerprint is made of. The host waits for each device once."""
        merged: dict[_Part, Tensor] = {}
        starts: list[dict[_Part, int]] = []
        for sums in self._sums:
            starts.append({part: len(merged[part]) if part in merged else 0 for part in sums})
            for part, values in sums.items():
                merged[part] = torch.cat([merged[part], values]) if part in merged else values
        host = _downloaded(merged)
        return {
            prefix: [
                f"{what}{index if part is None else host[part][starts[add][part] + index]}"
                for what, add, part, index in described
            ]
            for prefix, described in self._described.items()
        }

    def digest(self, model: nn.Module, names: Iterable[str]) -> str:
        """The fingerprint of a model, all of whose modules were added; `names` are theirs, in the model's order."""
        lines = self.lines()
        digest = hashlib.sha256(mathematics(model))
        for name in names:
            for line in lines[name]:
                digest.update(line.encode())
        return digest.hexdigest()


def queued(devices: Iterable[torch.device]) -> dict[torch.device, torch.cuda.Event]:
    """For each CUDA device an event after all queued on its current stream, for `fingerprint_and_count_after`."""
    events = {}
    for device in devices:
        if device.type == "cuda":
            events[device] = torch.cuda.Event()
            events[device].record(torch.cuda.current_stream(device))
    return events


def fingerprint_and_count_after(
    events: Mapping[torch.device, torch.cuda.Event], model: nn.Module, modules: Mapping[str, nn.Module] | None = None
) -> tuple[str, int]:
    """`fingerprint_and_count`, read on streams of its own as soon as the events have passed.

    CUDA devices go on meanwhile with what was queued after the events.
    """
    with contextlib.ExitStack() as streams:
        for device, event in events.items():
            stream = torch.cuda.Stream(device)
            stream.wait_event(event)
            streams.enter_context(torch.cuda.stream(stream))
        return fingerprint_and_count(model, modules)


@lru_cache(maxsize=4096)
def _step(shape: torch.Size) -> int:
    """The distance between the values to read, so that every row and every column of a matrix has one of them.

    A step no longer than a row meets every row. A step coprime with the rows' length meets each column once in as many
    reads as a row has values, and a step no longer than a column leaves a matrix at least that many reads.
    """
    numel = math.prod(shape)
    if len(shape) < 2 or numel == 0:
        return 1
    # Three dimensions are stacked matrices; more are a convolution's, whose filters are rows.
    rows, columns = shape[-2:] if len(shape) == 3 else (shape[0], numel // shape[0])
    step = max(1, min(rows, columns, numel // _MIN_SAMPLES))
    while math.gcd(step, columns) != 1:
        step -= 1
    return step


def _sample(name: str, tensor: Tensor) -> Tensor:
    """The values of a tensor to read, as a 1-D view: then one concatenation is all that has to be launched."""
    plain = type(tensor) is nn.Parameter or type(tensor) is Tensor
    if tensor.is_meta or (not plain and is_traceable_wrapper_subclass(tensor)):
        what = "on the meta device" if tensor.device.type == "meta" else f"in a {type(tensor).__name__}"
        raise HywiaError(
            f"{name}: expected a plain tensor with its values in memory, got one {what}; load the model whole, without "
            "offloading, sharding or quantisation"
        )
    step = _step(tensor.shape)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.is_contiguous():
        return tensor.as_strided((-(-tensor.numel() // step),), (step,), tensor.storage_offset())
    return tensor.reshape(-1)[::step]


def _checksums(samples: list[Tensor], *, derived: bool) -> Tensor:
    """The checksum `Σ_i m_i · b_i` modulo 2⁶⁴ of each 1-D sample, all of one device and dtype; int64 `[samples]` there.

    `b_i` are the bits of the i-th value as float32 and `m_i` odd numbers without a pattern, so that one changed value
    always changes the sum, and values that change places change it too. Whole numbers have the same sum in whatever
    order a device adds them, and only one number per tensor goes to the host.
    """
    device, counts = samples[0].device, [len(s) for s in samples]
    bits = torch.cat(samples).float().view(torch.int32)
    if derived:  # rounded, since powers and sines differ in their last bits between machines
        bits = bits.add(1 << (_ROUNDING - 1)).bitwise_and_(-(1 << _ROUNDING))
    ends = torch.tensor(counts, dtype=torch.int64).cumsum(0)
    starts = (ends - torch.tensor(counts, dtype=torch.int64)).to(device, non_blocking=True)
    lengths = torch.tensor(counts, dtype=torch.int64).to(device, non_blocking=True)
    place = torch.arange(len(bits), device=device) - starts.repeat_interleave(lengths, output_size=len(bits))
    factors = place.mul_(_MIXERS[0])
    factors = factors.bitwise_xor_(factors >> 29).mul_(_MIXERS[1]).bitwise_or_(1)
    summed = functional.pad(factors.mul_(bits).cumsum(0), (1, 0))
    return summed[ends.to(device, non_blocking=True)] - summed[starts]


def _downloaded(sums: Mapping[_Part, Tensor]) -> dict[_Part, list[int]]:
    """The checksums on the host, by one copy per device."""
    host: dict[_Part, list[int]] = {}
    for device in dict.fromkeys(part[0] for part in sums):
        here = [part for part in sums if part[0] == device]
        numbers = torch.cat([sums[part] for part in here]).tolist()
        for part in here:
            host[part], numbers = numbers[: len(sums[part])], numbers[len(sums[part]) :]
    return host


def _forward_writes(module: nn.Module, name: str) -> bool:
    """Whether a derived buffer is a forward pass's own: tables that grow with the text, and frequencies that follow
    its length, beside which the module keeps the original ones."""
    if "cache" in name or "mask" in name:
        return True
    kind = str(getattr(module, "rope_type", ""))
    return name.endswith("inv_freq") and "original" not in name and ("dynamic" in kind or "longrope" in kind)


def mathematics(model: nn.Module) -> bytes:
    """What a config says about the function that the weights are part of, whichever class holds it."""
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        return b""
    kind = values.get("base_model_type") or values.get("model_type")
    kept = {**_mathematical_fields(values), "model_type": _STAND_INS.get(str(kind), kind)}
    return json.dumps(kept, sort_keys=True, default=str).encode()


def _mathematical_fields(values: Mapping[Any, Any]) -> dict[str, Any]:
    """The fields of a config on which the mathematics depends. A field that is None or False counts as absent: other
    versions and classes of a config know other fields, which are off where the mathematics is the same."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        field = str(name)
        off = value is None or value is False
        if off or field in _NO_MATHEMATICS or field.startswith(_NO_MATHEMATICS_START):
            continue
        if not field.endswith(_NO_MATHEMATICS_END):
            kept[field] = _mathematical_fields(value) if isinstance(value, Mapping) else value
    heads = values.get("num_attention_heads") or values.get("n_head")
    hidden = values.get("hidden_size") or values.get("n_embd")
    if "head_dim" not in kept and isinstance(heads, int) and isinstance(hidden, int):
        kept["head_dim"] = hidden // heads
    return kept


def check_finite(model: nn.Module) -> None:
    """Raise HywiaError naming the first parameter that holds NaN or Inf."""
    for name, parameter in model.named_parameters():
        # One float32 sum first: it is finite for every healthy tensor and needs no mask as large as the weight.
        if torch.isfinite(parameter.detach().sum(dtype=torch.float32)):
            continue
        finite = torch.isfinite(parameter.detach())
        if not bool(finite.all()):
            bad = int(finite.numel() - finite.sum())
            raise HywiaError(
                f"{name}: expected finite weights, found {bad} of {finite.numel()} NaN or Inf; "
                "the checkpoint is damaged, or its dtype overflowed: load it again, in float32 or bfloat16"
            )
