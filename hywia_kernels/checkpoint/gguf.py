"""A LLaMA-family model whose layers differ in width as a GGUF file that llama.cpp runs.

llama.cpp's architecture `deci` is LLaMA's layer with query heads, KV heads and channels given per layer: an exact fit.
Pruning leaves the vocabulary alone, so the tokenizer's entries are copied from a GGUF of the model before pruning (as
llama.cpp's converter writes it), where its pre-tokenisation has been told apart already.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import arch, progress
from ..arch.facts import weight_bytes
from ..errors import HywiaError, UsageError
from . import atomic_directory
from .ties import tied_head

__all__ = ["write_gguf"]

ARCHITECTURE = "deci"
FAMILIES = ("llama", "mistral")
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _refusal(model: Any) -> str | None:
    """Why the format does not hold exactly this model; None where it does."""
    config = model.config
    family = getattr(config, "base_model_type", None) or config.model_type
    if family not in FAMILIES:
        return f"expected one of {', '.join(FAMILIES)}, got {family}"
    rope = dict(getattr(config, "rope_parameters", None) or {})
    for what, value, wanted in (
        ("hidden_act", config.hidden_act, "silu"),
        ("sliding_window", getattr(config, "sliding_window", None), None),
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("biases", any(name.endswith(".bias") for name, _ in model.named_parameters()), False),
    ):
        if value != wanted:
            return f"expected {what} {wanted}, got {value}"
    return None


def _interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """The rows of q or k, reordered: the format rotates neighbouring pairs, transformers the halves of a head."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(model: Any, vocabulary: str | Path, path: str | Path) -> Path:
    """Write a model as a GGUF file.

    Args:
        model: what to write, in its own dtype (norms in float32).
        vocabulary: a GGUF file of the model before pruning, whose tokenizer is copied.
        path: the file to write, which must not exist.

    Returns:
        the path.

    Raises:
        HywiaError: the format cannot hold the model exactly, or `gguf` is not installed.
        UsageError: the file exists, or `vocabulary` is no GGUF file of as many tokens.
    """
    try:
        import gguf
    except ImportError as error:
        raise HywiaError("gguf: the package 'gguf' is missing: pip install 'hywia_kernels[gguf]'") from error
    reason = _refusal(model)
    if reason is not None:
        raise HywiaError(f"gguf: llama.cpp's architecture for differing layers holds LLaMA's alone: {reason}")
    path = Path(path)
    with atomic_directory.claim(path, a_file=True):
        _write(gguf, model, vocabulary, path)
    return path


def _write(gguf: Any, model: Any, vocabulary: str | Path, path: Path) -> None:
    tokens = _vocabulary(gguf, vocabulary)
    rows = model.get_input_embeddings().weight.shape[0]
    count = len(tokens["tokenizer.ggml.tokens"].data)
    if count != rows:
        raise UsageError(f"vocabulary: expected {rows} tokens as the model has, {vocabulary} has {count}")
    with atomic_directory.file(path, need=weight_bytes(model)) as partial:
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        try:
            _write_header(writer, model)
            for name, field in tokens.items():
                kind = field.types[0]
                inner = field.types[1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), kind, sub_type=inner)
            _add_tensors(gguf, writer, model)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        _check_written(gguf, partial, model)


def _check_written(gguf: Any, file: Path, model: Any) -> None:
    """Read the tensors back, one after the other, and compare their bytes."""
    tensors = {t.name: t.data for t in gguf.GGUFReader(file).tensors}
    for name, want in _tensors(model):
        got = tensors.pop(name, None)
        if got is None:
            raise HywiaError(f"gguf: expected the tensor {name} in what was written, got none")
        data = _stored(want)
        if got.nbytes != data.nbytes or not bool((got.reshape(-1).view("u1") == data.reshape(-1).view("u1")).all()):
            raise HywiaError(f"gguf: {name} in what was written is not what the model has; the disk may be failing")
    if tensors:
        raise HywiaError(f"gguf: {min(tensors)} was written, which the model has not")


def _vocabulary(gguf: Any, source: str | Path) -> dict[str, Any]:
    """Name -> field of a GGUF file's tokenizer."""
    try:
        fields = gguf.GGUFReader(str(source)).fields
    except (OSError, ValueError) as error:
        raise UsageError(f"vocabulary: {source} is no GGUF file ({error})") from error
    tokenizer = {name: field for name, field in fields.items() if name.startswith("tokenizer.")}
    if "tokenizer.ggml.tokens" not in tokenizer:
        raise UsageError(f"vocabulary: {source} holds no tokens")
    return tokenizer


def _write_header(writer: Any, model: Any) -> None:
    config, groups = model.config, arch.groups(model)
    attention = [g for g in groups if g.kind == "attention"]
    head_dim = arch.head_dim(model)
    writer.add_name(str(getattr(model, "name_or_path", "") or "pruned"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length([g.units for g in groups if g.kind == "mlp"])
    writer.add_head_count([g.units * (g.members[-1].group_size // head_dim) for g in attention])
    writer.add_head_count_kv([g.units for g in attention])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    theta = rope.get("rope_theta") or getattr(config, "rope_theta", None)
    writer.add_rope_freq_base(float(theta if theta is not None else 10000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tensors(gguf: Any, writer: Any, model: Any) -> None:
    kinds = {
        torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    }
    dtype = model.get_input_embeddings().weight.dtype
    writer.add_file_type(kinds[dtype][1])

    for name, tensor in _tensors(model):
        data = _stored(tensor)
        if tensor.dtype == torch.bfloat16 and data.dtype == "u1":  # NumPy has no bfloat16
            writer.add_tensor(name, data, raw_shape=data.shape, raw_dtype=kinds[tensor.dtype][0])
        else:
            writer.add_tensor(name, data)


def _stored(tensor: Tensor) -> Any:
    """A tensor as the NumPy array that is written: vectors in float32, bfloat16 as bytes, the rest in its own dtype."""
    data = tensor.detach().cpu().contiguous()
    if data.dim() < 2:
        return data.float().numpy()
    return data.view(torch.uint8).numpy() if data.dtype == torch.bfloat16 else data.numpy()


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in the format."""
    head_dim = arch.head_dim(model)
    yield "token_embd.weight", model.get_input_embeddings().weight
    if not tied_head(model):
        yield "output.weight", model.get_output_embeddings().weight
    yield "output_norm.weight", model.model.norm.weight
    for i, layer in enumerate(progress.track(model.model.layers, "writing GGUF")):
        for module, name in _LAYER.items():
            weight = layer.get_submodule(module).weight
            if name in ("attn_q", "attn_k"):
                weight = _interleaved(weight, head_dim)
            yield f"blk.{i}.{name}.weight", weight
