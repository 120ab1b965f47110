"""A model's structure without its weights: what can be planned and estimated before anything large is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import HywiaError, UsageError
from ..settings import DTYPES
from . import baichuan, hub, loaded_weights
from .adaptive import remote
from .sources import Judged, Source, check_tokenizer, judged, located, need_gguf, refusal
from .ties import settle_tying
from .weight_files import Stored

__all__ = ["skeleton"]

_STORED_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth")


def skeleton(
    model: str | Path = "smollm2", *, dtype: str = "auto", trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """The model that `load` would give, in eval mode, with every tensor on the meta device.

    Weights are neither read nor fetched; of a hub model, only the files that describe it are. Headers of weights that
    lie in a local directory are judged as `load` judges them; a directory with a config alone is taken too. Groups and
    numbers of parameters are the loaded model's. (For a hub model, and a directory with a config alone, the config
    decides whether head and embedding are one.)

    Args:
        model: a hub id, a local directory, a `.gguf` file, or "smollm2", as `load` takes them.
        dtype: "auto": the stored one; or as `load` takes it.
        trust_remote_code: True runs the Python files of a checkpoint whose family transformers does not have.
        revision: a branch, tag or commit of a hub model.

    Raises:
        UsageError, HywiaError: what `load` raises before it reads weights.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    source = located(model, revision)
    try:
        network = _gguf(source.path, dtype) if source.is_gguf else _directory(source, trust_remote_code is True, dtype)
    except (HywiaError, MemoryError):
        raise
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError, ... by cause
        raise refusal(model, error) from error
    network.config.name_or_path = network.name_or_path = source.name
    return network.eval()


def _directory(source: Source, trusted: bool, asked: str) -> Any:
    judgement = judged(source, trusted=trusted, quantised=False, dequantised=True)
    folder = source.path
    if source.from_hub and judgement.code:
        folder = hub.with_code(source.name, folder, source.hub)
    stored: dict[str, Stored] = {}
    if source.from_hub:
        check_tokenizer(folder, source.name, judgement)
    elif any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        stored = loaded_weights.check_stored(folder, judgement.values, quantised=False)
        check_tokenizer(folder, source.name, judgement)
    network = _built(folder, judgement, stored, asked)
    loaded_weights.check_types(network, source.name, judgement.values.get("model_type"))
    settle_tying(network)
    return network


def _built(folder: Path, judgement: Judged, stored: dict[str, Stored], asked: str) -> Any:
    values = judgement.values
    if judgement.rotary:
        # Where weights are here, theirs counts, whatever the config says.
        dtype = _dtype(asked, None if stored else _configured_dtype(values), stored)
        return loaded_weights.described(baichuan.llama_config(values), dtype)
    if judgement.code:
        return remote.skeleton(str(folder), _dtype(asked, _configured_dtype(values), stored), values)
    config = loaded_weights.stock_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # `load` turns it into floating-point numbers
    dtype = _dtype(asked, config.dtype, stored)
    network = loaded_weights.described(config, dtype)
    if _stored_apart(network, folder, stored):
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = False
        network = loaded_weights.described(config, dtype)
    return network


def _configured_dtype(values: dict[str, Any]) -> Any:
    """The dtype that a config.json names; None where it names none."""
    import torch

    name = values.get("dtype", values.get("torch_dtype"))
    return None if name in (None, "auto") else getattr(torch, str(name).removeprefix("torch."))


def _dtype(asked: str, configured: Any, stored: dict[str, Stored]) -> Any:
    """The dtype that loading chooses: by "auto" the config's, or that of the first floating-point tensor stored."""
    import torch

    if asked != "auto":
        return getattr(torch, asked)
    if configured is not None:
        return configured
    first = next((_STORED_DTYPES[t.dtype] for t in stored.values() if t.dtype in _STORED_DTYPES), "float32")
    return getattr(torch, first)


def _stored_apart(network: Any, folder: Path, stored: dict[str, Stored]) -> bool:
    """Whether head and embedding, which the config calls one, are stored as two that differ; then both are kept."""
    import torch
    from safetensors import safe_open

    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    names = [n for n, p in network.named_parameters(remove_duplicate=False) if p is embedding.weight]
    names = [n for n in names if n in stored]
    if len(names) < 2:
        return False
    tensors = []
    for name in names[:2]:
        with safe_open(str(stored[name].file), "pt") as file:
            tensors.append(file.get_tensor(name))
    return not torch.equal(*tensors)


def _gguf(path: Path, asked: str) -> Any:
    need_gguf()
    config = loaded_weights.check_gguf(path)
    network = loaded_weights.described(config, _dtype(asked, config.dtype, {}))
    loaded_weights.check_types(network, str(path), network.config.model_type)
    settle_tying(network)
    return network
