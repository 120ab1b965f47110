"""What the JSON files of a checkpoint ask for, judged before transformers sees them and before weights are read.

A checkpoint is a stranger's: its config can name Python files, other repositories, compiled kernels on the hub and
patches of model classes, all of which transformers would follow under one condition or another. Everything here reads
JSON alone and runs nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..arch import TABLE
from ..arch.classes import of_images
from ..errors import HywiaError
from .file_kinds import read_json

__all__ = [
    "DEQUANTISED",
    "MOST_LAYERS",
    "check_code",
    "check_directory",
    "derivable",
    "family",
    "model_types",
    "needs_code",
    "quantisation",
    "read_config",
]

_ADAPTIVE = "hywia_adaptive"
_DTYPES = ("auto", "float64", "float32", "float16", "bfloat16")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "word_embed_proj_dim",
    *("n_embd", "n_layer", "n_head", "n_positions", "head_dim", "global_head_dim", "num_experts_per_tok"),
)
_OPTIONAL = ("head_dim", "n_inner", "num_key_value_heads", "word_embed_proj_dim", "intermediate_size")
MOST_LAYERS = 10_000
# What transformers would do on a config's say alone, in this process or with other files than the model's.
_REFUSED = {
    "fusion_config": "it patches model classes",
    "distributed_config": "it sets up processes",
    "transformers_weights": "it names other files of weights",
    "per_layer_config": "it makes layers differ in a way that the table of architectures does not describe",
}
# What the configs nested in one of the table's families may say of their type.
_SUB_TYPES: Mapping[str, tuple[str, ...]] = {
    "text_config": ("gemma3_text",),
    "vision_config": ("siglip_vision_model",),
}
_OWN_SUB_TYPES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "gemma4": {
        "text_config": ("gemma4_text",),
        "vision_config": ("gemma4_vision",),
        "audio_config": ("gemma4_audio",),
    },
}
_QUANTISERS = (
    *("aqlm", "auto-round", "awq", "bitnet", "bitsandbytes", "compressed-tensors", "eetq", "fbgemm_fp8", "fp8"),
    *("gptq", "higgs", "hqq", "mxfp4", "quanto", "quark", "spqr", "torchao", "vptq"),
)
# Those that transformers turns into floating-point numbers while it loads -> the package that it needs for it.
DEQUANTISED = {"fp8": "accelerate", "mxfp4": "accelerate", "compressed-tensors": "compressed_tensors"}
_REFERENCE = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*")


def model_types() -> tuple[str, ...]:
    """The `model_type`s that are supported, in alphabetical order."""
    return tuple(sorted({t for entry in TABLE for t in entry.model_types}))


def derivable(model_type: Any) -> bool:
    """Whether the table lacks a type of which transformers has a decoder, alone or as a part of a model of images and
    text: an entry is derived from its structure, and proven before it is used."""
    from transformers.models.auto import modeling_auto as auto

    return (
        isinstance(model_type, str)
        and (model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or of_images(model_type))
        and model_type not in model_types()
        and model_type not in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        and model_type not in auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
    )


def _why_not(model_type: Any, values: Mapping[str, Any]) -> str:
    """What a type is that is refused, and the way out; "" where there is no more to say than that it is unknown."""
    from transformers.models.auto import modeling_auto as auto

    both = {**auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, **auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES}
    if values.get("is_encoder_decoder") is True or (isinstance(model_type, str) and model_type in both):
        return (
            "; it is an encoder with a decoder, and only models that are a decoder alone are scored and cut here: cut "
            "it by Torch-Pruning with the scorers of hywia_kernels.integrations, which take any module"
        )
    return ""


def needs_code(model_type: str) -> bool:
    """Whether models of a supported type are Python code of their checkpoint, which transformers does not have."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in model_types() and model_type not in CONFIG_MAPPING_NAMES


