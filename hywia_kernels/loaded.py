"""Read the weights, and see that the model is what was stored: all of it, and nothing made up."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from . import checkpoint
from .errors import HywiaError
from .weight_files import Stored, check_kind, stored_tensors

__all__ = ["check_complete", "check_gguf", "check_stored", "check_types", "gguf", "stock"]

# Buffers that old checkpoints hold and models make themselves: rotary frequencies, causal masks.
_REMADE = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention|self_attention)\.(bias|masked_bias))")
_WHOLE = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL")
_SHOWN = 4  # names in a message


def check_stored(folder: Path, values: Mapping[str, Any], quantised: bool) -> dict[str, Stored]:
    """The headers of a directory's weights, once they can be those of a model of this config.

    Raises:
        HywiaError: as `weight_files.stored_tensors`; fewer tensors than layers; or matrices of whole numbers, which
            are quantised whatever the config says.
    """
    tensors = stored_tensors(folder)
    text = values.get("text_config") if isinstance(values.get("text_config"), dict) else values
    layers = text.get("num_hidden_layers", text.get("n_layer", 0))  # type: ignore[union-attr]
    if layers > len(tensors):
        raise HywiaError(
            f"model: {folder} holds {len(tensors)} tensors, but its config.json says {layers} layers; one of the two is "
            "another model's"
        )
    for name, tensor in tensors.items():
        if not quantised and tensor.dtype in _WHOLE and name.endswith("weight"):
            raise HywiaError(
                f"model: {tensor.file} holds {name} as {tensor.dtype}: it is quantised; load the model it was made from"
            )
    return tensors


def check_types(model: Any, name: str) -> None:
    """See that transformers made of the config a family that is supported, as some fields make it choose another.

    Raises:
        HywiaError: it did not.
    """
    values = {k: getattr(model.config, k, None) for k in ("model_type", "base_model_type")}
    if values["model_type"] not in (*checkpoint.model_types(), "hywia_adaptive"):
        raise HywiaError(
            f"model: transformers takes {name} for a {values['model_type']} model, which is not supported; "
            f"supported: {', '.join(checkpoint.model_types())}"
        )


def stock(folder: Path, dtype: Any, quantised: bool) -> Any:
    """The model of a directory, of a class that transformers or this package has; its code is not run.

    Raises:
        HywiaError: the weights are not the model's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    # A config can name kernels on the hub, which would be fetched and run; the choice is this machine's.
    config._attn_implementation = None
    config._experts_implementation = None
    model, report = AutoModelForCausalLM.from_pretrained(
        str(folder),
        config=config,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        output_loading_info=True,
    )
    check_complete(report, str(folder), unexpected=not quantised)
    return model


def check_gguf(path: Path) -> None:
    """Refuse a GGUF file by its header.

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
    checkpoint.family({"model_type": config.model_type})


def gguf(path: Path, dtype: Any) -> Any:
    """The dequantised model of a GGUF file, as if it had never been quantised: it can be saved.

    Raises:
        HywiaError: the weights are not the model's.
    """
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        dtype=dtype,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    check_complete(report, str(path))
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config  # a saved copy must not claim to be quantised
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    return model


def check_complete(report: Mapping[str, Any], source: str, *, unexpected: bool = True) -> None:
    """Refuse a model that is not what was stored, by the loading report of transformers.

    Args:
        report: `missing_keys`, `unexpected_keys`, `mismatched_keys` (name, stored shape, model's shape), `error_msgs`.
        source: what the user named. unexpected: also refuse what was stored and has no place.

    Raises:
        HywiaError: names what is missing, of another shape, or without a place. Rotary frequencies and causal masks
            that old checkpoints hold are no weights and are passed over.
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
    """The way out of the usual causes."""
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
