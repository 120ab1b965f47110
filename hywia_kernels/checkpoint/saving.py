"""Write a (pruned) model as a directory that loads where the original did."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import arch
from ..arch.facts import weight_bytes
from ..arch.holding import plain_model
from ..errors import HywiaError, UsageError
from ..types import Plan
from ..types.record import parsed, sealed
from ..versions import versions
from . import atomic_directory, model_card
from .adaptive import adapted, remote
from .originals import copy_companions, original
from .pushing import check_repository, pushed
from .replaceable import Input
from .storable import check_storable, storable_generation, storable_state
from .ties import set_ties
from .verify import check_written
from .weight_files import weight_files

__all__ = [
    "RECORD",
    "add_to_record",
    "described",
    "plan_record",
    "read_record",
    "record_of",
    "save",
    "shard_size",
    "stock_config",
    "write_companions",
    "write_model",
]

RECORD = "hywia.json"


def stock_config(model: Any) -> Any:
    """A stock transformers config that describes the model as it now is.

    It is of the model's own class where that class, and servers' code for it, accept the widths; otherwise of the
    table's stand-in with the same mathematics. (A Llama config refuses a hidden size that is no multiple of the head
    count, and servers guess the size of its heads; a Mistral config says it.)

    Raises:
        HywiaError: neither can describe it.
    """
    from huggingface_hub.errors import StrictDataclassError

    entry = arch.architecture(model)
    config = set_ties(copy.deepcopy(model.config), model)
    if hasattr(config, "base_model_type"):  # its layers differed once, and perhaps no longer do
        from .adaptive.configuration_hywia_adaptive import base_config

        config = base_config(config)
    values = config.to_dict()
    values.pop("module_changes", None)
    inner = values if arch.text_config(model) is model.config else values["text_config"]
    if entry.attention.free_head_dim and not entry.attention.size_field:
        inner["head_dim"] = arch.head_dim(model)
    for field, widths in arch.config_widths(model, arch.groups(model)).items():
        inner[field] = widths[0]
    unmet = {k: v for k, v in entry.stand_in_needs.items() if getattr(model.config, k, v) != v}
    if entry.stand_in is not None and not unmet and _head_size_is_guessed(model, inner):
        return _stand_in(entry, values)
    try:
        return type(config).from_dict(values)
    except (ValueError, StrictDataclassError) as refused:
        if entry.stand_in is None or unmet:
            raise HywiaError(
                f"save: a {config.model_type} config refuses these widths ({_last_line(refused)}) and no "
                f"stand-in describes the model{f' with {unmet}' if unmet else ''}"
            ) from refused
    return _stand_in(entry, values)


def _head_size_is_guessed(model: Any, values: Mapping[str, Any]) -> bool:
    """Whether servers would guess another head size than the model's: their Llama code (TGI's, older vLLM's) takes
    hidden_size / num_attention_heads whatever `head_dim` says, which their Mistral code reads."""
    if model.config.model_type != "llama":
        return False
    heads: int = values["num_attention_heads"]
    return heads * arch.head_dim(model) != values["hidden_size"]


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _stand_in(entry: arch.Architecture, values: Mapping[str, Any]) -> Any:
    """The config of the stand-in with the fields that both families have."""
    from transformers import AutoConfig

    assert entry.stand_in is not None
    known = AutoConfig.for_model(entry.stand_in).to_dict()
    own = ("model_type", "architectures", "transformers_version")
    shared = {k: v for k, v in values.items() if k in known and k not in own}
    return AutoConfig.for_model(entry.stand_in, **{**shared, **entry.stand_in_sets})


def _as_stock(model: Any) -> Any:
    """A model of the stock class that shares this one's tensors: loading them proves that the config describes them,
    and copies nothing."""
    config = stock_config(model)
    with torch.device("meta"):
        stock = type(model)(config) if remote.is_remote_code(model) else arch.auto_class(config).from_config(config)
    try:
        stock.load_state_dict(model.state_dict(), assign=True)
    except RuntimeError as refused:
        raise HywiaError(
            f"save: a {model.config.model_type} config does not describe these shapes ({_last_line(refused)})"
        ) from refused
    stock.tie_weights()
    return _finished(stock, model)


def described(model: Any) -> tuple[Any, str | None]:
    """`(model, None)` of the stock class, or a model of the adaptive class and the reason why it is not stock."""
    widths = arch.config_widths(model, arch.groups(model))
    differ = [field for field, w in widths.items() if len(set(w)) > 1]
    reason = f"layers differ in {', '.join(differ)}"
    if not differ:
        try:
            return _as_stock(model), None
        except HywiaError as refused:
            reason = str(refused)
    if not remote.is_remote_code(model):
        return _finished(adapted(model, widths), model), reason
    try:
        return _finished(remote.adapted(model), model), reason
    except (ValueError, RuntimeError) as refused:
        raise HywiaError(f"save: the layers' widths cannot be written into a config: {refused}") from refused


def _finished(stored: Any, model: Any) -> Any:
    """The model that will be written, with the dtype and generation config of the one in memory."""
    stored.config.dtype = next(model.parameters()).dtype
    if getattr(model, "generation_config", None) is not None:
        stored.generation_config = storable_generation(model.generation_config)
    return stored


def shard_size(model: Any) -> int | None:
    """Bytes of a file: shards no larger than the original's largest, and one file where it had one. None where the
    original's files are not known."""
    folder = original(model)
    files: tuple[Path, ...] = ()
    if folder is not None:
        with suppress(HywiaError):  # a GGUF file, or changed since it was loaded
            files = weight_files(folder)
    if not files:
        return None
    largest = max(f.stat().st_size for f in files)
    return largest if len(files) > 1 else max(largest, 2 * weight_bytes(model))