def family(values: Mapping[str, Any]) -> str:
    """The `model_type` of a config's family, which an adaptive checkpoint names beside its own `model_type`.

    Raises:
        HywiaError: the config names no family, or one that is not supported.
    """
    model_type = values.get("model_type")
    if model_type is None:
        raise HywiaError(
            "model: could not load a model whose config.json has no model_type; expected one written by save_pretrained"
        )
    if model_type == _ADAPTIVE:
        model_type = values.get("base_model_type")
    known = model_types()
    decoder = values.get("is_encoder_decoder") is not True
    if isinstance(model_type, str) and decoder and (model_type in known or derivable(model_type)):
        return model_type
    near = difflib.get_close_matches(str(model_type), known, n=1, cutoff=0.85)
    raise HywiaError(
        f"model: could not load a model of model_type {model_type!r} (config.json), which is not supported"
        f"{f'; did you mean {near[0]!r}?' if near else ''}{_why_not(model_type, values)}; "
        f"supported: {', '.join(known)}, and other decoders of transformers, which are derived and proven first"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a directory's config.json, once it has been judged.

    Raises:
        HywiaError: there is none, it is damaged, its family is not supported, or it asks for what no checkpoint may.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise HywiaError(f"model: {folder} has no config.json; {_without_config(folder)}")
    values = read_json(path)
    base = family(values)
    if values["model_type"] == _ADAPTIVE and not isinstance(values.get("module_changes"), dict):
        raise HywiaError(
            f"model: {path} lacks module_changes, which a {_ADAPTIVE} config has; it is damaged or older than this "
            "format: prune again"
        )
    for where, part in _parts(values):
        _check_fields(f"{path}{where}", part, base)
        if where and "auto_map" in part:
            raise HywiaError(f"model: {path}{where}: expected no auto_map here; code of a checkpoint is not run for it")
    if base not in model_types():
        _check_nested(path, values, base)
        return values
    for name, types in _OWN_SUB_TYPES.get(base, _SUB_TYPES).items():
        part = values.get(name, {})
        if isinstance(part, dict) and part.get("model_type") not in (None, *types):
            raise HywiaError(
                f"model: {path}: expected {name}.model_type {types[0]}, got {part['model_type']!r}, "
                f"which is not supported in a {base} model"
            )
    return values


def _check_nested(path: Path, values: dict[str, Any], base: str) -> None:
    """Refuse nested configs of a family that is derived which name what is not transformers' own: timm's models are
    fetched from wherever their config says."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for where, part in _parts(values):
        kind = part.get("model_type")
        known = kind is None or (isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES)
        if where and (not known or str(kind).startswith("timm")):
            raise HywiaError(
                f"model: {path}{where}: expected a model_type that transformers has, got {kind!r}, which is not "
                f"supported in a {base} model"
            )


def _without_config(folder: Path) -> str:
    """What a directory without config.json may be, and the way out."""
    names = {path.name for path in folder.iterdir()}
    if "params.json" in names or any(name.startswith("consolidated.") for name in names):
        return (
            "it is in the original layout (Meta's, Mistral's: params.json, consolidated.*); convert it with the "
            "family's script in transformers (python -m transformers.models.llama.convert_llama_weights_to_hf), or "
            "fetch the model's transformers version"
        )
    if "adapter_config.json" in names:
        return "it is an adapter (adapter_config.json); merge it into its model first (PEFT's merge_and_unload)"
    if any(name.endswith(".gguf") for name in names):
        return f"name the GGUF file itself: {folder / min(n for n in names if n.endswith('.gguf'))}"
    return "expected a directory written by save_pretrained"


def _parts(values: dict[str, Any], where: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """The config and those nested in it, each after its place as messages name it."""
    yield where, values
    for name, value in values.items():
        if isinstance(value, dict) and str(name).endswith("_config") and depth < 8:
            yield from _parts(value, f"{where}.{name}" if where else f": {name}", depth + 1)


def _size_fields(base: str) -> set[str]:
    """Config fields of a family that must hold whole numbers above 0."""
    entry = next((entry for entry in TABLE if base in entry.model_types), None)
    if entry is None:
        return set(_SIZES)
    fields = {entry.mlp.width_field, entry.attention.heads_field, entry.attention.kv_heads_field, *_SIZES}
    if entry.experts is not None and not entry.partial:  # others need not have any
        fields |= {entry.experts.width_field, entry.experts.count_field, entry.experts.chosen_field}
    return {field for field in fields if field}


def _layers_may_differ(base: str) -> bool:
    """Whether a family's layers may differ in their configs: what is derived is proven of them, and an entry by hand
    that takes the heads' size from the layers describes them."""
    entry = next((entry for entry in TABLE if base in entry.model_types), None)
    return entry is None or bool(entry.attention.size_attribute)


def _check_fields(where: str, values: Mapping[str, Any], base: str) -> None:
    from transformers import PretrainedConfig

    for name, value in values.items():
        if name in _REFUSED and value and not (name == "per_layer_config" and _layers_may_differ(base)):
            raise HywiaError(f"model: {where}: expected no {name} in a checkpoint: {_REFUSED[name]}")
        if name.startswith("__") or callable(getattr(PretrainedConfig, name, None)):
            raise HywiaError(f"model: {where}: expected fields of a model, got {name!r}, which would replace a method")
    for name in _size_fields(base) & set(values):
        value = values[name]
        if value is None and name in _OPTIONAL:
            continue
        if type(value) is not int or value < 1:
            raise HywiaError(f"model: {where}: expected {name} to be a whole number above 0, got {value!r}")
        if name in ("num_hidden_layers", "n_layer") and value > MOST_LAYERS:
            raise HywiaError(f"model: {where}: expected at most {MOST_LAYERS} layers, got {value}")
    for name in ("dtype", "torch_dtype"):
        value = values.get(name)
        if value is not None and (not isinstance(value, str) or value.removeprefix("torch.") not in _DTYPES):
            raise HywiaError(f"model: {where}: expected {name} to be one of {', '.join(_DTYPES)}, got {value!r}")
    tied = values.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        raise HywiaError(f"model: {where}: expected tie_word_embeddings to be true or false, got {tied!r}")


def quantisation(values: dict[str, Any]) -> str | None:
    """The method by which a checkpoint, or a part of it, is quantised, as its config says; None where it is not.

    Raises:
        HywiaError: the method is none that transformers has.
    """
    for where, part in _parts(values):
        for name in ("quantization_config", "compression_config"):
            asked = part.get(name)
            if asked is None or where.endswith(name):
                continue
            method = asked.get("quant_method") if isinstance(asked, dict) else None
            if isinstance(asked, dict) and method is None:
                legacy = any(asked.get(key) for key in ("load_in_8bit", "load_in_4bit"))
                method = "bitsandbytes" if legacy else "compressed-tensors" if name == "compression_config" else None
            if method not in _QUANTISERS:
                raise HywiaError(f"model: {name}: expected one of {', '.join(_QUANTISERS)}, got {method!r}")
            return str(method)
    return None


def check_directory(folder: Path) -> None:
    """Refuse what transformers would load in the model's place.

    Raises:
        HywiaError: the directory holds an adapter, which would be loaded on top or take the model from another
            repository, or shards of torch's distributed checkpoints, whose index is a pickle.
    """
    if (folder / "adapter_config.json").exists() or (folder / "adapter_config.json").is_symlink():
        raise HywiaError(
            f"model: {folder} holds an adapter (adapter_config.json), which would be loaded into the model; merge it "
            "first (PEFT's merge_and_unload, then save_pretrained), or move it to a directory of its own"
        )
    for path in folder.iterdir():
        if re.match(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$", path.name):
            raise HywiaError(
                f"model: {folder} holds a distributed checkpoint ({path.name}); expected one written by "
                "save_pretrained on one process"
            )


def check_code(values: Mapping[str, Any], file: str) -> None:
    """Make sure that `auto_map` names only classes in Python files of the same directory.

    Args:
        values: the content of a JSON file. file: what the file is called in messages.

    Raises:
        HywiaError: it names another repository (`repository--module.Class`), a path, or no class.
    """
    mapped = values.get("auto_map", {})
    entries = mapped.values() if isinstance(mapped, dict) else [mapped]
    for entry in entries:
        for reference in entry if isinstance(entry, (list, tuple)) else [entry]:
            if reference is None:
                continue
            if not isinstance(reference, str) or not _REFERENCE.fullmatch(reference):
                raise HywiaError(
                    f"model: {file}: expected auto_map to name classes in files of the same directory (module.Class), "
                    f"got {reference!r}; code of other repositories and directories is never run"
                )
