"""Read the weights, and make sure that the model holds all that was stored and nothing that was made up."""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import math
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..arch import auto_class
from ..errors import HywiaError
from . import description
from .file_kinds import check_kind
from .weight_files import Stored, stored_tensors

__all__ = [
    "check_complete",
    "check_gguf",
    "check_stored",
    "check_types",
    "dequantised",
    "described",
    "gguf",
    "parsed_once",
    "read",
    "stock",
    "stock_config",
]

# Buffers that old checkpoints hold and models make themselves: rotary frequencies, causal masks.
_REMADE = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention|self_attention)\.(bias|masked_bias))")
_WHOLE = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")
_DEQUANTISED = "_hywia_stored_as"  # attribute of a model: the method by which its checkpoint was quantised
_SHOWN = 4  # names in a message


def check_stored(folder: Path, values: Mapping[str, Any], quantised: bool) -> dict[str, Stored]:
    """The headers of a directory's weights, once they are seen to fit a model of this config.

    Args:
        folder: the directory. values: the content of its config.json. quantised: matrices of whole numbers are taken.

    Raises:
        HywiaError: what `weight_files.stored_tensors` raises; or there are fewer tensors than layers, or matrices of
            whole numbers, which are quantised whatever the config says.
    """
    tensors = stored_tensors(folder)
    inner = values.get("text_config")
    decoder: Mapping[str, Any] = inner if isinstance(inner, dict) else values
    layers = decoder.get("num_hidden_layers", decoder.get("n_layer", 0))
    if layers > len(tensors):
        raise HywiaError(
            f"model: {folder} holds {len(tensors)} tensors, but its config.json says {layers} layers; "
            "one of the two is another model's"
        )
    for name, tensor in tensors.items():
        if not quantised and tensor.dtype in _WHOLE and name.endswith("weight"):
            raise HywiaError(
                f"model: {tensor.file} holds {name} as {tensor.dtype}: it is quantised; load the model it was made from"
            )
    _check_experts(folder, decoder, tensors)
    return tensors