def plan_record(plan: Plan) -> dict[str, Any]:
    """A plan without the indices of the kept units, as records and reports hold it. Of whole layers, "depth" says which
    stay, and "widths" how many."""
    groups = sorted(plan.groups, key=lambda g: g.layer)
    kinds = sorted({g.kind for g in groups})
    depth = plan.depth
    gone = {} if depth is None else {"depth": {"kept": list(depth.keep), "gone": list(depth.gone)}}
    layers = {} if depth is None else {"layers": [len(depth.keep)]}
    layers_before = {} if depth is None else {"layers": [len(depth.parameters)]}
    return {
        **plan.record,
        **gone,
        "layout": plan.layout,
        "parameters_before": plan.parameters_before,
        "parameters_after": plan.parameters_after,
        "removed_ratio": plan.ratio,
        "widths": layers | {kind: plan.widths(kind) for kind in kinds},
        "widths_before": layers_before | {kind: [g.units for g in groups if g.kind == kind] for kind in kinds},
        "fingerprint": plan.fingerprint,
    }


def record_of(model: Any, plan: Plan | None, record: Mapping[str, Any] | None, not_stock: str | None) -> dict[str, Any]:
    """What a directory's record says.

    Args:
        model: that is saved. plan: of its cut. record: more to record.
        not_stock: why no stock config describes the model; None: one does.
    """
    base = str(getattr(model, "name_or_path", "") or "")
    content: dict[str, Any] = {"base": base, "versions": versions(), **(record or {})}
    if plan is not None:
        content["plan"] = plan_record(plan)
        content["kept_units"] = {g.name: plan.keep[g.name].tolist() for g in plan.staying}
        if plan.depth is not None:
            content["kept_units"]["layers"] = list(plan.depth.keep)
    return {**content, "not_stock": not_stock}


def read_record(folder: str | Path) -> dict[str, Any]:
    """The record of a saved model.

    Raises:
        HywiaError: the directory has none, or it is damaged.
    """
    path = Path(folder) / RECORD
    try:
        data = path.read_bytes()
    except OSError as error:
        raise HywiaError(f"{folder}: expected a directory that 'hywia prune' wrote, it has no {RECORD}") from error
    return parsed(data, str(path))


def add_to_record(folder: str | Path, more: Mapping[str, Any]) -> None:
    """Add facts that are known only after saving to a directory's record, and renew its model card.

    At any moment the record is the old one or the new one. A card that somebody edited is kept.

    Args:
        folder: the directory. more: entries of the record; JSON must be able to hold them.

    Raises:
        HywiaError: the directory has no record, it is damaged, or it cannot be written.
    """
    record = {**read_record(folder), **more}
    atomic_directory.write_text(Path(folder) / RECORD, _json(record), "record")
    model_card.write_card(folder, record)


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(sealed(content)) + "\n"


