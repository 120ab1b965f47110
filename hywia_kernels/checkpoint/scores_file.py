"""Statistics and scores on the disk: one directory with a safetensors file and a JSON file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import HywiaError
from ..types import Group, LayerScores, Member, Scores, Statistics
from ..types.record import DIGEST, parsed, sealed
from . import atomic_directory
from .verify import check_file

__all__ = ["load_measured", "load_scores", "save_scores"]

_TENSORS, _INDEX = "scores.safetensors", "scores.json"
_FORMAT = 3  # since 3: digests, and a fingerprint that sees every row and column, the config and the buffers
_TENSORS_DIGEST = "tensors_sha256"
_TOKENS = "tokens"


def save_scores(
    path: str | Path,
    scores: Scores,
    statistics: Statistics | None = None,
    *,
    tokens: Tensor | None = None,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write scores, and the statistics they came from if given, so that another ratio, fusion or order needs no
    second calibration.

    Args:
        path: the directory to write.
        scores, statistics: what to write; the statistics must be those that the scores came from.
        tokens: int64 `[samples, seq_len]`, ids of the calibration text, for steps that read it again after scoring.
        record: how the measuring was done; JSON must be able to hold it.
        overwrite: replace a directory that holds a model or scores and nothing else.

    Raises:
        UsageError: the directory exists. HywiaError: it cannot be written, or the statistics are of something else.
    """
    from safetensors.torch import save_file

    if statistics is not None and (statistics.fingerprint, statistics.parameters, statistics.groups) != (
        scores.fingerprint,
        scores.parameters,
        scores.groups,
    ):
        raise HywiaError("statistics: expected those the scores came from, got those of another model or other groups")

    tensors: dict[str, Tensor] = {}
    for name, value in scores.values.items():
        tensors[f"values/{name}"] = value
    for name, value in scores.loss.items():
        tensors[f"loss/{name}"] = value
    if scores.layers is not None:
        tensors["layers/values"] = scores.layers.values
        if scores.layers.loss is not None:
            tensors["layers/loss"] = scores.layers.loss
    index: dict[str, Any] = {
        "format": _FORMAT,
        "groups": [dataclasses.asdict(g) for g in scores.groups],
        "parameters": scores.parameters,
        "fingerprint": scores.fingerprint,
        "scores": dict(scores.record),
    }
    if scores.layers is not None:
        index["layers"] = {"parameters": list(scores.layers.parameters), "record": dict(scores.layers.record)}
    if statistics is not None:
        index["statistics"] = dict(statistics.record)
        for name, orders in statistics.fine.items():
            for order, value in orders.items():
                tensors[f"fine/{order}/{name}"] = value
        for name, value in statistics.coarse.items():
            tensors[f"coarse/{name}"] = value
        for name, value in statistics.moments.items():
            tensors[f"moments/{name}"] = value
    if tokens is not None:
        tensors[_TOKENS] = tokens
    if record is not None:
        index["measured"] = dict(record)
    index = sealed(index)  # refuses what JSON cannot hold, before anything is written
    need = sum(v.numel() * v.element_size() for v in tensors.values())
    with atomic_directory.directory(Path(path), overwrite=overwrite, need=need) as folder:
        save_file(_unshared(tensors), folder / _TENSORS)
        check_file(folder / _TENSORS, tensors)
        index = sealed({**index, _TENSORS_DIGEST: _file_digest(folder / _TENSORS)})
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return Path(path)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as the format takes no others."""
    unshared, pointers = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        unshared[name] = tensor.clone() if tensor.data_ptr() in pointers else tensor
        pointers.add(tensor.data_ptr())
    return unshared


def load_scores(path: str | Path) -> tuple[Scores, Statistics | None]:
    """Read the scores, and the statistics if there are any, that `save_scores` wrote.

    Raises:
        HywiaError: the directory is missing, holds no scores, is of another version, or is damaged, which the digests
            of both files tell; the message says what is wrong.
    """
    scores, statistics, _, _ = load_measured(path)
    return scores, statistics


def load_measured(path: str | Path) -> tuple[Scores, Statistics | None, Tensor | None, dict[str, Any]]:
    """As `load_scores`, and then the text's token ids, int64 `[samples, seq_len]`, and the record of the measuring.

    Token ids that were not kept are None; a record that was not kept is empty.
    """
    folder = Path(path)
    if not (folder / _INDEX).is_file() or not (folder / _TENSORS).is_file():
        raise HywiaError(f"scores: {folder} is not a directory written by 'hywia score'")
    index = _read_index(folder)
    tensors = _read_tensors(folder, index)
    try:
        groups = tuple(_group(g) for g in _entry(index, "groups", list))
        common: dict[str, Any] = {"groups": groups}
        common |= {name: index.get(name) for name in ("parameters", "fingerprint")}
        tokens = tensors.pop(_TOKENS, None)
        if tokens is not None and (tokens.dim() != 2 or tokens.is_floating_point() or not tokens.numel()):
            raise HywiaError(f"{_TENSORS}: expected token ids [samples, length], got {list(tokens.shape)}")
        layers = _layers(index, tensors)
        values, loss, fine, coarse, moments = _by_kind(tensors)
        scores = Scores(values=values, loss=loss, record=_entry(index, "scores", dict), layers=layers, **common)
        statistics = None
        if "statistics" in index:
            record = _entry(index, "statistics", dict)
            statistics = Statistics(fine=fine, coarse=coarse, moments=moments, record=record, **common)
        elif fine or coarse or moments:
            raise HywiaError("holds statistics that its index does not tell of")
        record = _entry(index, "measured", dict) if "measured" in index else {}
    except HywiaError as error:
        raise _damaged(folder, error) from error
    return scores, statistics, tokens, record


def _damaged(folder: Path, what: object) -> HywiaError:
    return HywiaError(f"scores: {folder} is damaged ({what}); score again")


def _read_index(folder: Path) -> dict[str, Any]:
    """The content of the JSON file, once it is seen to be of this version and what its digest says."""
    try:
        index = parsed((folder / _INDEX).read_bytes(), _INDEX)
    except OSError as error:
        raise HywiaError(f"scores: cannot read {folder / _INDEX}: {error.strerror or error}") from error
    except HywiaError as error:
        raise _damaged(folder, error) from error
    if type(index.get("format")) is not int:
        raise _damaged(folder, f"{_INDEX}: expected an object with a format")
    if index["format"] != _FORMAT:
        age = "an older" if index["format"] < _FORMAT else "a newer"
        raise HywiaError(
            f"scores: {folder} was scored by {age} version of this package (format {index['format']}, expected "
            f"{_FORMAT}); score again"
        )
    if DIGEST not in index:
        raise _damaged(folder, f"{_INDEX}: expected a digest of its content")
    return index


def _read_tensors(folder: Path, index: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name -> tensor of the safetensors file, once it is seen to be the one that the index was written with."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if index.get(_TENSORS_DIGEST) != _file_digest(folder / _TENSORS):
            raise _damaged(folder, f"{_TENSORS}: cut short, changed, or not written with this {_INDEX}")
        return load_file(folder / _TENSORS)
    except OSError as error:
        raise HywiaError(f"scores: cannot read {folder / _TENSORS}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"{_TENSORS}: {error}") from error


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _by_kind(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """The tensors as `(values, loss, fine, coarse, moments)`, which their names tell apart."""
    fine: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, dict[str, Tensor]] = {"values": {}, "loss": {}, "coarse": {}, "moments": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "fine":
            order, _, name = name.partition("/")
            fine.setdefault(name, {})[order] = tensor
        elif kind in plain:
            plain[kind][name] = tensor
        else:
            raise HywiaError(f"{_TENSORS}: expected values, loss, fine and coarse, got a tensor {key!r}")
    return plain["values"], plain["loss"], fine, plain["coarse"], plain["moments"]


def _layers(index: Mapping[str, Any], tensors: dict[str, Tensor]) -> LayerScores | None:
    """The scores of whole layers, taken out of the tensors; None where there are none."""
    values, loss = tensors.pop("layers/values", None), tensors.pop("layers/loss", None)
    if "layers" not in index:
        if values is not None or loss is not None:
            raise HywiaError("holds scores of layers that its index does not tell of")
        return None
    described = _entry(index, "layers", dict)
    parameters = tuple(_entry(described, "parameters", list))
    if values is None:
        raise HywiaError(f"{_TENSORS}: expected scores of {len(parameters)} layers, got none")
    return LayerScores(parameters, values, loss, _entry(described, "record", dict))


def _entry(index: Mapping[str, Any], name: str, kind: type) -> Any:
    value = index.get(name)
    if type(value) is not kind:
        raise HywiaError(f"{_INDEX}: expected {name} as {kind.__name__}, got {type(value).__name__}")
    return value


def _group(values: Any) -> Group:
    """The group that an index describes."""
    values = dict(_fields(Group, values))
    for name in ("members", "vectors"):
        values[name] = tuple(Member(**_fields(Member, m)) for m in _entry(values, name, list))
    values["stock_counts"] = tuple(_entry(values, "stock_counts", list))
    return Group(**values)


def _fields(kind: type, values: Any) -> dict[str, Any]:
    """An index's object, once it is seen to have exactly the fields of a dataclass."""
    names = [f.name for f in dataclasses.fields(kind)]
    if not isinstance(values, dict) or sorted(values) != sorted(names):
        raise HywiaError(f"{_INDEX}: expected a {kind.__name__.lower()} with the fields {', '.join(names)}")
    return values