def _check_experts(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
    """Refuse experts, stored one by one, of which one is missing or differs; transformers, which joins them, would give
    no clear message."""
    stored: dict[tuple[str, str], dict[int, Stored]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is not None:
            stored.setdefault((match[1], match[3]), {})[int(match[2])] = tensor
    count = config.get("num_local_experts", config.get("num_experts", config.get("n_routed_experts")))
    leaves = sorted({leaf for _, leaf in stored})
    missing, shapes, extra = [], [], []
    for prefix in sorted({prefix for prefix, _ in stored}):
        for leaf in leaves:
            experts = stored.get((prefix, leaf), {})
            usual = next(iter(experts.values())).shape if experts else ()
            for i in range(count if isinstance(count, int) else max(experts, default=-1) + 1):
                if i not in experts:
                    missing.append(f"{prefix}.{i}.{leaf}")
                elif experts[i].shape != usual:
                    shapes.append((f"{prefix}.{i}.{leaf}", experts[i].shape, usual))
            extra += [f"{prefix}.{i}.{leaf}" for i in sorted(experts) if isinstance(count, int) and i >= count]
    report = {"missing_keys": missing, "unexpected_keys": extra, "mismatched_keys": shapes}
    check_complete(report, str(folder))


class _Quiet(logging.Filter):
    """Holds back, on one thread, the report that transformers prints of weights that are refused here by name."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return threading.get_ident() != self._thread or "LOAD REPORT" not in record.getMessage()


def read(source: str | None, family: Any, *, device: Any = None, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """`(model, loading report)` by a class's `from_pretrained`, safetensors only; judge it with `check_complete`.

    Args:
        device: where the weights are to be, one after the other, without all of them in the host's memory first;
            transformers needs accelerate for it, and without that the model is on the CPU. None: the CPU.
    """
    if device is not None and device.type != "cpu" and importlib.util.find_spec("accelerate") is not None:
        options["device_map"] = {"": device}
    logger, quiet = logging.getLogger("transformers.modeling_utils"), _Quiet()
    logger.addFilter(quiet)
    try:
        return family.from_pretrained(
            source,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused by name
            output_loading_info=True,
            **options,
        )
    except RuntimeError as error:
        if "conver" in str(error):
            raise HywiaError(
                f"model: could not load {source}: its tensors do not fit together as the family's config says ({error})"
            ) from error
        raise
    finally:
        logger.removeFilter(quiet)


def check_types(model: Any, name: str, asked: str | None = None) -> None:
    """Make sure that transformers built a model of a supported family: some fields of a config make it choose another.

    Args:
        model: the model. name: what the user called it.
        asked: the type that its config names; a type that the table lacks must be this one.

    Raises:
        HywiaError: the family is not supported.
    """
    model_type = getattr(model.config, "model_type", None)
    derived = model_type == asked and description.derivable(model_type)
    if not derived and model_type not in (*description.model_types(), "hywia_adaptive"):
        raise HywiaError(
            f"model: transformers takes {name} for a {model_type} model, which is not supported; "
            f"supported: {', '.join(description.model_types())}"
        )


def stock_config(folder: Path) -> Any:
    """The config of a directory whose class transformers or this package has; its code is not run."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    # A config can name kernels on the hub, which would be fetched and run; the choice is this machine's.
    config._attn_implementation = None
    config._experts_implementation = None
    return config


def described(config: Any, dtype: Any = None) -> Any:
    """The model of a config on the meta device, shapes without memory; None as `dtype` takes the config's."""
    import torch

    options = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        return auto_class(config).from_config(copy.deepcopy(config), trust_remote_code=False, **options)


def stock(folder: Path, dtype: Any, quantised: bool, device: Any = None) -> Any:
    """The model of a directory, of a class that transformers or this package has; the directory's code is not run.

    Args:
        device: as `read` takes it; a quantised model goes where its method puts it.

    Raises:
        HywiaError: the weights are not the model's.
    """
    config = stock_config(folder)
    if not quantised:
        _check_count(folder, config)
    options = {"config": config, "dtype": dtype, "trust_remote_code": False}
    method: Any = getattr(config, "quantization_config", None)
    if method is not None and not quantised:
        method["dequantize"] = True  # to what the config calls the model's dtype, 16 bits as a rule
    model, report = read(str(folder), auto_class(config), device=None if method is not None else device, **options)
    check_complete(report, str(folder), unexpected=not quantised)
    return model if method is None or quantised else _plain(model, str(method["quant_method"]))


def _plain(model: Any, method: str) -> Any:
    """A dequantised model without the marks of a quantised one, which a saved copy must not have.

    Raises:
        HywiaError: transformers left a matrix as it was stored.
    """
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("weight") and (parameter.element_size() < 2 or not parameter.is_floating_point()):
            raise HywiaError(
                f"model: {name} of a checkpoint that is quantised ({method}) is still {parameter.dtype} after loading; "
                "load the model it was made from"
            )
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    vars(model)[_DEQUANTISED] = method
    return model


def dequantised(model: Any) -> str | None:
    """The method by which a model's checkpoint was quantised, that `load` turned into floating-point numbers."""
    return vars(model).get(_DEQUANTISED)


def _check_count(folder: Path, config: Any) -> None:
    """Refuse a config of a far larger model than was stored: transformers would first make its weights up in memory."""
    wanted = sum(p.numel() for p in described(config).parameters())
    held = sum(math.prod(tensor.shape) for tensor in stored_tensors(folder).values())
    if wanted > 4 * held + 1_000_000:
        raise HywiaError(
            f"model: {folder} holds {held:,} weights, but its config.json describes {wanted:,}: "
            "it has other shapes than its config says"
        )


def check_gguf(path: Path) -> Any:
    """The config of a GGUF file, once the file has been judged by its header.

    Raises:
        HywiaError: it is no GGUF file, or its family is not supported.
    """
    from transformers import AutoConfig

    with path.open("rb") as file:
        begin = file.read(4)
    if begin != b"GGUF":
        check_kind(path)
        raise HywiaError(f"model: {path} is no GGUF file (or its beginning is damaged)")
    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
    description.family({"model_type": config.model_type})
    layers = config.get_text_config().num_hidden_layers
    if not 1 <= layers <= description.MOST_LAYERS:
        raise HywiaError(f"model: {path}: expected 1 to {description.MOST_LAYERS} layers, got {layers}")
    return config


@contextmanager
def parsed_once() -> Iterator[None]:
    """A GGUF file's header is parsed once for a while, and the names of an architecture's tensors are worked out once.
    transformers does the first for config, tokenizer and weights each, and the second for every module: of SmolLM2's
    load that is half of the time."""
    import gguf as library

    before = {name: getattr(library, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, made in before.items():
            setattr(library, name, functools.cache(made))
        yield
    finally:
        for name, made in before.items():
            setattr(library, name, made)


def gguf(path: Path, dtype: Any, device: Any = None) -> Any:
    """The dequantised model of a GGUF file, which can be saved as if it had never been quantised.

    Raises:
        HywiaError: the weights are not the model's.
    """
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype, "trust_remote_code": False}
    # Newer ones keep the blocks packed where they can, with kernels that they fetch from the hub and run.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, report = read(str(path.parent), transformers.AutoModelForCausalLM, device=device, **options)
    check_complete(report, str(path))
    return _plain(model, "gguf")


def check_complete(report: Mapping[str, Any], source: str, *, unexpected: bool = True) -> None:
    """Refuse a model that is not what was stored, by the loading report of transformers.

    Args:
        report: `missing_keys`, `unexpected_keys`, `mismatched_keys` (name, stored shape, model's shape), `error_msgs`.
        source: what the user named. unexpected: also refuse what was stored and has no place.

    Raises:
        HywiaError: something is missing, has another shape, or has no place; the message names it. Rotary frequencies
            and causal masks that old checkpoints hold are no weights and are passed over.
    """
    missing = sorted(report["missing_keys"])
    extra = sorted(k for k in report["unexpected_keys"] if not _REMADE.fullmatch(k)) if unexpected else []
    shapes = [f"{n} is {tuple(stored)}, not {tuple(own)}" for n, stored, own in sorted(report["mismatched_keys"])]
    parts = []
    if missing:
        parts.append(f"lacks {_names(missing)}")
    if shapes:
        parts.append(f"has other shapes than its config says {_names(shapes)}")
    if extra:
        parts.append(f"has unknown {_names(extra)}")
    parts += [str(message) for message in report.get("error_msgs") or ()]
    if parts:
        raise HywiaError(f"model: {source} {'; '.join(parts)}{_hint(missing, extra)}")


def _names(names: Collection[str]) -> str:
    shown = str(list(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _hint(missing: Collection[str], extra: Collection[str]) -> str:
    """The way out, where the names show one of the usual causes."""
    for name in extra:
        for wanted in missing:
            prefix = name.removesuffix(wanted)
            if prefix.endswith(".") and all(key.startswith(prefix) for key in extra):
                return f"; the names begin with {prefix!r}: save the model itself, not what was wrapped around it"
    if any(
        name.rpartition(".")[2] in ("absmax", "SCB", "qweight", "qzeros", "scales", "weight_scale") for name in extra
    ):
        return "; it is quantised: load the model it was made from"
    if any(name.startswith(("score.", "classifier.", "v_head.", "qa_outputs.")) for name in extra):
        return "; it is no causal language model (a classifier, or a reward model)"
    if any("lora_" in name for name in extra):
        return "; it holds an adapter: merge it into its model first"
    if missing and all("head" in name or "embed_out" in name for name in missing):
        return "; it was saved without its head: save the causal language model, not its base"
    return "; the files are another model's, or were not all written"