class Outcome(Protocol):
    """What `save` reads of the outcome of `compress`."""

    @property
    def plan(self) -> Plan: ...

    @property
    def record(self) -> Mapping[str, Any]: ...


def save(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    *,
    result: Outcome | None = None,
    plan: Plan | None = None,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    in_place: bool = False,
    push_to_hub: str | None = None,
) -> Path:
    """Write safetensors, config, generation config, tokenizer, a `hywia.json` record and a model card, README.md.

    A model whose layers are equally wide becomes a stock checkpoint that `AutoModelForCausalLM.from_pretrained` loads
    with no trace of this package, where the family's config can say how wide (docs/models.md lists where it cannot).
    Any other model is loaded by it as soon as `hywia_kernels` is imported, and elsewhere with `trust_remote_code=True`,
    since the directory carries its classes. Shards are as large as the original's. Processors' files and licences are
    copied from the original's directory (`originals.copy_companions` has the rule). The directory appears complete or
    not at all, and only after every tensor was read back and compared bit for bit; what was at `path` before stays
    until then, and comes back if the process is killed.

    Args:
        model, tokenizer: what to write; the tokenizer may be None.
        path: the directory.
        result: of `compress`, whose plan and record are kept; or instead of it
        plan: the plan to record, with the kept units.
        record: more to record (arguments, seed, ...), also beside a result's; JSON must be able to hold it.
        overwrite: replace an existing directory that holds a model or scores and nothing else.
        in_place: replace the directory that the model was loaded from.
        push_to_hub: a repository's name, to which the finished directory is uploaded too; a new one is private.

    Returns:
        the path of the directory.

    Raises:
        UsageError: the directory exists and may not be replaced, both a result and a plan, or no name of a repository.
            HywiaError: it cannot be written, no config describes the model, what was written is not what is in memory,
            or the upload of what was written failed.
    """
    if result is not None:
        if plan is not None:
            raise UsageError("plan: expected a result or a plan, got both; leave the plan out, the result has it")
        plan, record = result.plan, {**result.record, **(record or {})}
    if push_to_hub is not None:
        check_repository(push_to_hub)
    path, model = Path(path), plain_model(model)
    source = original(model)
    given: dict[str, Any] = {
        "overwrite": overwrite,
        "in_place": in_place,
        "inputs": () if source is None else (Input("model", source),),
        "need": weight_bytes(model),
    }
    with atomic_directory.claim(path, **given):
        check_storable(model)
        stored, reason = described(model)
        content = record_of(model, plan, record, reason)
        with atomic_directory.directory(path, **given) as folder:
            # The weights come last: until they are whole, the directory does not load.
            write_companions(model, tokenizer, stored, content, folder, path.absolute().name)
            write_model(stored, folder, storable_state(stored), shard_size(model))
            check_written(stored, folder)
    if push_to_hub is not None:
        pushed(path, push_to_hub)
    return path


def write_companions(
    model: Any, tokenizer: Any, stored: Any, content: Mapping[str, Any], folder: Path, name: str
) -> None:
    """Write all of a directory but config and weights.

    Args:
        model, tokenizer: what is saved. stored: the model as it is described. content: of the record.
        folder: an empty directory. name: that it will have.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / RECORD).write_text(_json(content), encoding="utf-8")
    model_card.write_card(folder, content, name=name, config=stored.config.to_dict())
    copy_companions(model, tokenizer, folder)


def write_model(stored: Any, folder: Path, state: Mapping[str, Any] | None, max_shard_size: int | None) -> None:
    """Write config, generation config and weights, by transformers.

    Args:
        stored: the model as it is described. folder: the directory.
        state: the weights; None: the model's. An empty one writes none. max_shard_size: None: transformers' own.

    Raises:
        HywiaError: transformers cannot write the model.
    """
    sharding: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    try:
        stored.save_pretrained(folder, state_dict=state, **sharding)
    except (ValueError, RuntimeError) as refused:
        if isinstance(refused, HywiaError):
            raise
        raise HywiaError(f"save: transformers cannot write this model: {_last_line(refused)}") from refused
