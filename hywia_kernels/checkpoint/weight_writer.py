"""Safetensors files that are written one tensor at a time, the same bytes as when all of them are at hand.

Names, dtypes and shapes decide where each tensor lies, so the headers are written first and the values come in any
order, from several threads if need be.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import HywiaError
from .weight_files import INDEX, SINGLE

__all__ = ["WeightWriter"]

_METADATA = {"format": "pt"}
_CHUNK = 1 << 22  # bytes that are read back at a time: they stay in the processor's cache


class WeightWriter:
    """The weight files of a directory, whose tensors are still to come.

    Args:
        folder: an empty directory. tensors: name -> tensor on the meta device, in the order of the model's state.
        parameters: of the model, for the index. max_shard_size: bytes of a file, as `save_pretrained` takes it; None:
            its default.
        written: the files are there already, and hold these tensors; None: the directory is empty.

    Raises:
        HywiaError: the files are not there as they should be.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        *,
        parameters: int,
        max_shard_size: int | None = None,
        written: Iterable[str] | None = None,
    ) -> None:
        from huggingface_hub import split_state_dict_into_shards_factory

        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
            # Matrices that are slices of one stack stay in one file, as where they are in memory.
            get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
            filename_pattern=SINGLE.replace(".safetensors", "{suffix}.safetensors"),
            max_shard_size=_usual_size() if max_shard_size is None else max_shard_size,
        )
        self._places: dict[str, tuple[Path, int]] = {}
        self._tensors, self._lock, self._written = dict(tensors), threading.Lock(), set[str](written or ())
        for file_name, names in split.filename_to_tensors.items():
            self._begin(folder / file_name, names, begun=written is not None)
        if len(split.filename_to_tensors) > 1:
            index = {
                "metadata": {"total_parameters": parameters, **split.metadata},
                "weight_map": split.tensor_to_filename,
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / INDEX).write_text(text, encoding="utf-8")

    @property
    def written(self) -> list[str]:
        """The tensors that are there."""
        with self._lock:
            return sorted(self._written)

    def _begin(self, file: Path, names: Sequence[str], *, begun: bool) -> None:
        """Write a file's header, and let it have its length, or see that it has both."""
        header, begin = _header({name: self._tensors[name] for name in names})
        size = len(header) + sum(_bytes(self._tensors[name]) for name in names)
        for name, offset in begin.items():
            self._places[name] = (file, len(header) + offset)
        if not begun:
            with file.open("wb") as opened:
                opened.write(header)
                opened.truncate(size)
            return
        with file.open("rb") as opened:
            if opened.read(len(header)) != header or file.stat().st_size != size:
                raise HywiaError(f"save: {file} is not as a stopped run has begun it; remove {file.parent.parent}")

    def put(self, name: str, values: Tensor) -> None:
        """Write one tensor, and see that it can be read back.

        Raises:
            HywiaError: the directory has no such tensor, or one of another dtype or shape; or what was written is not
                what is there. OSError: the disk refuses.
        """
        want = self._tensors.get(name)
        if want is None or want.dtype != values.dtype or want.shape != values.shape:
            kind = "none" if want is None else f"{want.dtype} {tuple(want.shape)}"
            raise HywiaError(f"save: {name}: expected {kind}, got {values.dtype} {tuple(values.shape)}")
        file, begin = self._places[name]
        data = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if data.numel():
            _write(file, begin, data)
        with self._lock:
            self._written.add(name)

    def finish(self) -> None:
        """Raise HywiaError unless every tensor is there."""
        missing = sorted(self._tensors.keys() - self._written)
        if missing:
            raise HywiaError(f"save: expected {missing[0]}, it was not written ({len(missing)} such tensors)")


def _usual_size() -> Any:
    """The default of `save_pretrained`."""
    import inspect

    from transformers import PreTrainedModel

    return inspect.signature(PreTrainedModel.save_pretrained).parameters["max_shard_size"].default


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """A file's header, and where each tensor begins behind it."""
    from safetensors.torch import save

    # The library orders tensors by alignment and name, and spells the dtypes; a file without values tells both.
    empty = save({name: torch.empty(0, dtype=t.dtype) for name, t in tensors.items()}, metadata=_METADATA)
    entries: dict[str, Any] = json.loads(empty[8 : 8 + int.from_bytes(empty[:8], "little")])
    begin: dict[str, int] = {}
    end = 0
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        begin[name], end = end, end + _bytes(tensors[name])
        entry["shape"], entry["data_offsets"] = list(tensors[name].shape), [begin[name], end]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begin


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether bytes, uint8 `[bytes]`, are the same, compared eight at a time."""
    end = len(one) // 8 * 8
    whole = torch.equal(one[:end].view(torch.int64), other[:end].view(torch.int64))
    return whole and torch.equal(one[end:], other[end:])


def _write(file: Path, begin: int, data: Tensor) -> None:
    """Write bytes, uint8 `[bytes]`, at a place of a file, and compare what the file then holds there."""
    view = data.numpy().data
    handle = os.open(file, os.O_RDWR)
    try:
        done = 0
        while done < len(view):
            done += os.pwrite(handle, view[done : done + (1 << 30)], begin + done)
        buffer = torch.empty(min(_CHUNK, len(view)), dtype=torch.uint8)
        for start in range(0, len(view), _CHUNK):
            want = data[start : start + _CHUNK]
            got = buffer[: len(want)]
            if os.preadv(handle, [got.numpy().data], begin + start) != len(want) or not _equal(got, want):
                raise HywiaError(f"save: {file.name} does not hold what was written into it; the disk may be failing")
    finally:
        os.close(handle)
